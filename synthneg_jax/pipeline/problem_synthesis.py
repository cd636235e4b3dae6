"""D_syn from a capable model: new problems from seed problems, several worked solutions of each,
the majority's answer.

docs/synthesis.md walks through it.
"""

import collections
import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from synthneg_jax.data import decontamination
from synthneg_jax.data.records import Candidate, Problem
from synthneg_jax.pipeline import teacher_backends
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime.errors import UserError
from synthneg_jax.tasks import problems
from synthneg_jax.teacher import synthesis


class Synthesis:
  """One walk from seed problems to D_syn; all that it draws on is kept on disk, so that it can be
  walked again for nothing.
  """

  def __init__(self, experiment: Experiment, templates: synthesis.Templates):
    self._config, self._section, self._templates = (
      experiment.config,
      experiment.config.synthesis,
      templates,
    )
    self._raw = problems.prompt_style(experiment.config.task) == "raw"
    self._tested = problems.test_texts(experiment.config.task, experiment.config.seed)
    self._teacher = teacher_backends.Teacher(experiment)
    self._source = f"{self._teacher.model} ({self._section.provider})"

  def run(self) -> tuple[problems.Chosen, list[Candidate]]:
    """(problems kept, with the task's test problems; everything considered)."""
    section, c = self._section, self._config
    if section.generate == "solutions":
      chosen = problems.choose(c.task, c.seed)
      written = self._solved(chosen.train)
      kept = [candidate for candidate in written if candidate.outcome == "kept"]
    else:
      chosen = self._seeds()
      written = self._new([problem.prompt for problem in chosen.train])
      kept = [candidate for candidate in written if candidate.outcome == "kept"]
      if len(kept) < c.task.train_problems:
        outcomes = dict(collections.Counter(candidate.outcome for candidate in written))
        raise UserError(
          f"After synthesis.max_rounds={section.max_rounds} rounds {len(kept)} problems of "
          "task.train_problems="
          f"{c.task.train_problems} are kept ({outcomes}). Replies are kept: raise max_rounds, or "
          "take other prompts."
        )
      balanced = set(
        synthesis.balance([candidate.difficulty for candidate in kept], c.task.train_problems)
      )
      surplus = {candidate.id for i, candidate in enumerate(kept) if i not in balanced}
      kept = [candidate for i, candidate in enumerate(kept) if i in balanced]
      written = [
        dataclasses.replace(w, outcome="surplus") if w.id in surplus else w for w in written
      ]
    outcomes = dict(collections.Counter(candidate.outcome for candidate in written).most_common())
    if not kept:
      raise UserError(
        f"{self._source} solved none of {len(written)} problems ({outcomes}); its replies are kept."
      )
    figures = {
      **chosen.figures,
      "candidates": len(written),
      "outcomes": outcomes,
      "mean_agreement": round(float(np.mean([candidate.agreement for candidate in kept])), 4),
      "difficulty": {
        str(d): n for d, n in sorted(collections.Counter(w.difficulty for w in kept).items())
      },
      "asked": self._teacher.asked,
      "tokens": self._teacher.tokens,
      "spent_usd": round(self._teacher.spent_usd, 6),
    }

    def as_problem(w):
      return Problem(w.id, w.prompt, w.solutions[w.chosen]["text"], w.answer, self._source)

    return problems.Chosen(
      [as_problem(w) for w in kept], chosen.test, figures, chosen.report
    ), written

  def _seeds(self) -> problems.Chosen:
    """The task's problems with synthesis.seed_problems of them to train on."""
    task = ConfigDict(self._config.task)
    task.train_problems = self._section.seed_problems
    try:
      return problems.choose(task, self._config.seed)
    except UserError as error:
      raise UserError(
        str(error).replace("task.train_problems", "synthesis.seed_problems")
      ) from error

  def _new(self, seeds: Sequence[str]) -> list[Candidate]:
    """Rounds of new problems with solutions, until there are enough."""
    section, c = self._section, self._config
    far = synthesis.NearDuplicates(section.near_duplicate)
    for seed in seeds:
      far.add(seed)
    wanted = math.ceil(c.task.train_problems * section.surplus)
    written, asked, count = [], 0, 0
    for _ in range(section.max_rounds):
      requests = []
      for number in range(
        asked, asked + max(math.ceil((wanted - count) / section.new_per_request), 0)
      ):
        # A request is a function of seed and number: a rerun asks the same, and finds the reply on
        # disk.
        rng = np.random.default_rng([c.seed, number])
        shown = rng.choice(
          len(seeds), size=min(section.seeds_per_request, len(seeds)), replace=False
        )
        text = self._templates.ask_problems([seeds[i] for i in shown], section.new_per_request)
        requests.append(
          self._teacher.request("problems", text, number, section.temperature_problems)
        )
      if not requests:
        break
      asked += len(requests)
      replies = self._teacher.ask("problems", requests)
      texts = [
        prompt
        for request in requests
        if request.key in replies
        for prompt in synthesis.read_problems(replies[request.key].text, self._raw)
      ]
      tested = set(self._tested)
      overlaps = (
        decontamination.overlaps(texts, self._tested, c.task.decontaminate_ngram)
        if c.task.decontaminate_ngram
        else []
      )
      contaminated = {found.index for found in overlaps} | {
        i for i, text in enumerate(texts) if text in tested
      }
      fresh = []
      for i, prompt in enumerate(texts):
        name = f"synthetic/{hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()}"
        if i in contaminated:
          written.append(
            Candidate(f"{name}/{len(written)}", prompt, "", 0.0, 0, -1, [], "contaminated")
          )
        elif not far.add(prompt):
          written.append(
            Candidate(f"{name}/{len(written)}", prompt, "", 0.0, 0, -1, [], "near_duplicate")
          )
        else:
          fresh.append(Problem(name, prompt, "", "", ""))
      solved = self._solved(fresh)
      written += solved
      count += sum(candidate.outcome == "kept" for candidate in solved)
    return written

  def _solved(self, given: Sequence[Problem]) -> list[Candidate]:
    """Asks for solutions and lets them vote; a problem with a known answer is held to it."""
    section, kind = self._section, self._config.task.answers
    requests = {
      problem.id: [
        self._teacher.request(
          "solution",
          self._templates.ask_solution(problem.prompt),
          index,
          section.temperature_solutions,
        )
        for index in range(section.num_solutions)
      ]
      for problem in given
    }
    replies = self._teacher.ask(
      "solutions", [request for group in requests.values() for request in group]
    )
    made = []
    for problem in given:
      texts, read = [], []
      for request in requests[problem.id]:
        reply = replies.get(request.key)
        whole = reply is not None and reply.finish != "length"
        solution = synthesis.read_solution(reply.text, self._raw, kind) if whole else None
        read.append(solution)
        texts.append(
          {
            "text": solution[0] if solution else reply.text if reply else "",
            "answer": solution[1] if solution else None,
            "finish": reply.finish if reply else "failed",
            "reply": request.key,
          }
        )
      vote = synthesis.vote(read, problem.answer or None, kind)
      kept = vote is not None and vote.agreement >= section.min_agreement
      made.append(
        Candidate(
          id=problem.id,
          prompt=problem.prompt,
          answer=vote.answer if vote else problem.answer,
          agreement=round(vote.agreement, 4) if vote else 0.0,
          difficulty=vote.difficulty if vote else 0,
          chosen=vote.chosen if vote else -1,
          solutions=texts,
          outcome="kept" if kept else "unsolved",
        )
      )
    return made
