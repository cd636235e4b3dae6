"""Converts errors of huggingface_hub to one sentence that names the model or dataset."""

import contextlib
from collections.abc import Iterator

from synthneg_jax.runtime.errors import UserError


@contextlib.contextmanager
def as_user_error(kind: str, repo: str) -> Iterator[None]:
  """Turns any exception but UserError into a UserError about `repo`.

  Args:
    kind: "model" or "dataset".
    repo: ORG/NAME.
  """
  from huggingface_hub import errors

  try:
    yield
    return
  except UserError:
    raise
  except errors.GatedRepoError:
    reason = "is gated: accept its terms on its page, and set HF_TOKEN to a token of that account"
  except errors.RepositoryNotFoundError:
    reason = "does not exist, or it is private and HF_TOKEN may not read it"
  except errors.RevisionNotFoundError:
    reason = "has no such revision"
  except errors.LocalEntryNotFoundError:
    reason = "is not in the cache, and the Hub cannot be reached (no network, or HF_HUB_OFFLINE)"
  except errors.HfHubHTTPError as error:
    status = getattr(error.response, "status_code", None)
    reason = f"could not be accessed (status {status}: {_first_line(error)})"
    if status in (401, 403):
      reason = f"may not be read or written with this HF_TOKEN (status {status})"
  except Exception as error:  # httpx and the operating system share no base class
    reason = f"could not be accessed ({type(error).__name__}: {_first_line(error)})"
  raise UserError(f"The {kind} {repo} on the Hub {reason}.")


def _first_line(error: BaseException) -> str:
  return next(iter(str(error).strip().splitlines()), "")[:200]
