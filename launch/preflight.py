"""Compiles a config's programs for a TPU pod without the pod: does it fit, what binds, what will it
cost.

python launch/preflight.py --config=gsm8k:model=deepseek_math_7b --topology=v5e:8x8 \
    [--stages=sft,sample]
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("preflight")
