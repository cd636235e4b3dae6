"use strict";
// One trace, or two side by side, as elements.

/** The scale with a Q and its interval. */
function meter(step) {
  const bar = make("span", { class: "meter", "aria-hidden": "true" });
  if (step.low !== null) {
    const range = make("span", { class: "range" });
    range.style.left = `${100 * step.low}%`;
    range.style.width = `${100 * (step.high - step.low)}%`;
    bar.append(range);
  }
  const at = step.rollouts ? step.successes / step.rollouts : step.q;
  if (at !== null) {
    const dot = make("span", { class: step.exact ? "dot exact" : "dot" });
    dot.style.left = `${100 * at}%`;
    bar.append(dot);
  }
  return bar;
}

/** Q, its interval and the advantage of a step, as text. */
function creditOf(step) {
  const box = make("div", { class: "credit" });
  if (!step.exact && !step.rollouts) {
    box.append(make("span", { class: "dim" }, step.q === null ? "no rollouts: Q unknown" : `Q ${plain(step.q)}`));
    return box;
  }
  box.append(meter(step));
  if (step.exact) {
    box.append(make("span", { class: "q" }, `Q ${step.q}`, make("span", { class: "dim" }, " the verdict")));
  } else {
    const share = plain(step.successes / step.rollouts);
    const interval = `${plain(step.low)}\u2013${plain(step.high)}`;
    const named = INDEX.bestOf > 1 ? `right ${share}` : `Q ${share}`;
    box.append(make("span", { class: "q" }, named, make("span", { class: "dim" }, ` ${interval}`)));
    if (INDEX.bestOf > 1) box.append(make("span", { class: "q" }, step.q === null ? "Q unknown" : `Q ${plain(step.q)}`));
  }
  if (step.advantage !== null) {
    const text = signed(step.advantage);
    const arrow = text[0] === "+" ? "\u25b2" : text[0] === "\u2212" ? "\u25bc" : "=";
    const kind = text[0] === "+" ? "up" : text[0] === "\u2212" ? "down" : "flat";
    box.append(make("span", { class: `advantage ${kind}`, title: "advantage: Q minus the Q of the step before" },
      make("span", { "aria-hidden": "true" }, `${arrow} `), make("span", { class: "hidden" }, "advantage "), text));
  }
  return box;
}

/** The button that opens a step's rollouts, and the list that it fills. */
function rolloutsOf(t, number, step) {
  const place = make("ul", { class: "rollouts", hidden: true, id: `rollouts-${t}-${number}` });
  const toggle = () => {
    const open = place.hidden;
    if (open && !place.children.length) {
      const drawn = detailsOf(t).rollouts[number] || [];
      for (const rollout of drawn) {
        const mark = rollout.right ? "\u2713 right" : `\u2717 ${reasonName(rollout.reason)}`;
        place.append(make("li", { class: rollout.right ? "right" : "wrong" },
          make("span", { class: "mark" }, mark, rollout.times > 1 ? make("b", {}, ` \u00d7${rollout.times}`) : null),
          put(make("div", { class: "text" }), tidy(rollout.text))));
      }
      const missing = step.rollouts - drawn.reduce((sum, rollout) => sum + rollout.times, 0);
      if (missing > 0) place.append(make("li", { class: "dim" }, `${plural(missing, "more rollout")} not in this page.`));
    }
    place.hidden = !open;
    button.setAttribute("aria-expanded", String(open));
  };
  const button = make("button", { type: "button", class: "roll", "aria-expanded": "false", "aria-controls": place.id, onclick: toggle },
    `${plural(step.rollouts, "rollout")}, ${step.successes} right`);
  return [button, place];
}

/** The steps of a trace; `parts` is the first step that differs from the compared trace, -1 for none. */
function stepsOf(t, parts) {
  const trace = traceOf(t);
  const list = make("ol", { class: "steps" });
  trace.steps.forEach((text, number) => {
    const step = trace.credit && trace.credit[number];
    const isPit = COLUMNS.pit[t] === number;
    const isSpurious = COLUMNS.spurious[t] === number;
    const kind = ["step", isPit && "pit", isSpurious && "spurious", number === parts && "parts"].filter(Boolean).join(" ");
    const line = make("div", { class: "line" }, put(make("div", { class: "text" }), tidy(text)));
    const item = make("li", { class: kind }, make("span", { class: "number" }, String(number + 1)), line);
    const tags = make("div", { class: "tags" });
    if (number === parts) tags.append(make("span", { class: "tag quiet" }, "\u2260 first difference"));
    if (isPit) tags.append(make("span", { class: "tag" }, "\u25c0 pit"));
    if (isSpurious) tags.append(make("span", { class: "tag" }, "\u26a0 spurious step"));
    if (step) {
      if (step.advantage !== null) {
        item.style.setProperty("--shade", String(Math.round(Math.min(1, Math.abs(step.advantage)) * 450) / 1000));
        item.classList.add(step.advantage < 0 ? "lowers" : "raises");
      }
      line.append(creditOf(step));
      if (step.rollouts) {
        const [button, place] = rolloutsOf(t, number, step);
        line.append(tags, button, place);
      } else line.append(tags);
    } else if (tags.children.length) line.append(tags);
    list.append(item);
  });
  return list;
}

function verdictOf(t) {
  const right = isRight(t);
  return make("span", { class: right ? "verdict right" : "verdict wrong" }, right ? "\u2713 right" : `\u2717 ${reasonName(reasonOf(t))}`);
}

