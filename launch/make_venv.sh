#!/usr/bin/env bash
# Creates .venv in the repository and installs the project into it in editable mode.
#
#   bash launch/make_venv.sh [EXTRA]      EXTRA: an extra of setup.py (test, parity, tpu, cuda, ...)
#
# Does nothing if the environment is complete and setup.py has not changed. PYTHON is the interpreter (default python3), VENV the
# folder (default .venv). Versions come from launch/constraints/pyVERSION.txt, with which the tests have run.
set -euo pipefail
case "${1:-}" in -h|--help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0;; esac
cd "$(dirname "$0")/.."
extra="${1:-}"
python="${PYTHON:-python3}"
venv="${VENV:-.venv}"
marker="$venv/.synthneg_jax-${extra:-core}-$(cksum < setup.py | cut -d' ' -f1)"
[ -e "$marker" ] && exit 0

fail() { echo "make_venv.sh: $1" >&2; exit 1; }
command -v "$python" > /dev/null || fail "$python is missing; install Python 3.11 or newer, or set PYTHON."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$("$python" --version) is too old; install Python 3.11 or newer, or set PYTHON."
if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv "$venv" || fail "$python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv."
fi
echo "Installing synthneg_jax${extra:+[$extra]} into $venv (a minute or two) ..." >&2
constraints="launch/constraints/py$("$venv/bin/python" -c 'import sys; print("%d%d" % sys.version_info[:2])').txt"
pinned=()
[ -e "$constraints" ] && pinned=(-c "$constraints")
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check ${pinned[@]+"${pinned[@]}"} -e ".${extra:+[$extra]}" || fail "pip could not install the requirements; its message is above."
touch "$marker"
