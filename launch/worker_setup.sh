#!/usr/bin/env bash
# Creates .venv and installs the project into it, whatever Python the machine has.
#
#   bash launch/worker_setup.sh EXTRA      EXTRA: tpu or cuda
#
# If python3 is older than 3.11 or lacks venv, uv fetches Python 3.11. PYTHON names another interpreter.
set -euo pipefail
case "${1:-}" in
  -h|--help|"") sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0;;
esac
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
if [ -x .venv/bin/python ]; then
  export PYTHON=.venv/bin/python
elif ! "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
  if ! command -v uv > /dev/null; then
    "$python" -m pip install --quiet --user uv || { echo "worker_setup.sh: pip could not install uv; see https://docs.astral.sh/uv/." >&2; exit 1; }
    PATH="$HOME/.local/bin:$PATH"
  fi
  uv venv --quiet --seed --python 3.11 .venv
  export PYTHON=.venv/bin/python
fi
exec bash launch/make_venv.sh "$1"
