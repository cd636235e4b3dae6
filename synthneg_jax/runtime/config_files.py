"""The shipped config files and prompts, in the installed package or in a checkout's configs/."""

import difflib
import pathlib
import re

from synthneg_jax.runtime.errors import UserError

_PACKAGE = pathlib.Path(__file__).parents[1]


def folder() -> pathlib.Path:
  """The folder configs/: inside an installed package, or beside the package in a checkout."""
  installed = _PACKAGE / "configs"
  return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def shipped_path(path: str) -> pathlib.Path:
  """Returns the path if it exists; otherwise configs/... refers to the shipped folder."""
  given = pathlib.Path(path).expanduser()
  shipped = folder().parent / path
  return (
    shipped
    if given.parts[:1] == ("configs",) and not given.exists() and shipped.exists()
    else given
  )


def resolve(value: str) -> str:
  """Locates the file of a --config value: NAME[:arg] or PATH[:arg] becomes PATH[:arg].

  A bare name, without slash or .py, names a shipped config.

  Raises:
    UserError: no config has this name.
  """
  name, colon, arg = value.partition(":")
  if not re.fullmatch(r"\w+", name):
    return f"{shipped_path(name)}{colon}{arg}" if name else value
  path = folder() / f"{name}.py"
  if not path.exists():
    names = sorted(file.stem for file in folder().glob("*.py"))
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(
      f"--config: unknown config {name!r}; {hint}The shipped configs are {', '.join(names)}; a "
      "file needs its .py."
    )
  return f"{path}{colon}{arg}"


def resolve_flag(argv: list[str]) -> None:
  """Resolves the value of --config in a command line, in place.

  Raises:
    UserError: no config has this name.
  """
  for i, arg in enumerate(argv):
    match = re.fullmatch(r"(--?config)(?:=(.*))?", arg, re.DOTALL)
    if match and match.group(2) is not None:
      argv[i] = f"{match.group(1)}={resolve(match.group(2))}"
    elif match and i + 1 < len(argv):
      argv[i + 1] = resolve(argv[i + 1])
