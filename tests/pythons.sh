#!/usr/bin/env bash
# Runs the fast tests on every further Python that this machine has and the project supports.
#
#   bash tests/pythons.sh [pytest args]
#
# Looked for in PATH and among pyenv's versions. SYNTHNEG_PYTHONS="3.12 3.13" names those that must run: one that does not is an
# error. Each has an environment of its own in build/pythons, with the versions of launch/constraints.
set -euo pipefail
case "${1:-}" in -h|--help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0;; esac
cd "$(dirname "$0")/.."
known="3.11 3.12 3.13"
main="$({ .venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])'; } 2> /dev/null || true)"

# The interpreter of a version: one that answers --version with it.
interpreter() {
  local version="$1" candidate
  local candidates=("$(command -v "python$version" || true)")
  if command -v pyenv > /dev/null; then candidates+=("$(pyenv root)"/versions/"$version".*/bin/python); fi
  for candidate in "${candidates[@]}"; do
    if [ -x "$candidate" ] && [[ "$("$candidate" --version 2> /dev/null)" == "Python $version."* ]]; then
      echo "$candidate"
      return
    fi
  done
}

wanted="${SYNTHNEG_PYTHONS:-}"
ran=""
for version in ${wanted:-$known}; do
  if [ -z "$wanted" ] && [ "$version" = "$main" ]; then continue; fi
  python="$(interpreter "$version")"
  if [ -z "$python" ]; then
    if [ -n "$wanted" ]; then
      echo "pythons.sh: SYNTHNEG_PYTHONS names $version, and no Python $version is found." >&2
      exit 1
    fi
    continue
  fi
  echo "pythons.sh: Python $version ($python)" >&2
  VENV="build/pythons/$version" PYTHON="$python" bash launch/make_venv.sh test
  JAX_PLATFORMS=cpu "build/pythons/$version/bin/python" -m pytest tests --ignore=tests/parity --fast -n2 --dist=loadfile "$@"
  ran="$ran $version"
done
echo "pythons.sh: the fast tests ran on${ran:- no further Python}."
