"""The tree of a written answer: what the grammar makes and the other answer modules read."""

import fractions
from typing import NamedTuple

FUNCTIONS = frozenset(
  "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth log ln lg exp gcd lcm max min "
  "floor ceil abs sqrt cbrt sgn asin acos atan cis".split()
)
CONSTANTS = {"pi": "pi", "infty": "oo", "infinity": "oo", "inf": "oo", "oo": "oo", "Infinity": "oo", "e": "e", "i": "i"}
GREEK = frozenset(
  "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon "
  "phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar angle triangle "
  "square star top".split()
)


class Node(NamedTuple):
  """op: num, sym, text, add, mul, div, pow, neg, pm, mp, root, call, fact, binom, percent, degree, base, ratio,
  time, bracket (open sign, items, close sign), set, list (join, items), union, intersection, minus, matrix (rows), rel
  (operands and signs in turn), quantity (value, Unit), mod, opaque (text that no rule reads); args: leaves' values
  or nodes."""

  op: str
  args: tuple


def num(value) -> Node:
  """A rational as a leaf."""
  return Node("num", (fractions.Fraction(value),))


def sym(name: str) -> Node:
  """A symbol as a leaf."""
  return Node("sym", (name,))
