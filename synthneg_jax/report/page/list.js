"use strict";
// The list with its filters, and the open traces. Only visible rows exist in the page, so the list may be long.

const $ = (id) => document.getElementById(id);
const list = $("list");
const spacer = $("spacer");
const detail = $("detail");
const ROW = 64;  // px, as in the style sheet
const wide = matchMedia("(min-width: 60rem)");

let shown = [];  // numbers of the traces in the list, in order
let active = -1;  // index in `shown` of the row with keyboard focus
let open = -1;  // number of the open trace
let beside = -1;  // number of the compared trace
const rows = new Map();  // index in `shown` -> element

// Filters. Each choice is [label, predicate on a trace's number]; choices without traces are hidden.
const has = (flag) => (t) => (COLUMNS.flags[t] & flag) !== 0;
const steps = Array.from({ length: COLUMNS.pit.reduce((most, pit) => Math.max(most, pit), -1) + 1 }, (_, step) => step);
const isTested = (t) => INDEX.tested.includes(COLUMNS.source[t]);
const FILTERS = {
  verdict: [["not right", (t) => !isRight(t)], ...INDEX.reasons.map((reason, r) => [reasonName(reason), (t) => COLUMNS.reason[t] === r])],
  source: INDEX.sources.map((name, s) => [name, (t) => COLUMNS.source[t] === s]),
  pit: [["has a pit", (t) => COLUMNS.pit[t] >= 0],
    ["wrong, no pit found", (t) => has(FLAG.credited)(t) && !isRight(t) && COLUMNS.pit[t] < 0],
    ...steps.map((step) => [`at step ${step + 1}`, (t) => COLUMNS.pit[t] === step])],
  credit: [["with credit", has(FLAG.credited)], ["right, with a spurious step", (t) => COLUMNS.spurious[t] >= 0],
    ["with pairs", has(FLAG.paired)], ["without credit", (t) => !has(FLAG.credited)(t)]],
  disagreement: [["any", (t) => (COLUMNS.flags[t] & (FLAG.wrongSolvable | FLAG.rightDoubtful | FLAG.policiesDiffer)) !== 0],
    ["wrong, but Q \u2265 \u00bd before", has(FLAG.wrongSolvable)], ["right, but Q < \u00bd before", has(FLAG.rightDoubtful)],
    ["policies differ on the problem", has(FLAG.policiesDiffer)]],
};
const ORDERS = {
  drop: ["largest drop of Q first", (a, b) => (COLUMNS.drop[a] ?? 9999) - (COLUMNS.drop[b] ?? 9999) || a - b],
  record: ["as recorded", (a, b) => a - b],
  length: ["most steps first", (a, b) => COLUMNS.length[b] - COLUMNS.length[a] || a - b],
};

function fillFilters() {
  const every = Array.from({ length: COUNT }, (_, t) => t);
  for (const [name, choices] of Object.entries(FILTERS)) {
    const select = $(name);
    select.append(make("option", { value: "" }, "all"));
    choices.forEach(([text, test], number) => {
      const count = every.filter(test).length;
      if (count) select.append(make("option", { value: String(number) }, `${text} (${grouped(count)})`));
    });
    select.disabled = select.options.length < 2;
    select.addEventListener("change", refresh);
  }
  for (const [name, [text]] of Object.entries(ORDERS)) $("order").append(make("option", { value: name }, text));
  $("order").addEventListener("change", refresh);
}

/** Redraws the list after a change of filters, order or search. */
function refresh() {
  const tests = Object.entries(FILTERS).filter(([name]) => $(name).value !== "").map(([name, choices]) => choices[Number($(name).value)][1]);
  const words = $("search").value.trim();
  const candidates = [];
  for (let t = 0; t < COUNT; t += 1) if (tests.every((test) => test(t))) candidates.push(t);
  candidates.sort(ORDERS[$("order").value][1]);
  $("active").textContent = String(tests.length);
  $("active").hidden = !tests.length;
  shown = [];
  let first = true;
  search(candidates, words, (t) => shown.push(t), (whole) => {
    if (first) {
      list.scrollTop = 0;
      active = Math.max(0, shown.indexOf(open));
      first = false;
    }
    say(whole);
    draw(true);
  });
}

