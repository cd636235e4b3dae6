#!/usr/bin/env bash
# Installs the project with jax for CUDA and runs a program as one process on all GPUs of this machine.
#
#   bash launch/gpu.sh [--dry_run] PROGRAM FLAGS      bash launch/gpu.sh pipeline --config=configs/arithmetic.py --workdir=DIR
#
# PROGRAM is a command listed by `synthneg --help`, FLAGS are its flags (--config, --workdir, ...). On SIGTERM it saves and exits
# with status 75; re-run the same command to resume. --dry_run only prints the commands.
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
[ -f "launch/$program.py" ] || fail "unknown command '$program'; synthneg --help lists them."
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
