#!/usr/bin/env bash
# Submits a program to a Slurm cluster, one process per GPU; a preempted job is requeued.
#
#   bash launch/slurm.sh [--nodes=1] [--gpus_per_node=8] [--time=1-00:00:00] [--partition=P] [--account=A] [--name=N]
#                        [--grace_s=120] [--dry_run] PROGRAM FLAGS
#
# PROGRAM is a command listed by `synthneg --help`, FLAGS are its flags (--config, --workdir, ...); --distributed is added. All
# nodes must see the workdir and this folder; install once with bash launch/worker_setup.sh cuda. --grace_s seconds before the time
# limit all processes get SIGTERM, save, and exit with status 75; the job is then requeued, as it is after a process died (76).
# --dry_run only prints the commands. Flags: https://slurm.schedmd.com/sbatch.html, srun.html.
set -euo pipefail
fail() { echo "slurm.sh: $1" >&2; exit 1; }

if [ "${1:-}" = --job ]; then  # in the job, on its first node
  shift
  status=0
  srun --kill-on-bad-exit=1 .venv/bin/python "$@" || status=$?
  case "$status" in
    75|76) echo "slurm.sh: status $status; the job is requeued." >&2; scontrol requeue "$SLURM_JOB_ID";;
  esac
  exit "$status"
fi

nodes=1 gpus=8 time=1-00:00:00 partition="" account="" name=synthneg_jax grace=120 dry=""
while [ $# -gt 0 ]; do
  case "$1" in
    -h|--help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0;;
    --nodes=?*) nodes="${1#*=}";;
    --gpus_per_node=?*) gpus="${1#*=}";;
    --time=?*) time="${1#*=}";;
    --partition=?*) partition="${1#*=}";;
    --account=?*) account="${1#*=}";;
    --name=?*) name="${1#*=}";;
    --grace_s=?*) grace="${1#*=}";;
    --dry_run) dry=1;;
    -*) fail "unknown flag $1; see --help.";;
    *) break;;
  esac
  shift
done
cd "$(dirname "$0")/.."
program="${1:-}"
program="${program//-/_}"  # import-traces is import_traces.py
[ -n "$program" ] || fail "no program is given; see --help."
[ -f "launch/$program.py" ] || fail "unknown command '$program'; synthneg --help lists them."
shift
case "$nodes$gpus$grace" in *[!0-9]*) fail "--nodes, --gpus_per_node and --grace_s must be numbers.";; esac
[ -n "$dry" ] || [ -x .venv/bin/python ] || fail ".venv is missing; run bash launch/worker_setup.sh cuda first."

command=(
  sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" "--time=$time"
  "--signal=TERM@$grace" --requeue --open-mode=append "--chdir=$PWD" "--output=$name-%j.log"
)
[ -z "$partition" ] || command+=("--partition=$partition")
[ -z "$account" ] || command+=("--account=$account")
command+=(launch/slurm.sh --job "launch/$program.py" --distributed "$@")
printf '%q ' "${command[@]}"; echo
if [ -n "$dry" ]; then
  printf '%q ' srun --kill-on-bad-exit=1 .venv/bin/python "launch/$program.py" --distributed "$@"; echo " # in the job"
  # shellcheck disable=SC2016  # Slurm sets it in the job
  echo 'scontrol requeue "$SLURM_JOB_ID" # in the job, after status 75 or 76'
else
  "${command[@]}"
fi