function say(whole) {
  const all = INDEX.total > COUNT ? `${grouped(COUNT)} in this page (the run has ${grouped(INDEX.total)})` : grouped(COUNT);
  $("status").textContent = !COUNT ? "No traces yet." : `${grouped(shown.length)} of ${all} traces${whole ? "" : " \u2026"}`;
}

/** One row of the list. */
function row(place) {
  const t = shown[place];
  const trace = traceOf(t);
  const strip = make("span", { class: "strip", "aria-hidden": "true" });
  (trace.credit || []).forEach((step, number) => {
    const cell = make("span", { class: `cell${COLUMNS.pit[t] === number ? " pit" : ""}` });
    if (step.advantage !== null) {
      cell.classList.add(step.advantage < 0 ? "lowers" : "raises");
      cell.style.setProperty("--shade", String(Math.min(1, Math.abs(step.advantage))));
    }
    strip.append(cell);
  });
  const about = [sourceOf(t)];
  if (COLUMNS.pit[t] >= 0) about.push(`pit at ${COLUMNS.pit[t] + 1} of ${COLUMNS.length[t]}`);
  else if (COLUMNS.spurious[t] >= 0) about.push(`spurious at ${COLUMNS.spurious[t] + 1} of ${COLUMNS.length[t]}`);
  else about.push(plural(COLUMNS.length[t], "step"));
  const element = make("div", {
    class: "row", role: "option", id: `row-${place}`, "aria-selected": String(t === open),
    "aria-posinset": String(place + 1), "aria-setsize": String(shown.length),
    onclick: () => { active = place; go(t); },
  },
  make("div", { class: "about" }, verdictOf(t), make("span", { class: "dim" }, about.join(" \u00b7 "))),
  make("div", { class: "what" }, make("span", { class: "excerpt" }, problemOf(t).text.trim().slice(0, 240)), strip));
  element.style.transform = `translateY(${place * ROW}px)`;
  return element;
}

/** Creates the visible rows and removes the others; recreates all of them on request. */
function draw(anew = false) {
  spacer.style.height = `${shown.length * ROW}px`;
  const from = Math.max(0, Math.floor(list.scrollTop / ROW) - 6);
  const to = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 6);
  for (const [place, element] of rows) {
    if (anew || place < from || place >= to) {
      element.remove();
      rows.delete(place);
    }
  }
  for (let place = from; place < to; place += 1) {
    if (rows.has(place)) continue;
    const element = row(place);
    rows.set(place, element);
    spacer.append(element);
  }
  for (const [place, element] of rows) {
    element.classList.toggle("active", place === active);
    element.setAttribute("aria-selected", String(shown[place] === open));
  }
  if (rows.has(active)) list.setAttribute("aria-activedescendant", `row-${active}`);
  else list.removeAttribute("aria-activedescendant");
}

function move(place) {
  if (!shown.length) return;
  active = Math.min(shown.length - 1, Math.max(0, place));
  const top = active * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  draw();
  if (wide.matches) go(shown[active], -1, true);
}

const address = (t, other) => `#trace=${encodeURIComponent(idOf(t))}${other >= 0 ? `&with=${encodeURIComponent(idOf(other))}` : ""}`;

/** Opens a trace and optionally a compared one through the page's address; `quietly` adds no history entry. */
function go(t, other = -1, quietly = false) {
  if (quietly) {
    history.replaceState(null, "", address(t, other));
    route();
  } else if (location.hash === address(t, other)) route();
  else location.hash = address(t, other);
}

/** Shows the traces in the page's address. */
function route() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const id = wanted.get("trace");
  if (!id) {
    document.body.classList.remove("reading");
    if (wide.matches && open < 0 && shown.length) show(shown[0], -1);
    else draw();
    return;
  }
  findTrace(id, (t) => {
    if (t < 0) {
      document.body.classList.add("reading");
      detail.replaceChildren(back(), make("p", { class: "note" }, "This page holds no trace ", make("code", {}, id), "."));
      return;
    }
    const other = wanted.get("with");
    document.body.classList.add("reading");
    if (!other) show(t, -1);
    else findTrace(other, (second) => show(t, second));
  });
}

