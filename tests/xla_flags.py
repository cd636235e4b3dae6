"""Flags of XLA in tests."""


def xla_flags(devices: int) -> str:
  """XLA_FLAGS for that many CPU devices and for fast compilation.

  Toy programs take seconds to compile and milliseconds to run.
  """
  return (
    f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true"
  )
