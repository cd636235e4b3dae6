"""Generates hostile answers: too large, too deep, too long, unclosed or strange."""

import random
from collections.abc import Iterator

_ATOMS = (
  "1 9 0 x y e i \\pi \\infty 10^{10^{10}} 9**9**9 9^{9^{9^9}} 1e999999999 1e-999999999 1e1000 "
  "99999! (10^6)! 3!!!!! \\sqrt{-1} 0/0 1/0 0^0 \\frac{1}{0} \\binom{10^9}{5} \\gcd(1,0) \\log 0 "
  "\\tan\\frac{\\pi}{2} \\sin(10^{100}) x^{x^{x^x}} \\begin{pmatrix}1&2\\\\3\\end{pmatrix} "
  "\\text{a} \\lfloor x \\rfloor |x| \\{1\\} (1,2] 1:0 0:0 5\\% 30^\\circ \\pm1 7_2 "
  "2^{-10^9} (1/3)^{10^7} \\sqrt[10^9]{2} \\sqrt[0]{2} \\arcsin 5 \\exp(10^9) \\ln(-1) i^i "
  "0.\\overline{9} __import__('os').system('id') eval(1) lambda:0 x.__class__ {{7*7}} %s%n ${IFS} "
  "`id` sympy.S(1) \\input{/etc/passwd} \\write18{id} \\catcode \\def\\x{\\x}\\x"
).split()
_JOINTS = [
  "+", "-", "*", "/", "^", "_", "!", ",", ";", "=", "<", ">", "\\le", "\\cup", "\\in", "\\pm", ":",
  " ", "\\cdot", "\\text{ or }", " and ", "\\approx", "\\\\", "&", "|", "\\ne", "\\%", "'",
  "\\Rightarrow", "\\pmod",
]  # fmt: skip
_WRAPS = [
  ("(", ")"), ("[", ")"), ("{", "}"), ("\\{", "\\}"), ("\\sqrt{", "}"), ("\\frac{", "}{2}"),
  ("|", "|"), ("\\left(", "\\right)"), ("\\sin", ""), ("\\text{", "}"), ("\\boxed{", "}"),
  ("$", "$"), ("\\lfloor", "\\rfloor"), ("-", ""), ("\\begin{pmatrix}", "\\end{pmatrix}"),
  ("x^{", "}"), ("\\overline{", "}"), ("\\log_{", "}2"),
]  # fmt: skip
_SIGNS = (
  "\x00\x01\x7f\ud800\u202e\u200b\u0301\u0660\u00b2"
  "\u2460\U0001d7ce\U0001f600\ufffd\u2028\u00ad\u0130\u1e9e²³√∞π×"
)


def _expression(random_: random.Random) -> str:
  made = random_.choice(_ATOMS)
  for _ in range(random_.randrange(8)):
    if random_.random() < 0.4:
      left, right = random_.choice(_WRAPS)
      made = left + made + right
    else:
      made = made + random_.choice(_JOINTS) + random_.choice(_ATOMS)
  return made


def _repeated(random_: random.Random) -> str:
  """One piece repeated: long towers, deep brackets, many boxes."""
  lefts = [left for left, _ in _WRAPS]
  statements = ["\\boxed{1}", "#### 1\n", "the answer is 1. ", "$"]
  piece = random_.choice([*_JOINTS, *_ATOMS, *lefts, *statements])
  count = random_.choice([30, 300, 3000])
  return piece * count + random_.choice(["", "1", *_ATOMS])


def _broken(random_: random.Random) -> str:
  """An expression with characters inserted, removed and replaced."""
  made = list(_expression(random_))
  for _ in range(random_.randrange(1, 6)):
    place = random_.randrange(len(made) + 1)
    kind = random_.randrange(3)
    if kind == 0:
      made.insert(place, random_.choice(_SIGNS + "\\{}[]()^_$%&#~|!'\"`<>"))
    elif made and kind == 1:
      made.pop(min(place, len(made) - 1))
    elif made:
      made[min(place, len(made) - 1)] = chr(
        random_.choice([random_.randrange(128), random_.randrange(0x11000)])
      )
  return "".join(made)


def strings(count: int, seed: int) -> Iterator[str]:
  """`count` hostile answers; the same for the same seed."""
  random_ = random.Random(seed)
  makers = [_expression, _expression, _broken, _broken, _repeated]
  for index in range(count):
    yield makers[index % len(makers)](random_)