const back = () => make("button", { type: "button", class: "back", onclick: () => { location.hash = ""; list.focus(); } }, "\u2190 all traces");

function show(t, other) {
  const anew = t !== open;
  open = t;
  beside = other >= 0 && COLUMNS.problem[other] === COLUMNS.problem[t] ? other : -1;
  const problem = problemOf(t);
  const place = shown.indexOf(t);
  if (place >= 0) active = place;
  const tools = make("div", { class: "bar" }, back(), picker(t, beside, (choice) => go(t, choice)),
    make("button", { type: "button", class: "copy", onclick: copyLink }, "Copy link"));
  const about = [];
  if (problem.samples) about.push(`${problem.right} of ${problem.samples} samples are right`);
  if (problem.value !== null && INDEX.bestOf > 1) about.push(`value ${plain(problem.value, 3)} under Best-of-${INDEX.bestOf}`);
  about.push(`gold answer ${problem.gold}`);
  const asked = make("section", { class: "problem" }, make("h2", {}, "Problem ", make("span", { class: "dim" }, problem.id)),
    put(make("div", { class: "text" }), tidy(problem.text)), make("p", { class: "dim" }, about.join(" \u00b7 ")));
  if (problem.solution) {
    asked.append(make("details", {}, make("summary", {}, "Known solution"), put(make("div", { class: "text" }), tidy(problem.solution))));
  }
  const parts = beside < 0 ? -1 : partsAt(t, beside);
  const cards = make("div", { class: beside < 0 ? "cards" : "cards two" }, card(t, parts, null));
  if (beside >= 0) {
    cards.append(card(beside, parts, make("button", { type: "button", class: "close", "aria-label": "Close this one", onclick: () => go(t) }, "\u00d7")));
  }
  const same = beside >= 0 && parts < 0 ? make("p", { class: "dim" }, "Both traces have the same steps.") : "";
  detail.replaceChildren(tools, asked, same, cards, legend());
  if (anew) {
    detail.scrollTop = 0;
    if (!wide.matches) scrollTo(0, 0);
  }
  draw();
}

function copyLink(event) {
  const button = event.target;
  const report = (text) => { button.textContent = text; setTimeout(() => { button.textContent = "Copy link"; }, 1500); };
  const link = location.href.split("#")[0] + address(open, beside);
  history.replaceState(null, "", address(open, beside));  // works even if the clipboard is not available
  if (navigator.clipboard) navigator.clipboard.writeText(link).then(() => report("Copied"), () => report("See the address bar"));
  else report("See the address bar");
}

const KEYS = {
  ArrowDown: () => move(active + 1),
  ArrowUp: () => move(active - 1),
  PageDown: () => move(active + Math.floor(list.clientHeight / ROW)),
  PageUp: () => move(active - Math.floor(list.clientHeight / ROW)),
  Home: () => move(0),
  End: () => move(shown.length - 1),
  Enter: () => { if (shown.length) { go(shown[active]); detail.focus(); } },
};
list.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    if (document.body.classList.contains("reading") && !wide.matches) location.hash = "";
    list.focus();
  } else if (!/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
    if (event.key === "/") {
      event.preventDefault();
      $("search").focus();
    } else if (event.key === "j") move(active + 1);
    else if (event.key === "k") move(active - 1);
  }
});
let waiting = 0;
$("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(refresh, 120); });
$("clear").addEventListener("click", () => {
  for (const name of Object.keys(FILTERS)) $(name).value = "";
  $("search").value = "";
  refresh();
});
list.addEventListener("scroll", () => requestAnimationFrame(() => draw()), { passive: true });
addEventListener("resize", () => draw());
addEventListener("hashchange", route);

$("filters").open = wide.matches;
fillFilters();
refresh();
route();
