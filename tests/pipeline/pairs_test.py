"""Pairs of every mode, built from hand-made traces and counts."""

import math
import shutil
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest

from synthneg_jax.core.tree import Branch
from synthneg_jax.data.credited_traces import by_problem
from synthneg_jax.data.records import Problem, Rollout, Shards, StepEstimate, Trace
from synthneg_jax.data.token_text import step_ends
from synthneg_jax.decoding.policy import EMBEDDED, Policy
from synthneg_jax.pipeline import pairs, rft
from synthneg_jax.pipeline.experiment import Experiment
from synthneg_jax.runtime import config_schema
from synthneg_jax.runtime.errors import UserError
from tests import tiny_model

PROMPT = " J= 4 A= 4 L: A-J D: A+L ? D=\n"
FIRST, SECOND, DETOUR = (
  " L: A-J A= 4 J= 4 L= 0\n",
  " D: A+L A= 4 L= 0 D= 4\n",
  (" C: D-J D= 4 J= 4 C= 0\n"),
)
WRONG_FIRST, WRONG_SECOND = " L: A+J A= 4 J= 4 L= 8\n", " D: A-L A= 4 L= 0 D= 5\n"
RIGHT, WRONG, OTHER = " #### 4", " #### 5", " #### 8"
# Traces of one problem, with the number of successes in 4 rollouts after each step but the last.
TRACES = (
  ("wrong", (FIRST, WRONG_SECOND, WRONG), (3, 0)),
  ("wrong", (WRONG_FIRST, SECOND, OTHER), (1, 0)),
  ("right", (FIRST, DETOUR, SECOND, RIGHT), (3, 1, 4)),
  ("right", (FIRST, SECOND, RIGHT), (3, 4)),
  ("no_answer", (FIRST,), ()),
)
# The rollouts after FIRST, of which three in four are right.
AFTER_FIRST = (
  (True, (SECOND, RIGHT), -0.5, -3.0),
  (False, (WRONG_SECOND, WRONG), -1.0, -2.0),
  (True, (DETOUR, RIGHT), -2.0, -2.5),
  (True, (SECOND, RIGHT), -0.5, -3.0),
)


class BuildTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    config = config_schema.default()
    cls.policy = Policy.load(EMBEDDED, config.model, tiny_model.one_device_mesh())
    cls.experiment = Experiment.open(config, cls.enterClassContext(tempfile.TemporaryDirectory()))
    eos = cls.policy.tokenizer.eos_token_id

    def encode(lines):
      return cls.policy.tokenizer.encode("".join(lines), add_special_tokens=False)

    def ends(ids):
      return step_ends(ids, cls.policy.token_text)

    cls.eos = eos
    problem = Problem("p", PROMPT, "".join((FIRST, SECOND, RIGHT)), "4", "test")
    traces, estimates = [], []
    for index, (reason, lines, counts) in enumerate(TRACES):
      ids, correct = [*encode(lines), eos], reason == "right"
      key = f"p/sample/{index}"
      logps = [-0.25] * len(ids)
      traces.append(
        Trace(
          key,
          "p",
          index,
          ids,
          ends(ids),
          "".join(lines),
          correct,
          reason,
          None,
          "eos",
          logps,
          logps,
          "f" * 16,
        )
      )
      for step, end in enumerate(ends(ids) if counts else []):
        last = step == len(counts)
        holder = "p/sample/0/0" if step == 0 and lines[0] == FIRST else f"{key}/{step}"
        samples = []
        if holder == "p/sample/0/0" == f"{key}/{step}":
          samples = [
            vars(Rollout([*encode(after), eos], right, "right" if right else "wrong", "eos", *logp))
            for right, after, *logp in AFTER_FIRST
          ]
        estimates.append(
          StepEstimate(
            key,
            "p",
            step,
            end,
            *((0, 0) if last else (4, counts[step])),
            last,
            last and correct,
            samples,
            holder,
          )
        )
    tokenizer = cls.experiment.workdir / "sft" / "policy"
    tokenizer.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
      shutil.copy(EMBEDDED / name, tokenizer / name)
    for name, kind, records in (
      ("synthesize/train", Problem, [problem]),
      ("sample/traces", Trace, traces),
      ("credit/estimates", StepEstimate, estimates),
    ):
      Shards(cls.experiment.workdir / name, kind).write(records)

  def build(self, mode, best_of=1, **settings):
    """Returns (rows, pairs, figures).

    A row is (last character of the trace id, trunk after the prompt, chosen, rejected, pit), texts
    without EOS.
    """
    config = self.experiment.config.copy_and_resolve_references()
    config.credit.best_of = best_of
    config.pairs.update(**settings)
    records, figures = pairs.build(
      Experiment(config, self.experiment.workdir, self.experiment.mesh), mode
    )

    def text(ids):
      return self.policy.token_text.text([i for i in ids if i != self.eos])

    rows = []
    for pair in records:
      prompt, end, trunk = text(pair.trunk).partition(" D=\n")
      self.assertEqual((prompt + end, pair.pair_mode), (PROMPT, mode))
      rows.append((pair.trace_id[-1], trunk, text(pair.chosen), text(pair.rejected), pair.pit))
    return rows, records, figures

  def test_algorithm1(self):
    # Fails if the pit is another step, if a right trace gives a pair, if the chosen branch is not
    # the teacher's solution with EOS, or if the pit is compared with other counts than those before
    # it.
    rows, records, figures = self.build("algorithm1")
    solution = FIRST + SECOND + RIGHT
    self.assertEqual(
      rows,
      [("0", "", solution, FIRST + WRONG_SECOND, 1), ("1", "", solution, WRONG_FIRST + SECOND, 1)],
    )
    self.assertEqual([pair.chosen[-1] for pair in records], [self.eos] * 2)
    self.assertNotIn(self.eos, records[0].rejected)
    flips = [
      pairs.core.flip_probability(pairs.core.Count(0, 4), pairs.core.Count(c, 4)) for c in (3, 1)
    ]
    self.assertEqual([pair.p_flipped for pair in records], flips)
    self.assertEqual(
      (figures["pairs"], figures["dropped"]["without_pit"], figures["pits_by_step"]),
      (2, 0, {"1": 2}),
    )

  def test_the_prefix_is_protected(self):
    # Fails if a step before the pit is scored, if the pit is not, or if the pair differs from
    # algorithm 1's.
    rows, records, _ = self.build("prefix_protected")
    expected, unprotected, _ = self.build("algorithm1")
    self.assertEqual(rows, expected)

    def text(ids):
      return self.policy.token_text.text(ids)

    self.assertEqual(
      [text(pair.rejected[: pair.context]) for pair in records], [FIRST, WRONG_FIRST]
    )
    self.assertEqual(
      [text(pair.rejected[pair.context :]) for pair in records], [WRONG_SECOND, SECOND]
    )
    self.assertEqual({pair.context for pair in unprotected}, {0})
    self.assertEqual([pair.p_flipped for pair in records], [pair.p_flipped for pair in unprotected])

  def test_order(self):
    # Fails if the cap keeps another trace than the first by pairs.order, with ties in favour of the
    # earlier one. The drops of Q at the pits are 3/4 and 1/4.
    def first(**settings):
      return self.build("algorithm1", max_per_problem=1, **settings)[0][0][0]

    self.assertEqual(first(), "0")
    self.assertEqual(first(order="largest_drop"), "0")
    self.assertEqual(first(order="largest_drop", pit_rule="least_advantage", min_before=0.0), "0")
    self.assertEqual(first(order="likeliest"), "0")
    config, ranks = self.experiment.config.copy_and_resolve_references(), {}
    config.credit.best_of = 1
    for order in ("likeliest", "largest_drop"):
      config.pairs.order = order
      builder = pairs.Builder(Experiment(config, self.experiment.workdir, self.experiment.mesh))
      ranks[order] = [builder.rank(candidate) for candidate in builder.candidates("algorithm1")]
    self.assertEqual(ranks, {"likeliest": [0.25, 0.25], "largest_drop": [-0.75, -0.25]})
    (candidate, *_) = builder.candidates("algorithm1")
    with mock.patch.object(builder.credited, "count", lambda *_: pairs.core.Count(0, 0)):
      self.assertEqual(builder.rank(candidate), math.inf)  # of a step that nothing was drawn after

  def test_a_budget_of_pairs(self):
    # Fails if the budget is exceeded, if a smaller budget is not a subset, if the fraction of right
    # traces is wrong, or if a quota that cannot be met is filled with others.
    _, every, _ = self.build("positives_too", choice="majority")
    _, one, figures = self.build("positives_too", choice="majority", max_pairs=1)
    self.assertLen(one, 1)
    self.assertIn(one[0], every)
    self.assertEqual(figures["dropped"]["beyond_budget"], 1)
    for fraction, trace in ((0.0, "0"), (1.0, "2")):
      rows, _, _ = self.build(
        "positives_too", choice="majority", max_pairs=1, right_fraction=fraction
      )
      self.assertEqual([row[0] for row in rows], [trace])
    with self.assertRaisesRegex(UserError, "asks for 2 pairs from right traces, but only 1 exist"):
      self.build("positives_too", choice="majority", max_pairs=2, right_fraction=1.0)

  def test_shared_prefix(self):
    # Fails if rollouts come from another prefix or from a trace that does not hold them, if the
    # pit's own step is chosen, or if a trace whose prefix has no rollouts raises.
    rows, records, figures = self.build("shared_prefix", choice="majority")
    self.assertEqual(rows, [("0", FIRST, SECOND, WRONG_SECOND, 1)])
    self.assertEqual(
      records[0].p_flipped,
      pairs.core.flip_probability(pairs.core.Count(0, 4), pairs.core.Count(2, 2)),
    )
    self.assertEqual(figures["dropped"]["without_alternative"], 1)
    rows, _, _ = self.build("shared_prefix", choice="most_likely", continuation="rollout")
    self.assertEqual(rows, [("0", FIRST, DETOUR + RIGHT, WRONG_SECOND, 1)])

  def test_a_pit_at_the_start_is_held_against_the_traces(self):
    # Fails if step 0 has no siblings, or they are not the problem's traces. By advantage, step 0 is
    # the first pit of trace 1.
    rows, _, _ = self.build("shared_prefix", pit_rule="relative_drop", drop_ratio=1.0)
    self.assertIn(("1", "", FIRST, WRONG_FIRST, 0), rows)

  def test_positives_too(self):
    # Fails if right traces give no pair, if their rejected step is the one with the lowest value
    # (step 0 of r3) instead of the spurious one, if a right trace without a spurious step gives a
    # pair, or if the detour is chosen against itself.
    rows, _, figures = self.build("positives_too", choice="majority")
    self.assertEqual(rows, [("0", FIRST, SECOND, WRONG_SECOND, 1), ("2", FIRST, SECOND, DETOUR, 1)])
    self.assertEqual(figures["from_right_traces"], 1)
    self.assertLen(self.build("positives_too", choice="majority", spurious_below=-0.6)[0], 1)

  def test_random_step(self):
    # Fails if the step is always the pit or changes between runs, or if pairs do not share their
    # prefix.
    rejected_steps = {}
    for seed in range(12):
      self.experiment.config.seed = seed
      rows, _, _ = self.build("random_step", choice="majority")
      self.assertEqual(rows, self.build("random_step", choice="majority")[0])
      rejected_steps |= {(row[0], row[4]): row for row in rows}
    self.experiment.config.seed = 0
    # steps with rollouts that continue correctly in another way
    self.assertEqual(set(rejected_steps), {("0", 1), ("1", 0)})
    self.assertEqual(rejected_steps["1", 0], ("1", "", FIRST, WRONG_FIRST, 0))

  def cloned(self, **settings):
    """(trace, text of its scored tokens) of each response that RFT trains on."""
    config = self.experiment.config.copy_and_resolve_references()
    config.credit.best_of = 1
    config.rft.update(**settings)
    groups = by_problem(Shards(self.experiment.workdir / "sample/traces", Trace).read(), ["p"])
    chosen = rft._chosen(Experiment(config, self.experiment.workdir, self.experiment.mesh), groups)[
      "p"
    ]

    def scored(trace, mask):
      return [i for i, on in zip(trace.ids, mask or [True] * len(trace.ids), strict=True) if on]

    def text(ids):
      return self.policy.token_text.text([i for i in ids if i != self.eos])

    return {clone.trace.id[-1]: text(scored(clone.trace, clone.scored)) for clone in chosen}

  def test_responses_that_rft_learns(self):
    # Fails if wrong responses of high advantage are dropped (figure 11 keeps them), if right ones
    # with a step back are kept, if the filter does not rank by the lowest advantage, or if a mask
    # keeps a bad step.
    whole = {str(n): "".join(lines) for n, (_, lines, _) in enumerate(TRACES)}
    self.assertEqual(self.cloned(), {n: whole[n] for n in "23"})
    self.assertEqual(self.cloned(max_per_problem=1), {"2": whole["2"]})
    # Lowest advantages with V = 2/5: -.75, -.25, -.5 and 0.
    self.assertEqual(self.cloned(keep="advantage"), {n: whole[n] for n in "13"})
    self.assertEqual(set(self.cloned(keep="advantage", drop_fraction=0.25)), set("123"))
    self.assertEqual(self.cloned(keep="advantage", loss_mask="positive"), {"3": FIRST + SECOND})
    before = self.cloned(keep="advantage", loss_mask="before_negative", drop_fraction=0.0)
    self.assertEqual(before, {"0": FIRST, "2": FIRST, "3": whole["3"]})
    self.assertEqual(self.cloned(keep="spurious"), {"2": whole["2"]})
    self.assertEqual(self.cloned(keep="clean"), {"3": whole["3"]})

  def test_every_token_bears_its_steps_advantage(self):
    # Fails if a token gets the advantage of a neighbouring step, if wrong traces or steps back are
    # dropped, or if the next-token objective also carries advantages, which would split trees at
    # them.
    config = self.experiment.config.copy_and_resolve_references()
    config.credit.best_of = 1
    config.rft.update(keep="advantage", drop_fraction=0.0, objective="advantage_weighted")
    experiment = Experiment(config, self.experiment.workdir, self.experiment.mesh)
    groups = by_problem(Shards(self.experiment.workdir / "sample/traces", Trace).read(), ["p"])
    clones = rft._chosen(experiment, groups)["p"]
    self.assertEqual([clone.trace.id[-1] for clone in clones], list("0123"))
    values = {
      "0": (0.35, -0.75, 0.0),
      "1": (-0.15, -0.25, 0.0),
      "2": (0.35, -0.5, 0.75, 0.0),
      "3": (0.35, 0.25, 0.0),
    }
    for clone in clones:
      size = np.diff([0, *clone.trace.step_ends])
      expected = np.repeat(values[clone.trace.id[-1]], size)
      np.testing.assert_allclose(clone.advantage, expected, atol=1e-6)
      self.assertIsNone(clone.scored)
    config.rft.objective = "next_token"
    self.assertEqual({clone.advantage for clone in rft._chosen(experiment, groups)["p"]}, {None})

  def test_rft_learns_the_teachers_solution_too(self):
    # Fails if the teacher's solution is dropped for a problem without right samples.
    trace = by_problem(Shards(self.experiment.workdir / "sample/traces", Trace).read(), ["p"])["p"][
      3
    ]
    chosen = {"p": [rft._Clone(trace)], "q": [], "r": []}
    branches = rft._branches(chosen, {"p": [7, 8], "q": [9]}, {"p": 3, "q": 4, "r": 5}.get)
    self.assertEqual(branches["p"], [Branch(3, tuple(trace.ids)), Branch(3, (7, 8))])
    self.assertEqual((branches["q"], branches["r"]), ([Branch(4, (9,))], []))

  def test_arbitrary(self):
    # Fails if a right trace or one without an answer is rejected, or if a response is cut.
    rows, records, figures = self.build("arbitrary")
    solution = FIRST + SECOND + RIGHT
    expected = [(str(n), "", solution, "".join(TRACES[n][1]), -1) for n in (0, 1)]
    self.assertEqual(rows, expected)
    self.assertEqual([pair.rejected[-1] for pair in records], [self.eos] * 2)
    self.assertEqual(
      figures["dropped"], {"without_pit": 0, "without_alternative": 0, "too_long": 0}
    )
    self.assertNotIn("mean_flip", figures)

  def test_furthest(self):
    # Fails if right traces are not paired along with the teacher's solution, if a wrong one is used
    # twice, or if the variant is not the config's: no two of these differ by half of their total
    # length.
    rows, _, _ = self.build("furthest")
    self.assertEqual(
      [row[2] for row in rows], [FIRST + SECOND + RIGHT, FIRST + DETOUR + SECOND + RIGHT]
    )
    self.assertEqual({row[3] for row in rows}, {"".join(TRACES[n][1]) for n in (0, 1)})
    self.assertEqual(self.build("furthest", furthest="shortest_far")[0], [])

  def test_filters(self):
    # Fails if the cap or the maximum flip probability is not the config's.
    self.assertLen(self.build("algorithm1", max_per_problem=1)[0], 1)
    rows, _, figures = self.build("algorithm1", max_flip=0.1)
    self.assertEqual([row[0] for row in rows], ["0"])
    self.assertEqual(figures["dropped"]["doubtful"], 1)

  def test_pairs_beyond_the_row_are_counted_and_left_out(self):
    # Fails if a pair too long for a training row is written, which would break dpo, or is not
    # counted.
    _, records, figures = self.build("algorithm1")
    sizes = sorted(len(pair.trunk) + len(pair.chosen) + len(pair.rejected) for pair in records)
    self.assertEqual((len(sizes), figures["dropped"]["too_long"]), (2, 0))
    before = self.experiment.config.dpo.row_length
    self.experiment.config.dpo.row_length = sizes[-1] - 1
    _, records, figures = self.build("algorithm1")
    self.experiment.config.dpo.row_length = before
    kept = [size for size in sizes if size < sizes[-1]]
    self.assertEqual((len(records), figures["dropped"]["too_long"]), (len(kept), 2 - len(kept)))

  def test_best_of_k_needs_k_rollouts(self):
    # Fails if a step with fewer than k rollouts counts as known: only the answer step is known
    # then.
    rows, _, _ = self.build("algorithm1", best_of=5)
    self.assertEqual([row[4] for row in rows], [2, 2])


if __name__ == "__main__":
  absltest.main()
