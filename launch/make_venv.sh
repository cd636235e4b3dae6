#!/usr/bin/env bash
# Makes .venv in the repository and installs the project into it, editable.
#
#   bash launch/make_venv.sh [EXTRA]      EXTRA: an extra of setup.py (test, parity, tpu, cuda, ...)
#
# Done only when its marker file is there; made again when setup.py changes. PYTHON names the interpreter (default python3), VENV
# the folder (default .venv). Versions are those of launch/constraints/pyVERSION.txt, which the tests have run with.
set -euo pipefail
case "${1:-}" in -h|--help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0;; esac
cd "$(dirname "$0")/.."
extra="${1:-}"
python="${PYTHON:-python3}"
venv="${VENV:-.venv}"
marker="$venv/.synthneg_jax-${extra:-core}-$(cksum < setup.py | cut -d' ' -f1)"
[ -e "$marker" ] && exit 0

fail() { echo "make_venv.sh: $1" >&2; exit 1; }
command -v "$python" > /dev/null || fail "$python is not there; install Python 3.11 or newer, or name it by PYTHON."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$("$python" --version) is too old; Python 3.11 or newer is needed (PYTHON names another)."
if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv "$venv" || fail "$python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv."
fi
echo "Installing synthneg_jax${extra:+[$extra]} into $venv (a minute or two) ..." >&2
constraints="launch/constraints/py$("$venv/bin/python" -c 'import sys; print("%d%d" % sys.version_info[:2])').txt"
pinned=()
[ -e "$constraints" ] && pinned=(-c "$constraints")
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check ${pinned[@]+"${pinned[@]}"} -e ".${extra:+[$extra]}" || fail "pip could not install the requirements; its message is above."
touch "$marker"
