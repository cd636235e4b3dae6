#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct as a Hugging Face folder: `synthneg get-smollm2` from this checkout.
#
#   bash launch/get_smollm2.sh [--dir=DIR]
#
# See --help. Uses $PYTHON, else .venv/bin/python of this checkout, else python3.
set -euo pipefail
fail() { echo "get_smollm2.sh: $1" >&2; exit 1; }
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-}"
if [ -z "$python" ]; then
  python="$root/.venv/bin/python"
  [ -x "$python" ] || python=python3
fi
command -v "$python" > /dev/null || fail "'$python' is missing; set PYTHON."
needs="absl ml_collections numpy safetensors tokenizers"
"$python" -c "import sys; from importlib.util import find_spec as find; sys.exit(not all(map(find, '$needs'.split())))" ||
  fail "$python lacks one of $needs; install the project first."
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" "$root/launch/get_smollm2.py" "$@"
