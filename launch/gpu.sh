#!/usr/bin/env bash
# Runs a program on all GPUs of this machine: installs the project with CUDA's jax, then starts it as one process.
#
#   bash launch/gpu.sh [--dry_run] PROGRAM FLAGS      bash launch/gpu.sh pipeline --config=configs/arithmetic.py --workdir=DIR
#
# PROGRAM is a command as `synthneg --help` lists them, FLAGS are its own (--config, --workdir, ...). SIGTERM makes it save and
# end with status 75; the same command goes on. --dry_run prints the commands and runs none.
set -euo pipefail
fail() { echo "gpu.sh: $1" >&2; exit 1; }
dry=""
case "${1:-}" in
  -h|--help|"") sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0;;
  --dry_run) dry=1; shift;;
esac
cd "$(dirname "$0")/.."
program="${1:-}"
program="${program//-/_}"  # import-traces is import_traces.py
[ -f "launch/$program.py" ] || fail "'$program' is no command; synthneg --help lists them."
shift
run() {
  printf '%q ' "$@"; echo
  [ -n "$dry" ] || "$@"
}
[ -n "$dry" ] || nvidia-smi -L > /dev/null || fail "nvidia-smi finds no GPU."
run bash launch/worker_setup.sh cuda
set -- .venv/bin/python "launch/$program.py" "$@"
printf '%q ' "$@"; echo
[ -n "$dry" ] || exec "$@"
