#!/usr/bin/env bash
# Creates a Cloud TPU, runs a program on all its workers, and deletes it.
#
#   bash launch/tpu_pod.sh VERB --name=NAME --zone=ZONE [--type=v5litepod-64] [--runtime=IMAGE] [--project=P] [--spot] [--vm]
#                          [--attempts=20] [--poll_s=30] [--keep] [--dry_run] [PROGRAM FLAGS]
#
# Verbs:
#   run      up, install, start, and follow worker 0's log; repeat after a preemption or the death of a process, at most
#            --attempts times; then delete, unless --keep
#   up       create a queued resource (--vm: a TPU VM) unless one of this name exists, and wait until it is ready
#   install  copy this folder to every worker and install the project (uv fetches Python 3.11 if the image is older)
#   start    start PROGRAM on every worker, detached     tail     follow worker 0's log
#   delete   delete it, even if a program is running
#
# PROGRAM is a command listed by `synthneg --help`, FLAGS are its flags (--config, --workdir, --compilation_cache=workdir, ...);
# --distributed is added. All workers must see the workdir: gs://BUCKET/PATH. SYNTHNEG_DATA_DIR and HF_HOME are passed on if set.
# --dry_run only prints the commands.
# gcloud's flags: https://cloud.google.com/sdk/gcloud/reference/compute/tpus
set -euo pipefail
fail() { echo "tpu_pod.sh: $1" >&2; exit 1; }

verb="${1:-}"
case "$verb" in
  -h|--help|"") sed -n '2,20s/^# \{0,1\}//p' "$0"; exit 0;;
  run|up|install|start|tail|delete) shift;;
  *) fail "unknown verb '$verb'; see --help.";;
esac
name="" zone="" type=v5litepod-64 runtime="" project="" spot="" vm="" attempts=20 poll=30 keep="" dry=""
while [ $# -gt 0 ]; do
  case "$1" in
    --name=?*) name="${1#*=}";;
    --zone=?*) zone="${1#*=}";;
    --type=?*) type="${1#*=}";;
    --runtime=?*) runtime="${1#*=}";;
    --project=?*) project="${1#*=}";;
    --spot) spot=1;;
    --vm) vm=1;;
    --attempts=?*) attempts="${1#*=}";;
    --poll_s=?*) poll="${1#*=}";;
    --keep) keep=1;;
    --dry_run) dry=1;;
    -*) fail "unknown flag $1; see --help.";;
    *) break;;
  esac
  shift
done
[ -n "$name" ] || fail "--name is missing; see --help."
[ -n "$zone" ] || fail "--zone is missing; see --help."
cd "$(dirname "$0")/.."
program="${1:-}"
program="${program//-/_}"  # import-traces is import_traces.py
case "$verb" in
  run|start)
    [ -n "$program" ] || fail "$verb needs a program; see --help."
    [ -f "launch/$program.py" ] || fail "unknown command '$program'; synthneg --help lists them."
    shift;;
  *) [ -z "$program" ] || fail "$verb takes no program, but '$program' is given.";;
esac
if [ -z "$runtime" ]; then  # https://cloud.google.com/tpu/docs/runtimes
  case "$type" in
    v6e*) runtime=v2-alpha-tpuv6e;;
    v5p*) runtime=v2-alpha-tpuv5;;
    v5lite*) runtime=v2-alpha-tpuv5-lite;;
    *) runtime=tpu-ubuntu2204-base;;
  esac
fi
where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")
tpus=(gcloud compute tpus)

say() { printf '%q ' "$@"; echo; }
run() { say "$@"; [ -n "$dry" ] || "$@"; }
on() {  # on WORKER COMMAND
  run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"
}

state() {  # of the TPU; empty if it does not exist
  if [ -n "$vm" ]; then
    "${tpus[@]}" tpu-vm describe "$name" "${where[@]}" "--format=value(state)" 2> /dev/null || true
  else
    "${tpus[@]}" queued-resources describe "$name" "${where[@]}" "--format=value(state.state)" 2> /dev/null || true
  fi
}

create() {
  if [ -n "$vm" ]; then
    run "${tpus[@]}" tpu-vm create "$name" "${where[@]}" "--accelerator-type=$type" "--version=$runtime" ${spot:+--spot}
  else
    run "${tpus[@]}" queued-resources create "$name" "${where[@]}" "--node-id=$name" "--accelerator-type=$type" \
      "--runtime-version=$runtime" ${spot:+--spot}
  fi
}

