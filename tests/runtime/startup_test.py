"""Start-up: which folder takes compiled programs."""

import os
from unittest import mock

from absl import flags
from absl.testing import absltest, parameterized

from synthneg_jax.runtime import startup
from synthneg_jax.runtime.errors import UserError


class CacheTest(parameterized.TestCase):
  @parameterized.parameters(
    (None, "", "/home/me/.cache/synthneg_jax/xla"),
    (None, "/shared/xla", "/shared/xla"),
    ("~/mine", "/shared/xla", "/home/me/mine"),
    ("gs://bucket/xla", "/shared/xla", "gs://bucket/xla"),
    ("", "/shared/xla", ""),
    ("workdir", "/shared/xla", "/run/compilation_cache"),
  )
  def test_the_flag_then_the_variable_then_the_home_folder(self, flag, variable, folder):
    # Fails if JAX's variable is ignored, or if it overrides the flag or its "for none".
    values = flags.FlagValues()
    flags.DEFINE_string("compilation_cache", flag, "", flag_values=values)
    flags.DEFINE_string("workdir", "/run", "", flag_values=values)
    values.mark_as_parsed()
    environment = {"HOME": "/home/me", "JAX_COMPILATION_CACHE_DIR": variable}
    with mock.patch.object(flags, "FLAGS", values), mock.patch.dict(os.environ, environment):
      self.assertEqual(startup._cache_folder(), folder)

  def test_a_program_without_a_workdir(self):
    # Fails if it raises anything but the sentence.
    values = flags.FlagValues()
    flags.DEFINE_string("compilation_cache", "workdir", "", flag_values=values)
    values.mark_as_parsed()
    with mock.patch.object(flags, "FLAGS", values):
      with self.assertRaisesRegex(UserError, "this program has no --workdir"):
        startup._cache_folder()


if __name__ == "__main__":
  absltest.main()
