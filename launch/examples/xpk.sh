#!/usr/bin/env bash
# Example: runs a program on TPU slices of a GKE cluster through xpk (https://github.com/AI-Hypercomputer/xpk).
#
#   CLUSTER=C PROJECT=P ZONE=Z bash launch/examples/xpk.sh [--dry_run] NAME PROGRAM FLAGS
#
# Optional: TPU_TYPE (v5litepod-64) and SLICES (1). The cluster must exist (xpk cluster create). xpk packs this folder into an
# image based on python:3.11, which installs the project when a pod starts. JobSet restarts all pods when one exits with a status
# other than 0; they resume.
set -euo pipefail
dry=""
case "${1:-}" in
  -h|--help|"") sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0;;
  --dry_run) dry=1; shift;;
esac
for variable in CLUSTER PROJECT ZONE; do
  [ -n "${!variable:-}" ] || { echo "xpk.sh: $variable is not set; see --help." >&2; exit 1; }
done
cd "$(dirname "$0")/../.."
name="$1" program="${2:-}"
program="${program//-/_}"  # import-traces is import_traces.py
[ -f "launch/$program.py" ] || { echo "xpk.sh: unknown command '$program'; synthneg --help lists them." >&2; exit 1; }
shift 2
command=(
  xpk workload create "--cluster=$CLUSTER" "--project=$PROJECT" "--zone=$ZONE" "--workload=$name"
  "--tpu-type=${TPU_TYPE:-v5litepod-64}" "--num-slices=${SLICES:-1}" --base-docker-image=python:3.11 --script-dir=.
  --max-restarts=20 --restart-on-user-code-failure --termination-grace-period-seconds=60
  "--command=bash launch/worker_setup.sh tpu && exec .venv/bin/python launch/$program.py --distributed $(printf '%q ' "$@")"
)
printf '%q ' "${command[@]}"; echo
[ -n "$dry" ] || exec "${command[@]}"