delete() {
  if [ -n "$vm" ]; then
    run "${tpus[@]}" tpu-vm delete "$name" "${where[@]}" --quiet
  else
    run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
  fi
}

up() {
  if [ -n "$dry" ]; then
    create
    return
  fi
  local now last="" refused=0
  while true; do
    now="$(state)"
    case "$now" in
      ACTIVE|READY) return;;
      "")
        if ! create; then
          refused=$((refused + 1))
          [ "$refused" -lt 3 ] || fail "gcloud could not create $name; its message is above."
        fi;;
      SUSPENDED|SUSPENDING|FAILED|PREEMPTED|TERMINATED|STOPPED)
        echo "tpu_pod.sh: $name is $now; deleting it and requesting it again." >&2
        delete;;
      *) [ "$now" = "$last" ] || echo "tpu_pod.sh: $name is $now; waiting." >&2;;
    esac
    last="$now"
    sleep "$poll"
  done
}

install() {
  local archive=TEMPORARY_FOLDER/synthneg_jax.tar.gz
  if [ -z "$dry" ]; then archive="$(mktemp -d)/synthneg_jax.tar.gz"; fi
  # `|| return`: set -e is off within the condition of `run`
  run tar --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=./build -czf "$archive" . || return 1
  run "${tpus[@]}" tpu-vm scp "$archive" "$name:synthneg_jax.tar.gz" "${where[@]}" --worker=all || return 1
  on all "mkdir -p synthneg_jax && tar xzf synthneg_jax.tar.gz -C synthneg_jax && bash synthneg_jax/launch/worker_setup.sh tpu" || return 1
  [ -n "$dry" ] || rm -rf "$(dirname "$archive")"
}

start() {  # detached, so that it survives the end of ssh
  local line env="" variable
  for variable in SYNTHNEG_DATA_DIR HF_HOME; do
    [ -z "${!variable:-}" ] || env+="$variable=$(printf %q "${!variable}") "
  done
  line="$(printf '%q ' "$@")"
  line="cd synthneg_jax && ${env}.venv/bin/python launch/$program.py --distributed $line"
  # shellcheck disable=SC2016  # the worker's shell expands it
  local old='[ ! -f pid ] || kill -KILL -- "-$(cat pid)" 2> /dev/null; rm -f pid status'  # left by an earlier attempt
  on all "$old; setsid nohup bash -c $(printf %q "($line) > log 2>&1; echo \$? > status") > /dev/null 2>&1 < /dev/null & echo \$! > pid"
}

finished() {  # the exit status of worker 0's process; empty while it runs
  "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=0 "--command=cat status 2> /dev/null || true" 2> /dev/null | tr -dc 0-9
}

follow() {  # prints worker 0's log until its process ends or the TPU is gone; returns its status, or 75
  local seen=0 new ended=""
  while true; do
    ended="$(finished)" || true
    new="$("${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=0 "--command=tail -n +$((seen + 1)) log" 2> /dev/null)" || new=""
    if [ -n "$new" ]; then
      printf '%s\n' "$new"
      seen=$((seen + $(printf '%s\n' "$new" | wc -l)))
    fi
    [ -z "$ended" ] || return "$ended"
    case "$(state)" in
      ACTIVE|READY) ;;
      *) echo "tpu_pod.sh: $name was preempted." >&2; return 75;;
    esac
    sleep "$poll"
  done
}

case "$verb" in
  up) up;;
  install) install;;
  start) start "$@";;
  tail) on 0 "tail -n +1 -F log";;
  delete) delete;;
  run)
    for ((attempt = 1; attempt <= attempts; attempt++)); do
      up
      status=0
      { install && start "$@"; } || status=75
      if [ -n "$dry" ]; then
        on 0 "tail -n +1 -F log"
      elif [ "$status" = 0 ]; then
        follow || status=$?
      fi
      case "$status" in
        75|76) echo "tpu_pod.sh: attempt $attempt ended with status $status; retrying." >&2;;
        *) break;;
      esac
    done
    [ -n "$keep" ] || delete
    exit "$status";;
esac
