#!/usr/bin/env bash
# Sets up .venv, lints, and runs the tests.
#
#   bash tests/run.sh [--fast] [--parity] [--long] [pytest args]
#
#   --fast     leaves out the tests that start processes, compile for TPUs, run notebooks or a browser, build the site or train
#   --parity   installs torch, TRL and PEFT too and runs only the comparisons with them
#   --long     also runs what takes full size or hours
set -euo pipefail
extra="test"
fast=""
args=()
for arg in "$@"; do
  case "$arg" in
    -h|--help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0;;
    --parity) extra=parity;;
    --fast) fast=yes; args+=(--fast);;
    *) args+=("$arg");;
  esac
done
cd "$(dirname "$0")/.."
bash launch/make_venv.sh test
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet . || { echo "run.sh: 'ruff format .' would change files." >&2; exit 1; }
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# glibc keeps freed memory, which spares page faults at every step of a CPU program.
export MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=2147483647 MALLOC_TRIM_THRESHOLD_=2147483647
if [ "$extra" = parity ]; then
  bash launch/make_venv.sh parity
  exec .venv/bin/python -m pytest tests/parity ${args[@]+"${args[@]}"}
fi
has_browser() { command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v google-chrome > /dev/null; }
if [ -z "$fast" ] && ! has_browser && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  echo "Installing Debian's chromium for the browser tests ..." >&2
  { apt-get update && apt-get install -y --no-install-recommends chromium; } > /dev/null 2>&1 || true
fi
if [ -z "$fast" ] && ! has_browser; then
  echo "run.sh: no Chromium or Chrome here: the tests of report and trace viewer in a browser are skipped." >&2
  args+=(-m "not browser")
fi
# Two workers, each with whole modules, so that what a module sets up is made once; -n0 among the arguments runs one by one.
paths=(tests)
for arg in ${args[@]+"${args[@]}"}; do
  if [ -e "${arg%%::*}" ]; then paths=(); fi  # the caller names what to run
done
exec .venv/bin/python -m pytest ${paths[@]+"${paths[@]}"} --ignore=tests/parity -n2 --dist=loadfile --no-loadscope-reorder ${args[@]+"${args[@]}"}
