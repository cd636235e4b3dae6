"""Builds D_syn with a capable model: new problems from seed problems, with majority-vote answers.

docs/synthesis.md explains the steps.
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
  """Builds D_syn; replies are cached on disk, so a repeated run costs nothing."""

  def __init__(self, experiment: Experiment, templates: synthesis.Templates):
    self._config, self._section = experiment.config, experiment.config.synthesis
    self._templates = templates
    self._raw = problems.prompt_style(experiment.config.task) == "raw"
    self._tested = problems.test_texts(experiment.config.task, experiment.config.seed)
    self._teacher = teacher_backends.Teacher(experiment)
    self._source = f"{self._teacher.model} ({self._section.provider})"

  def run(self) -> tuple[problems.Splits, list[Candidate]]:
    """Asks for problems, solutions or both.

    Returns:
      (the problems kept, with the task's test problems; all candidates).

    Raises:
      UserError: too few problems are kept, or as `Teacher.ask`.
    """
    section, c = self._section, self._config
    if section.generate == "solutions":
      chosen = problems.choose_splits(c.task, c.seed)
      candidates = self._solve(chosen.train)
    else:
      chosen = self._seeds()
      seeds = [problem.prompt for problem in chosen.train]
      candidates = self._balanced(self._new_problems(seeds))
    kept = [candidate for candidate in candidates if candidate.outcome == "kept"]
    outcomes = _outcomes(candidates)
    if not kept:
      raise UserError(
        f"{self._source} solved none of {len(candidates)} problems ({outcomes}); its replies are "
        "kept."
      )
    difficulties = collections.Counter(candidate.difficulty for candidate in kept)
    figures = {
      **chosen.figures,
      "candidates": len(candidates),
      "outcomes": outcomes,
      "mean_agreement": round(float(np.mean([candidate.agreement for candidate in kept])), 4),
      "difficulty": {str(d): n for d, n in sorted(difficulties.items())},
      "asked": self._teacher.asked,
      "tokens": self._teacher.tokens,
      "spent_usd": round(self._teacher.spent_usd, 6),
    }
    train = []
    for candidate in kept:
      solution = candidate.solutions[candidate.chosen]["text"]
      train.append(
        Problem(candidate.id, candidate.prompt, solution, candidate.answer, self._source)
      )
    return problems.Splits(train, chosen.test, figures, chosen.report), candidates

  def _balanced(self, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Marks kept candidates beyond task.train_problems as surplus, balanced over difficulties."""
    wanted = self._config.task.train_problems
    kept = [candidate for candidate in candidates if candidate.outcome == "kept"]
    if len(kept) < wanted:
      raise UserError(
        f"After synthesis.max_rounds={self._section.max_rounds} rounds {len(kept)} problems of "
        f"task.train_problems={wanted} are kept ({_outcomes(candidates)}). Replies are kept: raise "
        "max_rounds, or change the prompts."
      )
    balanced = synthesis.balance([candidate.difficulty for candidate in kept], wanted)
    surplus = {candidate.id for candidate in kept} - {kept[i].id for i in balanced}
    return [
      dataclasses.replace(candidate, outcome="surplus") if candidate.id in surplus else candidate
      for candidate in candidates
    ]

  def _seeds(self) -> problems.Splits:
    """The task's problems, with synthesis.seed_problems training problems."""
    task = ConfigDict(self._config.task)
    task.train_problems = self._section.seed_problems
    try:
      return problems.choose_splits(task, self._config.seed)
    except UserError as error:
      raise UserError(
        str(error).replace("task.train_problems", "synthesis.seed_problems")
      ) from error

  def _new_problems(self, seeds: Sequence[str]) -> list[Candidate]:
    """Asks for new problems with solutions, in rounds, until enough are kept."""
    section, c = self._section, self._config
    near_duplicates = synthesis.NearDuplicates(section.near_duplicate)
    for seed in seeds:
      near_duplicates.add(seed)
    wanted = math.ceil(c.task.train_problems * section.surplus)
    candidates, num_requests, num_kept = [], 0, 0
    for _ in range(section.max_rounds):
      requests = []
      num_new = max(math.ceil((wanted - num_kept) / section.new_per_request), 0)
      for number in range(num_requests, num_requests + num_new):
        # a function of seed and number, so a rerun repeats the request and finds the cached reply
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
      num_requests += len(requests)
      replies = self._teacher.generate("problems", requests)
      texts = [
        prompt
        for request in requests
        if request.key in replies
        for prompt in synthesis.read_problems(replies[request.key].text, self._raw)
      ]
      contaminated = self._contaminated(texts)
      fresh = []
      for i, prompt in enumerate(texts):
        name = f"synthetic/{hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()}"
        outcome = None
        if i in contaminated:
          outcome = "contaminated"
        elif not near_duplicates.add(prompt):
          outcome = "near_duplicate"
        if outcome:
          rejected_id = f"{name}/{len(candidates)}"
          candidates.append(Candidate(rejected_id, prompt, "", 0.0, 0, -1, [], outcome))
        else:
          fresh.append(Problem(name, prompt, "", "", ""))
      solved = self._solve(fresh)
      candidates += solved
      num_kept += sum(candidate.outcome == "kept" for candidate in solved)
    return candidates

  def _contaminated(self, texts: Sequence[str]) -> set[int]:
    """Indices of texts that equal a test problem or share an n-gram of words with one."""
    tested, ngram = set(self._tested), self._config.task.decontaminate_ngram
    contaminated = {i for i, text in enumerate(texts) if text in tested}
    if ngram:
      overlaps = decontamination.overlaps(texts, self._tested, ngram)
      contaminated |= {overlap.index for overlap in overlaps}
    return contaminated

  def _solve(self, unsolved: Sequence[Problem]) -> list[Candidate]:
    """Asks for solutions and takes a majority vote, restricted to the known answer if any."""
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
      for problem in unsolved
    }
    replies = self._teacher.generate(
      "solutions", [request for group in requests.values() for request in group]
    )
    candidates = []
    for problem in unsolved:
      records, solutions = [], []
      for request in requests[problem.id]:
        reply = replies.get(request.key)
        solution = None
        if reply and reply.finish != "length":
          solution = synthesis.read_solution(reply.text, self._raw, kind)
        solutions.append(solution)
        records.append(
          {
            "text": solution[0] if solution else reply.text if reply else "",
            "answer": solution[1] if solution else None,
            "finish": reply.finish if reply else "failed",
            "reply": request.key,
          }
        )
      vote = synthesis.vote(solutions, problem.answer or None, kind)
      kept = vote is not None and vote.agreement >= section.min_agreement
      candidates.append(
        Candidate(
          id=problem.id,
          prompt=problem.prompt,
          answer=vote.answer if vote else problem.answer,
          agreement=round(vote.agreement, 4) if vote else 0.0,
          difficulty=vote.difficulty if vote else 0,
          chosen=vote.chosen if vote else -1,
          solutions=records,
          outcome="kept" if kept else "unsolved",
        )
      )
    return candidates


def _outcomes(candidates: Sequence[Candidate]) -> dict[str, int]:
  """Number of candidates by outcome, most frequent first."""
  return dict(collections.Counter(candidate.outcome for candidate in candidates).most_common())
