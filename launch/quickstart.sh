#!/usr/bin/env bash
# Installs the project and runs every stage on the embedded task, on the devices of this machine.
#
#   bash launch/quickstart.sh [--workdir=DIR]      DIR: default runs/quickstart; re-run to resume
#
# After installation it takes a few minutes on two CPU cores. It prints a table of test errors and the path of a report.
set -euo pipefail
workdir=""
for arg in "$@"; do
  case "$arg" in
    -h|--help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0;;
    --workdir=?*) workdir="${arg#--workdir=}";;
    *) echo "quickstart.sh: unknown flag $arg; the only one is --workdir=DIR." >&2; exit 1;;
  esac
done
case "$workdir" in ""|/*) ;; *) workdir="$PWD/$workdir";; esac
cd "$(dirname "$0")/.."
bash launch/make_venv.sh
.venv/bin/python launch/pipeline.py --config=configs/arithmetic.py --workdir="${workdir:-runs/quickstart}"
cat <<'END'

Next:
  open the report in a browser: five wrong solutions with the Q of each step
  another seed:        .venv/bin/python launch/pipeline.py --config=configs/arithmetic.py --config.seed=1 --workdir=runs/seed1
  a real model:        bash launch/get_smollm2.sh, then configs/gsm8k.py:model=smollm2_135m,smoke (see README.md)
END
