"""Units of measurement of an answer, and the words around a number: what is a unit, and what changes the number."""

import fractions
import functools
import re

# name -> (dimension, factor to that dimension's first unit). Names are matched in lower case, then without a plural s.
_F = fractions.Fraction
_LENGTH = {
  "m": 1, "meter": 1, "metre": 1, "mm": _F(1, 1000), "millimeter": _F(1, 1000), "millimetre": _F(1, 1000),
  "cm": _F(1, 100), "centimeter": _F(1, 100), "centimetre": _F(1, 100), "dm": _F(1, 10), "km": 1000,
  "kilometer": 1000, "kilometre": 1000, "inch": _F(254, 10000), "inche": _F(254, 10000), "in": _F(254, 10000),
  "foot": _F(3048, 10000), "feet": _F(3048, 10000), "ft": _F(3048, 10000), "yard": _F(9144, 10000),
  "yd": _F(9144, 10000), "mile": _F(1609344, 1000), "mi": _F(1609344, 1000),
}  # fmt: skip
_TIME = {
  "s": 1, "sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hr": 3600, "hour": 3600, "day": 86400,
  "week": 604800, "ms": _F(1, 1000), "millisecond": _F(1, 1000),
}  # fmt: skip
_MASS = {
  "g": 1, "gram": 1, "kg": 1000, "kilogram": 1000, "kilo": 1000, "mg": _F(1, 1000), "milligram": _F(1, 1000),
  "ton": 1000000, "tonne": 1000000, "lb": _F(45359237, 100000), "pound": _F(45359237, 100000),
  "ounce": _F(45359237, 1600000), "oz": _F(45359237, 1600000),
}  # fmt: skip
_VOLUME = {"l": 1, "liter": 1, "litre": 1, "ml": _F(1, 1000), "milliliter": _F(1, 1000), "millilitre": _F(1, 1000)}
_MONEY = {"dollar": 1, "buck": 1, "usd": 1, "cent": _F(1, 100)}
_TABLES = {"length": _LENGTH, "time": _TIME, "mass": _MASS, "volume": _VOLUME, "dollars": _MONEY}
_UNITS = {name: (dimension, _F(factor)) for dimension, table in _TABLES.items() for name, factor in table.items()}
_UNITS |= {
  "month": ("month", _F(1)),
  "year": ("month", _F(12)),
  "euro": ("euro", _F(1)),
  "pounds sterling": ("pound", _F(1)),
}
_UNITS |= {"mph": ("length/time", _F(1609344, 3600000)), "kph": ("length/time", _F(1000, 3600))}
_UNITS |= {"radian": ("angle", _F(1)), "rad": ("angle", _F(1)), "degree": ("degree", _F(1)), "deg": ("degree", _F(1))}
_UNITS |= {"am": ("am", _F(1)), "pm": ("pm", _F(1))}
_UNITS |= {name: ("square", _F(1)) for name in ("sq", "square")} | {"cubic": ("cubic", _F(1))}

# Words after a number that leave it open which number is meant, or make another one of it.
_HEDGES = frozenset(
  "or nor not maybe perhaps possibly either unless plus minus negative squared cubed half halves quarter quarters dozen "
  "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
  "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred hundreds thousand thousands million "
  "millions billion billions trillion trillions times more less than fewer least most if else but vs versus if where "
  "when".split()
)
_COUNTING = frozenset("square squares unit units sq cubic cubes".split())
_ABBREVIATED = frozenset("mm cm dm km ft yd mi kg mg lb oz ml mph kph hr sec min percent pct".split())
_WORDS = re.compile(r"[A-Za-z]+")


def changes_number(words: str) -> bool:
  """Whether words beside a number hedge it, negate it or multiply it: "or more", "million"."""
  return any(word.lower() in _HEDGES for word in _WORDS.findall(words))


@functools.lru_cache(maxsize=4096)
def unit_of(name: str) -> tuple[str, fractions.Fraction] | None:
  """(dimension, factor) of one unit word; None for any other word."""
  name = name.lower().replace(".", "")
  return _UNITS.get(name) or (_UNITS.get(name.removesuffix("s")) if len(name) > 2 else None)


def is_abbreviation(word: str) -> bool:
  """Whether letters that stand together after a number are a unit and not a product of symbols: cm, but not ab."""
  return word.lower() in _ABBREVIATED


class Unit:
  """The unit of a quantity: its known part as powers of dimensions and a factor, and all of its words.

  Attributes:
    dimensions: {"length": 2} for an area; {} where no word is a known unit.
    factor: of the known part, an exact rational.
    words: the words as written, in lower case.
  """

  def __init__(self, parts: list[tuple[str, int]]):
    """parts: words and their powers, in the order written; an unknown word counts for nothing."""
    self.words = " ".join(word for word, _ in parts).lower()
    self.dimensions, self.factor = {}, fractions.Fraction(1)
    raised = 0
    for word, power in parts:
      known = unit_of(word)
      if known is None:
        continue
      if known[0] in ("square", "cubic"):
        raised = 2 if known[0] == "square" else 3
        continue
      dimension, factor = known
      power *= raised or 1
      raised = 0
      for part, sign in zip(dimension.split("/"), (1, -1), strict=False):
        self.dimensions[part] = self.dimensions.get(part, 0) + sign * power
      self.factor *= factor**power
    self.dimensions = {name: power for name, power in self.dimensions.items() if power}

  def __eq__(self, other) -> bool:
    return isinstance(other, Unit) and (self.dimensions, self.factor) == (other.dimensions, other.factor)

  def __hash__(self) -> int:
    return hash((tuple(sorted(self.dimensions.items())), self.factor))

  def __repr__(self) -> str:
    return f"Unit({self.words!r})"

  def ratio(self, other: "Unit") -> fractions.Fraction | None:
    """How many of `other` one of this is; 1 where either is no known unit; None where they measure different things."""
    if not self.dimensions or not other.dimensions:
      return fractions.Fraction(1)
    return self.factor / other.factor if self.dimensions == other.dimensions else None
