"use strict";
// Turns strings into elements. Models' text becomes text nodes, or formulas that KaTeX draws without links or markup.

/** An element with attributes and children; strings become text nodes, null is skipped. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const FORMULAS = [  // opening delimiter, closing delimiter, display style
  ["$$", "$$", true],
  ["\\[", "\\]", true],
  ["\\(", "\\)", false],
  ["$", "$", false],
];

// Formulas between two $ without any TeX command: 12, -3y, x+1, (0, 3], 2/3.
const PLAIN = /^(-?\d[\d.,]*|[-+]?\d*[A-Za-z]'?([-+*/][\dA-Za-z]+)*|-?\d+([-+*/]\d+)+|[[(]-?[\w.]+(, ?-?[\w.]+)*[\])])$/;

/** End of the formula that opens at `from`, or -1. A lone $ is often an amount, so the pair must enclose a formula tightly. */
function formulaEnd(text, from, open, close) {
  let at = from + open.length;
  for (;;) {
    at = text.indexOf(close, at);
    if (at < 0) return -1;
    let slashes = 0;
    while (text[at - 1 - slashes] === "\\") slashes += 1;
    if (close[0] !== "$" || slashes % 2 === 0) break;  // \$ is a dollar inside a formula
    at += close.length;
  }
  const inner = text.slice(from + open.length, at);
  if (!inner.trim()) return -1;
  if (open !== "$") return at;
  const hugs = !/^\s|\s$|\n\s*\n/.test(inner) && !/\d/.test(text[at + 1] || "");
  return hugs && (/[\\^_{}=<>]/.test(inner) || PLAIN.test(inner)) ? at : -1;
}

/** Splits a text into pieces [text, isFormula, isDisplay] that concatenate to it, except for formula delimiters. */
function pieces(text) {
  const out = [];
  let start = 0;
  for (let at = 0; at < text.length; at += 1) {
    if (text[at] !== "$" && text[at] !== "\\") continue;
    const found = FORMULAS.find(([open]) => text.startsWith(open, at));
    if (!found) {
      at += 1;  // an escaped character
      continue;
    }
    const [open, close, apart] = found;
    const end = formulaEnd(text, at, open, close);
    if (end < 0) {
      at += open.length - 1;
      continue;
    }
    if (at > start) out.push([text.slice(start, at), false, false]);
    out.push([text.slice(at + open.length, end), true, apart]);
    start = end + close.length;
    at = start - 1;
  }
  if (start < text.length) out.push([text.slice(start), false, false]);
  return out;
}

/** Puts a text into an element and renders its formulas. */
function put(element, text) {
  if (typeof katex === "undefined" || !/[$\\]/.test(text)) {
    element.textContent = text;
    return element;
  }
  element.textContent = "";
  const cut = pieces(text);
  cut.forEach(([piece, isFormula, apart], number) => {
    if (!isFormula) {  // a display formula breaks lines itself
      const [before, after] = [cut[number - 1], cut[number + 1]].map((other) => Boolean(other && other[2]));
      element.append(after ? (before ? piece.trim() : piece.trimEnd()) : before ? piece.trimStart() : piece);
      return;
    }
    const span = make("span", { class: apart ? "formula apart" : "formula" });
    try {
      katex.render(piece, span, {
        displayMode: apart, trust: false, throwOnError: false, strict: "ignore", maxExpand: 200, maxSize: 20,
      });
    } catch (error) {
      span.textContent = piece;  // too deep for KaTeX: shown as written
    }
    element.append(span);
  });
  return element;
}

/** A text without surrounding blank lines and common indentation. */
function tidy(text) {
  const lines = text.replace(/^\s*\n|\s+$/g, "").split("\n");
  const indent = Math.min(...lines.filter((line) => line.trim()).map((line) => line.length - line.trimStart().length));
  return Number.isFinite(indent) ? lines.map((line) => line.slice(indent)).join("\n") : "";
}

const signed = (value, digits = 2) => {
  const text = Math.abs(value).toFixed(digits);
  if (Number(text) === 0) return text;
  return (value < 0 ? "\u2212" : "+") + text;
};
const plain = (value, digits = 2) => value.toFixed(digits).replace("-", "\u2212");
const grouped = (count) => String(count).replace(/\B(?=(\d{3})+$)/g, "\u202f");
const plural = (count, noun) => `${grouped(count)} ${noun}${count === 1 ? "" : "s"}`;
