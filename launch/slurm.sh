#!/usr/bin/env bash
# Submits a program to a GPU cluster that Slurm manages, one process a GPU; a job that is preempted is queued again.
#
#   bash launch/slurm.sh [--nodes=1] [--gpus_per_node=8] [--time=1-00:00:00] [--partition=P] [--account=A] [--name=N]
#                        [--grace_s=120] [--dry_run] PROGRAM FLAGS
#
# PROGRAM is a command as `synthneg --help` lists them, FLAGS are its own (--config, --workdir, ...); --distributed is added.
# The workdir and this folder must be seen by all nodes; bash launch/worker_setup.sh cuda installs, once, before. --grace_s seconds before
# the time is up all processes get SIGTERM, save and end with status 75, and the job goes back to the queue, as it does where
# a process dies (76). --dry_run prints the commands and submits nothing. Flags: https://slurm.schedmd.com/sbatch.html, srun.html.
set -euo pipefail
fail() { echo "slurm.sh: $1" >&2; exit 1; }

if [ "${1:-}" = --job ]; then  # in the job, on its first node
  shift
  status=0
  srun --kill-on-bad-exit=1 .venv/bin/python "$@" || status=$?
  case "$status" in
    75|76) echo "slurm.sh: status $status; the job is queued again." >&2; scontrol requeue "$SLURM_JOB_ID";;
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
    -*) fail "$1 is no flag; see --help.";;
    *) break;;
  esac
  shift
done
cd "$(dirname "$0")/.."
program="${1:-}"
program="${program//-/_}"  # import-traces is import_traces.py
[ -n "$program" ] || fail "names no program; see --help."
[ -f "launch/$program.py" ] || fail "'$program' is no command; synthneg --help lists them."
shift
case "$nodes$gpus$grace" in *[!0-9]*) fail "--nodes, --gpus_per_node and --grace_s are numbers.";; esac
[ -n "$dry" ] || [ -x .venv/bin/python ] || fail ".venv is not there; first: bash launch/worker_setup.sh cuda"

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
