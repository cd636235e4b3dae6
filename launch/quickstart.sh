#!/usr/bin/env bash
# Installs the project and runs the whole recipe on the embedded task, on whatever this machine has.
#
#   bash launch/quickstart.sh [--workdir=DIR]      DIR: default runs/quickstart; the same command goes on where it was
#
# After installation it takes a few minutes on two CPU cores. It ends with a table of test errors, and the report's path.
set -euo pipefail
workdir=""
for arg in "$@"; do
  case "$arg" in
    -h|--help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0;;
    --workdir=?*) workdir="${arg#--workdir=}";;
    *) echo "quickstart.sh: $arg is no flag; --workdir=DIR is." >&2; exit 1;;
  esac
done
case "$workdir" in ""|/*) ;; *) workdir="$PWD/$workdir";; esac
cd "$(dirname "$0")/.."
bash launch/make_venv.sh
.venv/bin/python launch/pipeline.py --config=configs/arithmetic.py --workdir="${workdir:-runs/quickstart}"
cat <<'END'

Next:
  open the report in a browser: five wrong solutions, each step with its Q
  another seed:        .venv/bin/python launch/pipeline.py --config=configs/arithmetic.py --config.seed=1 --workdir=runs/seed1
  a real model:        bash launch/get_smollm2.sh, then configs/gsm8k.py:model=smollm2_135m,smoke (see README.md)
END
