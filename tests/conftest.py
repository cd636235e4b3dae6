"""Eight forced CPU devices, strict rank promotion, and NaN checks for every test."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TFDS_DATA_DIR"] = os.path.join(tempfile.gettempdir(), "synthneg_jax_tests_tfds")  # not a user's own
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_nans", True)


def pytest_addoption(parser):
  parser.addoption("--long", action="store_true", help="also run what takes full size or hours")


def pytest_collection_modifyitems(config, items):
  if not config.getoption("--long"):
    deselected = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if not item.get_closest_marker("long")]
