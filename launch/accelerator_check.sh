#!/usr/bin/env bash
# Checks one GPU or TPU in four minutes: numerics, and the speed of training and decoding beside transformers and TRL.
#
#   bash launch/accelerator_check.sh [--toy] [--wheels=DIR] [--seconds=N] [--parts=NAME,...] [--out=FILE]
#
# Needs no network. --wheels installs DIR/*.whl for this run only; --toy rehearses at tiny shapes on any machine. See
# docs/performance.md. PYTHON is the interpreter: by default that of .venv if it exists, else python3.
set -euo pipefail
case "${1:-}" in -h|--help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0;; esac
cd "$(dirname "$0")/.."
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
given=()
while [ $# -gt 0 ]; do
  case "$1" in
    --wheels=*) wheels="${1#*=}";;
    --wheels) wheels="${2:-}"; shift;;
    *) given+=("$1");;
  esac
  shift
done
if [ -n "${wheels:-}" ]; then
  site="$(mktemp -d)"
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || { echo "accelerator_check.sh: cannot install the wheels of $wheels; pip's message is above." >&2; exit 1; }
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" -m benchmarks.accelerator_check ${given[@]+"${given[@]}"}
