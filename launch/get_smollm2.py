"""Fetches the small pretrained model SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder.

python launch/get_smollm2.py [--dir=DIR]
"""

from synthneg_jax import cli

if __name__ == "__main__":
  cli.main("get-smollm2")
