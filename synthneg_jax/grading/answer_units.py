"""Units of measurement, and the words beside a number that scale it, change it or hedge it."""

import collections
import dataclasses
import fractions
import functools
import re

_F = fractions.Fraction
_METRE = {
  "m": 1, "meter": 1, "metre": 1, "mm": _F(1, 1000), "millimeter": _F(1, 1000),
  "millimetre": _F(1, 1000), "cm": _F(1, 100), "centimeter": _F(1, 100), "centimetre": _F(1, 100),
  "dm": _F(1, 10), "km": 1000, "kilometer": 1000, "kilometre": 1000, "inch": _F(254, 10000),
  "inche": _F(254, 10000), "in": _F(254, 10000), "foot": _F(3048, 10000), "feet": _F(3048, 10000),
  "ft": _F(3048, 10000), "yard": _F(9144, 10000), "yd": _F(9144, 10000),
  "mile": _F(1609344, 1000), "mi": _F(1609344, 1000),
}  # fmt: skip
_SECOND = {
  "s": 1, "sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hr": 3600, "hour": 3600,
  "day": 86400, "week": 604800, "ms": _F(1, 1000), "millisecond": _F(1, 1000),
}  # fmt: skip
_GRAM = {
  "g": 1, "gram": 1, "kg": 1000, "kilogram": 1000, "kilo": 1000, "mg": _F(1, 1000),
  "milligram": _F(1, 1000), "ton": 10**6, "tonne": 10**6, "lb": _F(45359237, 100000),
  "pound": _F(45359237, 100000), "ounce": _F(45359237, 1600000), "oz": _F(45359237, 1600000),
}  # fmt: skip
_LITRE = {
  "l": 1, "liter": 1, "litre": 1, "ml": _F(1, 1000), "milliliter": _F(1, 1000),
  "millilitre": _F(1, 1000),
}  # fmt: skip
# dimension -> unit name -> its size in the dimension's first unit. Lookups ignore case and a plural
# s.
_DIMENSIONS = {
  "length": _METRE,
  "time": _SECOND,
  "mass": _GRAM,
  "volume": _LITRE,
  "dollars": {"dollar": 1, "buck": 1, "usd": 1, "cent": _F(1, 100)},
  "euro": {"euro": 1},
  "pound": {"pounds sterling": 1},
  "month": {"month": 1, "year": 12},
  "length/time": {"mph": _F(1609344, 3600000), "kph": _F(1000, 3600)},
  "angle": {"radian": 1, "rad": 1},
  "degree": {"degree": 1, "deg": 1},
  "am": {"am": 1},
  "pm": {"pm": 1},
  "square": {"sq": 1, "square": 1},
  "cubic": {"cubic": 1},
}
_UNITS = {}
for _dimension, _table in _DIMENSIONS.items():
  _UNITS |= {name: (_dimension, _F(factor)) for name, factor in _table.items()}
_POWERS = {"square": 2, "cubic": 3}  # power of the unit after the word

# Words after a number that multiply it.
SCALES = {
  "dozen": 12, "dozens": 12, "hundred": 100, "thousand": 10**3, "million": 10**6,
  "millions": 10**6, "billion": 10**9, "billions": 10**9, "trillion": 10**12, "trillions": 10**12,
  "lakh": 10**5, "lakhs": 10**5, "crore": 10**7, "crores": 10**7,
}  # fmt: skip
# Suffixes that multiply an amount of money: $7k.
MONEY_SCALES = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "bn": 10**9}
# Words beside a number that make it uncertain, deny it or turn it into another number.
_HEDGES = frozenset(
  "wrong false incorrect impossible invalid untrue never cannot unlikely excluded contradiction "
  "or nor not maybe perhaps possibly either unless plus minus negative squared cubed half "
  "halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh "
  "sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth "
  "thousandths millionth millionths factorial root reciprocal zero one two three four five six "
  "seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
  "nineteen twenty thirty forty fifty sixty seventy eighty ninety hundreds thousands more "
  "minimum maximum doubled halved mod "
  "eleventh elevenths twelfth twelfths gross tens mil millones millionen milliarden tausend "
  "less than fewer least most if else but vs versus where when".split()
)  # fmt: skip
_ABBREVIATED = frozenset(
  "mm cm dm km ft yd mi kg mg lb oz ml mph kph hr sec min percent pct".split()  # no products
)


def changes_number(words: str) -> bool:
  """Whether words beside a number hedge, deny or change it: "or more", "is wrong", "squared"."""
  return any(word.lower() in _HEDGES for word in re.findall("[A-Za-z]+", words))


@functools.lru_cache(maxsize=4096)
def unit_of(name: str) -> tuple[str, fractions.Fraction] | None:
  """(dimension, factor) of a unit name; None for any other word."""
  name = name.lower().replace(".", "")
  return _UNITS.get(name) or (_UNITS.get(name.removesuffix("s")) if len(name) > 2 else None)


def is_abbreviation(word: str) -> bool:
  """Whether letters after a number are a unit rather than a product of symbols: cm, but not ab."""
  return word.lower() in _ABBREVIATED


@dataclasses.dataclass(frozen=True)
class Unit:
  """A unit, without its unknown words.

  Attributes:
    dimensions: (dimension, power) pairs, such as (("length", 2),) for an area; () if every word is
      unknown.
    factor: exact size in the dimensions' first units.
  """

  dimensions: tuple[tuple[str, int], ...]
  factor: fractions.Fraction

  def ratio(self, other: "Unit") -> fractions.Fraction | None:
    """This unit in terms of `other`; 1 if either is unknown, None if the dimensions differ."""
    if not self.dimensions or not other.dimensions:
      return fractions.Fraction(1)
    return self.factor / other.factor if self.dimensions == other.dimensions else None


def unit(words: list[tuple[str, int]]) -> Unit:
  """Builds a unit from (word, power) pairs in the order written, ignoring unknown words."""
  powers, total = collections.Counter(), fractions.Fraction(1)
  next_power = 1
  for word, power in words:
    dimension, factor = unit_of(word) or ("", 1)
    if dimension in _POWERS:
      next_power = _POWERS[dimension]
    elif dimension:
      power *= next_power
      next_power = 1
      for name, sign in zip(dimension.split("/"), (1, -1), strict=False):
        powers[name] += sign * power
      total *= factor**power
  return Unit(tuple(sorted((name, power) for name, power in powers.items() if power)), total)
