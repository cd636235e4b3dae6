"""`UserError`, the exception meant to be read by users, and file system errors converted to it."""

import contextlib
import errno
from collections.abc import Iterator
from typing import Any


class UserError(Exception):
  """An error that the user can fix: one sentence that names the file, line, row or flag.

  Every entry point prints it without a traceback and exits with status 1. Any other exception is a
  bug and keeps its traceback.
  """


# Caused by the disk or folder, not by a bug.
_EXTERNAL_ERRNOS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.EIO,
  errno.ESTALE,
)


def from_os_error(error: BaseException) -> UserError | None:
  """Converts a full disk, missing permissions and the like to a UserError; None for the rest."""
  if not isinstance(error, OSError) or error.errno not in _EXTERNAL_ERRNOS:
    return None
  return UserError(
    f"{error.filename or 'a file'}: {error.strerror}. Everything written so far is kept."
  )


@contextlib.contextmanager
def writing(path: Any) -> Iterator[None]:
  """Converts an OSError in the body to a UserError about this path.

  Raises:
    UserError: the body raised an OSError.
  """
  try:
    yield
  except OSError as error:
    raise UserError(
      f"{path} cannot be written: {error.strerror or error}. Everything written so far is kept."
    ) from error
