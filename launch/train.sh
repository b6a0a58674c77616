#!/usr/bin/env bash
# Trains on this machine, on its TPU, GPU or CPU: ./launch/train.sh --config=configs/sft_tiny.py
#
# Finds out which accelerator is there, makes a virtual environment in .venv, installs jaxrm's requirements with the
# jaxlib of that accelerator (only when they have changed), and runs python -m jaxrm.train with the arguments. Needs
# Python 3.11 or newer and, once, a package index; for a GPU NVIDIA's driver, for a TPU a TPU VM.
#
#   ./launch/train.sh --config=configs/rm_seq2seq_gemma_2b.py --config.data.path=pairs.jsonl
#   ./launch/train.sh --accelerator=cpu --config=...   cpu, gpu or tpu, instead of the one that is found
#   ./launch/train.sh --dry-run --config=...           prints the commands and does nothing
#   PYTHON=python3.12 JAXRM_VENV=/somewhere/else ...   another Python, another folder for the environment
#
# The exit status is that of jaxrm.train: 75 is a run that was asked to stop (SIGTERM, Ctrl-C) and saved; the same
# command continues. It can be started from any folder; relative paths in the arguments start at the repository.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=launch/environment.sh
. "$root/launch/environment.sh"

if [ "${1:-}" = --help ]; then
  show_help "$0"
  exit
fi
accelerator=''
arguments=()
for argument in "$@"; do
  case $argument in
    --accelerator=cpu | --accelerator=gpu | --accelerator=tpu) accelerator=${argument#*=} ;;
    --accelerator | --accelerator=*) stop "'$argument' names no accelerator; use --accelerator=cpu, gpu or tpu" ;;
    --dry-run) dry_run=1 ;;
    *) arguments+=("$argument") ;; # jaxrm.train refuses what it does not know
  esac
done
[ "${#arguments[@]}" -gt 0 ] || stop "say what to train, e.g. ./launch/train.sh --config=configs/sft_tiny.py"
[ -n "$accelerator" ] || accelerator=$(find_accelerator /)

make_environment "$(environment_folder "$root")"
cd "$root"
[ "$dry_run" = 0 ] || quote_words cd "$root"
install_jaxrm "$accelerator"

say "Running on $accelerator: $(quote_words python -m jaxrm.train "${arguments[@]}")"
run_last "$python" -m jaxrm.train "${arguments[@]}"
