"""The one exception that a person is meant to read, and what the file system says, made into it."""

import contextlib
import errno
from collections.abc import Iterator
from typing import Any


class UserError(Exception):
  """Something that the person at the keyboard can put right: one sentence that names the file,
  line, row or flag.

  Every entry point prints it without a traceback and exits with status 1; anything else is a defect
  of ours and keeps its traceback.
  """


# The disk's or the folder's doing, not a defect of ours.
_OUTSIDE = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.EIO,
  errno.ESTALE,
)


def of_files(error: BaseException) -> UserError | None:
  """A full disk, a folder that may not be written and the like, as a sentence; None for any other
  error.
  """
  if not isinstance(error, OSError) or error.errno not in _OUTSIDE:
    return None
  return UserError(
    f"{error.filename or 'a file'}: {error.strerror}. What was written before is kept."
  )


@contextlib.contextmanager
def writing(path: Any) -> Iterator[None]:
  """Whatever keeps the body from writing is said of this path.

  Raises:
    UserError: the body raised an OSError.
  """
  try:
    yield
  except OSError as error:
    raise UserError(
      f"{path} cannot be written: {error.strerror or error}. What was written before is kept."
    ) from error
