"""The one exception that a person is meant to read."""


class UserError(Exception):
  """Something that the person at the keyboard can put right: one sentence that names the file, line, row or flag.

  Every entry point prints it without a traceback and exits with status 1; anything else is a defect of ours and keeps
  its traceback.
  """
