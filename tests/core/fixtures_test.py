"""The preference losses on a table of numbers worked out elsewhere, once, without JAX or numpy.

The expected values were computed with Python's `decimal` at 50 digits from the published equations,
and rounded to 20 digits. With e = Decimal.exp, ln = Decimal.ln and the columns as exact decimals
(all are also exact in float32):

  h         = (chosen - ref_chosen) - (rejected - ref_rejected)
  logsig(x) = -ln(1 + e(-x))
  dpo       = -logsig(β h)                                  https://arxiv.org/abs/2305.18290, eq. 7
  cdpo      = -(1 - ε) logsig(β h) - ε logsig(-β h)         ε = 1/8
  ipo       = (h - 1/(2 τ))²                                https://arxiv.org/abs/2310.12036, eq. 17
                                                            τ = 1/8
  dpop      = -logsig(β (h - λ max(0, ref_chosen - chosen)))
                                                            https://arxiv.org/abs/2402.13228, eq. 3
                                                            λ = 5

with β = 1/4. GRADIENTS has the derivatives by the chosen's log-prob, by the same arithmetic from

  s = 1 / (1 + e(β h)):   dpo -β s,   cdpo -β (s - ε),   ipo 2 (h - 1/(2 τ)),
  s' = 1 / (1 + e(β (h - λ max(0, ref_chosen - chosen)))):
  dpop -β s' (1 + λ [chosen < ref_chosen]).
"""

import functools

import jax
import numpy as np
from absl.testing import absltest, parameterized

from synthneg_jax.core import losses

BETA, EPSILON, TAU, PENALTY = 0.25, 0.125, 0.125, 5.0
LOSSES = {
  "dpo": functools.partial(losses.dpo_loss, beta=BETA),
  "cdpo": functools.partial(losses.dpo_loss, beta=BETA, label_smoothing=EPSILON),
  "ipo": functools.partial(losses.ipo_loss, tau=TAU),
  "dpop": functools.partial(losses.dpop_loss, beta=BETA, penalty=PENALTY),
}

# Rows of (chosen, rejected, ref_chosen, ref_rejected): level with the reference; both fall, the
# rejected by more; only the chosen falls; both rise, the rejected by more; far on the right side;
# far on the wrong side, where exp overflows float32; the margin that IPO asks for.
TABLE = (
  (-12.5, -20.25, -12.5, -20.25),
  (-14.0, -30.0, -12.5, -20.25),
  (-18.75, -20.25, -12.5, -20.25),
  (-10.0, -4.5, -12.5, -20.25),
  (-3.0, -180.0, -12.5, -20.25),
  (-412.5, -20.25, -12.5, -20.25),
  (-10.5, -22.25, -12.5, -20.25),
)
VALUES = {
  "dpo": (
    0.69314718055994530942,
    0.11967966518987717935,
    1.7527991403795558949,
    3.3482772888064631626,
    4.2064403475338527880e-19,
    100.0,
    0.31326168751822283405,
  ),
  "cdpo": (
    0.69314718055994530942,
    0.37749216518987717935,
    1.5574866403795558949,
    2.9342147888064631626,
    5.2890625000000000004,
    87.5,
    0.43826168751822283405,
  ),
  "ipo": (16.0, 18.0625, 105.0625, 297.5625, 27307.5625, 163216.0, 0.0),
  "dpop": (
    0.69314718055994530942,
    0.60378528955559474826,
    9.3750848146383833389,
    3.3482772888064631626,
    4.2064403475338527880e-19,
    600.0,
    0.31326168751822283405,
  ),
}
GRADIENTS = {
  "dpo": (
    -0.125,
    -0.028198851570723303964,
    -0.20667794851766835427,
    -0.24121378839980168409,
    -1.0516100868834631968e-19,
    -0.25,
    -0.067235355342498780187,
  ),
  "cdpo": (
    -0.09375,
    0.0030511484292766960358,
    -0.17542794851766835427,
    -0.20996378839980168409,
    0.031249999999999999895,
    -0.21875,
    -0.035985355342498780187,
  ),
  "ipo": (-8.0, 8.5, -20.5, -34.5, 330.5, -808.0, 0.0),
  "dpop": (
    -0.125,
    -0.67989277202307920023,
    -1.4998727834374146289,
    -0.24121378839980168409,
    -1.0516100868834631968e-19,
    -1.5,
    -0.067235355342498780187,
  ),
}
# In float32 a βh of 40 is exact, but σ and log round; near 0 cdpo's gradient is a difference of
# larger numbers.
TOLERANCE = {"float64": {"rtol": 1e-13, "atol": 0.0}, "float32": {"rtol": 2e-6, "atol": 1e-8}}
CASES = [(f"{name}_{dtype}", name, dtype) for name in LOSSES for dtype in TOLERANCE]


def columns(dtype: str):
  return [np.array(column, dtype) for column in zip(*TABLE, strict=True)]


class FixturesTest(parameterized.TestCase):
  @parameterized.named_parameters(*CASES)
  def test_values(self, name, dtype):
    # Fails if an equation of core/losses.py changes in a sign, a factor, or the place of β, ε, τ or
    # λ.
    with jax.enable_x64(dtype == "float64"):
      got = jax.jit(LOSSES[name])(*columns(dtype))
    self.assertEqual(got.dtype, np.dtype(dtype))
    np.testing.assert_allclose(got, VALUES[name], **(TOLERANCE[dtype] | {"atol": 0.0}))

  @parameterized.named_parameters(*CASES)
  def test_gradients(self, name, dtype):
    # Fails if a gradient is not its equation's: a stop_gradient too many, another side of DPOP's
    # kink (the first and the last row stand on it or above it), or a guard against overflow that
    # cuts gradients.
    with jax.enable_x64(dtype == "float64"):
      got = jax.jit(jax.grad(lambda *args: LOSSES[name](*args).sum()))(*columns(dtype))
    np.testing.assert_allclose(got, GRADIENTS[name], **TOLERANCE[dtype])


if __name__ == "__main__":
  absltest.main()