/** A pair: both branches and how training changed them. */
function pairOf(pair) {
  const name = pair.stage === "step_dpo" ? "Per-step DPO" : "DPO";
  const where = pair.pit >= 0 ? ` at step ${pair.pit + 1}` : "";
  const trunk = pair.trunk && pair.pit > 0
    ? make("details", {}, make("summary", {}, `Trunk: the problem and ${pair.pit === 1 ? "step 1" : `steps 1\u2013${pair.pit}`}`),
      put(make("div", { class: "text" }), tidy(pair.trunk)))
    : make("p", { class: "dim" }, "Trunk: the problem alone.");
  const branch = (title, kind, text) => make("div", { class: `branch ${kind}` }, make("h4", {}, title),
    put(make("div", { class: "text" }), tidy(text) || "(ends here)"));
  const box = make("section", { class: "pair" },
    make("h3", {}, `${name}${where} `, make("span", { class: "dim" }, `${pair.mode}, label flipped with probability ${plain(pair.flip)}`)),
    trunk,
    make("div", { class: "branches" }, branch("\u25b2 chosen", "up", pair.chosen), branch("\u25bc rejected", "down", pair.rejected)));
  if (pair.chosenLogp === null) {
    box.append(make("p", { class: "dim" }, "Its log-probs after training are not recorded."));
    return box;
  }
  const [c0, c1] = pair.chosenLogp;
  const [r0, r1] = pair.rejectedLogp;
  const row = (title, before, after) => make("tr", {}, make("th", { scope: "row" }, title),
    make("td", {}, plain(before)), make("td", {}, plain(after)), make("td", {}, signed(after - before)));
  box.append(make("table", { class: "logps" },
    make("thead", {}, make("tr", {}, make("td", {}), ...["before", "after", "change"].map((title) => make("th", { scope: "col" }, title)))),
    make("tbody", {}, row("log p chosen", c0, c1), row("log p rejected", r0, r1), row("chosen \u2212 rejected", c0 - r0, c1 - r1))));
  box.append(make("p", { class: "dim" }, "In nats, under the SFT policy and after training; the change in the last row is the margin."));
  return box;
}

/** One trace as a card. */
function card(t, parts, beside) {
  const trace = traceOf(t);
  const problem = problemOf(t);
  const answer = trace.extracted === null ? "no answer" : `answer ${trace.extracted}`;
  const box = make("article", { "data-trace": trace.id },
    make("header", {}, make("h2", {}, sourceOf(t)), verdictOf(t),
      make("span", { class: "answers" }, answer, make("span", { class: "dim" }, `, gold ${problem.gold}`)),
      beside));
  if (trace.finish === "length") box.append(make("p", { class: "dim" }, "Cut off at the length limit."));
  if (COLUMNS.flags[t] & FLAG.wrongSolvable) {
    box.append(make("p", { class: "odds" }, "Q and verdict disagree: wrong, but at least half of the rollouts from its last step but one are right."));
  }
  if (COLUMNS.flags[t] & FLAG.rightDoubtful) {
    box.append(make("p", { class: "odds" }, "Q and verdict disagree: right, but fewer than half of the rollouts from its last step but one are."));
  }
  box.append(stepsOf(t, parts));
  if (trace.credit && !isRight(t) && COLUMNS.pit[t] < 0) box.append(make("p", { class: "dim" }, "The rule finds no pit here."));
  box.append(make("p", { class: "id" }, make("code", {}, trace.id)));
  const pairs = COLUMNS.flags[t] & FLAG.paired ? detailsOf(t).pairs : [];
  if (pairs.length) box.append(...pairs.map(pairOf));
  else if (trace.credit) box.append(make("p", { class: "dim" }, "This trace gave no pair."));
  return box;
}

/** The first step that differs between two traces, -1 for none. */
function partsAt(t, other) {
  const [a, b] = [traceOf(t).steps, traceOf(other).steps];
  for (let s = 0; s < Math.max(a.length, b.length); s += 1) if (a[s] !== b[s]) return s;
  return -1;
}

/** The menu of other traces of the same problem. */
function picker(t, other, pick) {
  const select = make("select", { id: "beside", onchange: () => pick(select.value === "" ? -1 : Number(select.value)) },
    make("option", { value: "" }, "nothing"));
  for (const sibling of siblingsOf(t)) {
    if (sibling === t) continue;
    const mark = isRight(sibling) ? "\u2713" : "\u2717";
    select.append(make("option", { value: String(sibling), selected: sibling === other },
      `${mark} ${sourceOf(sibling)}${INDEX.tested.includes(COLUMNS.source[sibling]) ? "" : ` ${idOf(sibling).split("/").pop()}`}`));
  }
  return select.options.length > 1 ? make("label", {}, "Compare with ", select) : null;
}

function legend() {
  const under = INDEX.bestOf > 1 ? ` under Best-of-${INDEX.bestOf}` : "";
  const term = (name, text) => [make("dt", {}, name), make("dd", {}, text)];
  return make("details", { class: "legend" }, make("summary", {}, "How to read this"), make("dl", {},
    ...term("Q", `of a step: the probability that the SFT policy reaches the right answer from the end of that step${under}. `
      + "Estimated from rollouts; for the last step, the verdict. The dot is the share of right rollouts, the bar its 95 % interval (Wilson)."),
    ...term("\u25b2 \u25bc", "the step's advantage: its Q minus the previous Q; for the first step, minus the value of the problem alone. "
      + "Blue raises Q, orange lowers it; a stronger colour means a larger change."),
    ...term("\u25c0 pit", `the step to blame for a wrong answer, by the rule ${INDEX.pitRule}.`),
    ...term("\u26a0 spurious", "the step of a right trace that lowered Q most."),
    ...term("Disagreement", "Q and verdict disagree if a trace is wrong but at least half of the rollouts from its last step but one are right, "
      + "or right but fewer than half are. Policies differ if one trained policy answers a test problem right and another does not."),
    ...term("Keys", "/ searches, j and k move, Enter opens, Escape goes back to the list.")));
}
