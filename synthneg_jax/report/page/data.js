"use strict";
// The page's data: the index, parsed on load, and chunks of whole problems, parsed on first use.

const parsed = new Map();

function data(name) {
  if (!parsed.has(name)) parsed.set(name, JSON.parse(document.getElementById(name).textContent));
  return parsed.get(name);
}

const INDEX = data("index");
const COLUMNS = INDEX.columns;
const COUNT = COLUMNS.problem.length;
const FLAG = { credited: 1, wrongSolvable: 2, rightDoubtful: 4, policiesDiffer: 8, paired: 16 };

const firstOf = [];  // number of each problem's first trace
COLUMNS.problem.forEach((problem, t) => { if (firstOf[problem] === undefined) firstOf[problem] = t; });

/** The chunk that holds a problem. */
function chunkOf(problem) {
  let low = 0;
  let high = INDEX.starts.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (INDEX.starts[middle] <= problem) low = middle;
    else high = middle - 1;
  }
  return low;
}

function problemOf(t) {
  const problem = COLUMNS.problem[t];
  const chunk = chunkOf(problem);
  const [id, text, gold, solution, value, right, samples, traces] = data(`texts-${chunk}`)[problem - INDEX.starts[chunk]];
  return { id, text, gold, solution, value, right, samples, traces };
}

const reasonOf = (t) => INDEX.reasons[COLUMNS.reason[t]];
const reasonName = (reason) => INDEX.reasonNames[reason] || reason;
const sourceOf = (t) => INDEX.sources[COLUMNS.source[t]];
const isRight = (t) => reasonOf(t) === "right";

/** A trace without the data that a click loads. */
function traceOf(t) {
  const [id, steps, extracted, finish, credit] = problemOf(t).traces[t - firstOf[COLUMNS.problem[t]]];
  const named = credit && credit.map(([rollouts, successes, low, high, q, advantage, exact]) => (
    { rollouts, successes, low, high, q, advantage, exact: exact === 1 }
  ));
  return { id, steps, extracted, finish, credit: named };
}

/** Rollouts by step and pairs of a trace. */
function detailsOf(t) {
  const problem = COLUMNS.problem[t];
  const chunk = chunkOf(problem);
  const [rollouts, pairs] = data(`details-${chunk}`)[problem - INDEX.starts[chunk]][t - firstOf[problem]];
  return {
    rollouts: (rollouts || []).map((step) => step.map(([text, right, reason, times]) => ({ text, right, reason, times }))),
    pairs: (pairs || []).map(([stage, mode, pit, trunk, chosen, rejected, flip, chosenLogp, rejectedLogp]) => (
      { stage, mode, pit, trunk, chosen, rejected, flip, chosenLogp, rejectedLogp }
    )),
  };
}

/** All traces of a trace's problem. */
function siblingsOf(t) {
  const problem = COLUMNS.problem[t];
  const out = [];
  for (let other = firstOf[problem]; other < COUNT && COLUMNS.problem[other] === problem; other += 1) out.push(other);
  return out;
}

const idOf = (t) => problemOf(t).traces[t - firstOf[COLUMNS.problem[t]]][0];

/** The searched text of a trace, in lower case: problem, gold answer, steps, answer and id. */
function haystack(t) {
  const problem = problemOf(t);
  const [id, steps, extracted] = problem.traces[t - firstOf[COLUMNS.problem[t]]];
  return `${problem.text}\n${problem.gold}\n${steps.join("")}\n${extracted || ""}\n${id}`.toLowerCase();
}

let searchNumber = 0;

/** Calls found(t) for each trace that contains the words, then done(); works in short slices, and a later call cancels it. */
function search(traces, words, found, done) {
  const mine = ++searchNumber;
  const wanted = words.toLowerCase();
  let at = 0;
  const work = () => {
    if (mine !== searchNumber) return;
    const until = performance.now() + 12;
    while (at < traces.length && performance.now() < until) {
      for (const end = Math.min(at + 64, traces.length); at < end; at += 1) {
        if (!wanted || haystack(traces[at]).includes(wanted)) found(traces[at]);
      }
    }
    if (at < traces.length) setTimeout(work, 0);
    done(at >= traces.length);
  };
  work();
}

/** Finds a trace by id, parsing as few chunks as possible; calls then(t), with -1 if it is missing. */
function findTrace(id, then) {
  const wanted = JSON.stringify(id).replace(/[<>&]/g, (c) => `\\u00${c.charCodeAt(0).toString(16)}`)
    .replace(/[\u007f-\uffff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
  for (let chunk = 0; chunk < INDEX.starts.length; chunk += 1) {
    if (!document.getElementById(`texts-${chunk}`).textContent.includes(wanted)) continue;
    const problems = data(`texts-${chunk}`);
    for (let p = 0; p < problems.length; p += 1) {
      const place = problems[p][7].findIndex((trace) => trace[0] === id);
      if (place >= 0) return then(firstOf[INDEX.starts[chunk] + p] + place);
    }
  }
  return then(-1);
}
