"""docs/data.md names every field of every record, with its type, and every metric."""

import dataclasses
import inspect
import pathlib
import re

import jax.numpy as jnp
import pytest

from synthneg_jax.core import losses
from synthneg_jax.data import records
from synthneg_jax.training import objectives

_DOC = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text()
_KINDS = [kind for kind in vars(records).values() if dataclasses.is_dataclass(kind)]


def _rows(section: str) -> list[tuple[str, str]]:
  """First two cells of the table rows under a heading, without code marks."""
  text = re.search(rf"^### {section}\n(.*?)(?=^##)", _DOC, flags=re.DOTALL | re.MULTILINE)
  assert text, f"docs/data.md has no section {section}"
  rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \|", text.group(1), flags=re.MULTILINE)
  return [(name, kind.replace("\\|", "|")) for name, kind in rows]


def test_there_are_records():
  assert {kind.__name__ for kind in _KINDS} == {
    "Problem",
    "Candidate",
    "Trace",
    "Rollout",
    "StepEstimate",
    "Pair",
  }


@pytest.mark.parametrize("kind", _KINDS, ids=lambda kind: kind.__name__)
def test_fields_stand_in_their_section(kind):
  fields = [
    (field.name, inspect.formatannotation(field.type)) for field in dataclasses.fields(kind)
  ]
  assert _rows(kind.__name__) == fields


def test_metrics_stand_in_the_page():
  names = set(re.findall(r'"(\w+/per_\w+)"', inspect.getsource(objectives)))
  zero = jnp.zeros(1)
  per_pair = losses.preference_metrics(zero, zero, zero, zero, beta=1.0)
  names |= {f"{name}/per_pair" for name in per_pair}
  assert len(names) >= 8
  assert names <= set(re.findall(r"^\| `(\w+/per_\w+)` \|", _DOC, flags=re.MULTILINE))
