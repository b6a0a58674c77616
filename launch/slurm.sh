#!/usr/bin/env bash
# Submits a run to SLURM, one process a GPU: ./launch/slurm.sh --nodes=2 --gpus-per-node=8 -- --config=...
#
# What stands before -- goes to sbatch, what follows it to python -m jaxrm.train. Before it submits, it makes the
# virtual environment in .venv and installs jaxrm's requirements with JAX for GPUs, so submit where a package index
# can be reached. Needs SLURM 20.11 or newer, Python 3.11 or newer, and a repository and a run_dir on a file system
# that all nodes see.
#
#   ./launch/slurm.sh --nodes=2 --gpus-per-node=8 --partition=gpu --time=24:00:00 -- --config=configs/sft_gemma_2b.py
#   ./launch/slurm.sh --ntasks-per-node=4 -- --config=...        without GPUs, four processes a node
#   ./launch/slurm.sh --max-restarts=3 --gpus-per-node=8 -- ...  how often SLURM may start the job again, else 10
#   ./launch/slurm.sh --dry-run --gpus-per-node=8 -- ...         prints the commands and does nothing
#
# One process a GPU, since that is what JAX makes of a SLURM step: task i of a node takes the node's GPU i. So leave
# out --gpus-per-task and the like, which hide the other GPUs from it.
#
# Two minutes before the time limit, and when the job is preempted, SLURM sends SIGTERM to the processes, which save
# and end with status 75. A job that ended with neither 0 (done) nor 2 (something to mend), 76 for instance, because
# another process was lost, is requeued and continues from its latest checkpoint.
#
#   scancel JOB                                                  saves if 30 s are enough (KillWait), and stops
#   scontrol update JobId=JOB Requeue=0; scancel --signal=TERM JOB   saves however long it takes, and stops
set -euo pipefail

# SLURM runs a copy of this file from a folder of its own, so the job is told where the repository is.
if [ "${1:-}" = job ]; then
  root=$2
else
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
fi
# shellcheck source=launch/environment.sh
. "$root/launch/environment.sh"

# submit [OPTION...] -- ARGUMENT...
submit() {
  local options=() tasks='' accelerator=cpu max_restarts=10
  while [ "$#" -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
      --help) show_help "$0" && exit ;;
      --dry-run) dry_run=1 ;;
      --max-restarts=*) max_restarts=${1#*=} ;;
      --gpus-per-node=*)
        accelerator=gpu
        tasks=${tasks:-${1##*[=:]}} # --gpus-per-node=h100:8 has a type before the number
        options+=("$1")
        ;;
      --ntasks-per-node=*) tasks=${1#*=} ;;
      --config*) stop "'$1' is for the run, not for sbatch; put it after --, e.g. ./launch/slurm.sh --nodes=2 --gpus-per-node=8 -- $1" ;;
      *) options+=("$1") ;; # sbatch refuses what it does not know
    esac
    shift
  done
  [ "$#" -gt 1 ] || stop "say what to train after --, e.g. ./launch/slurm.sh --nodes=2 --gpus-per-node=8 -- --config=configs/sft_gemma_2b.py"
  shift
  whole_number --max-restarts "$max_restarts"
  [ -n "$tasks" ] || stop "say how many GPUs a node has, e.g. --gpus-per-node=8, or without GPUs how many processes, e.g. --ntasks-per-node=1"
  whole_number --gpus-per-node "$tasks"
  need sbatch "run this on a login node of the cluster, or install SLURM's client commands"

  make_environment "$(environment_folder "$root")"
  cd "$root"
  [ "$dry_run" = 0 ] || quote_words cd "$root"
  install_jaxrm "$accelerator"
  # Options of the user come last: sbatch takes the last of two. The log of a job that is requeued goes on.
  run_last sbatch --job-name=jaxrm --requeue --open-mode=append --signal=TERM@120 --chdir="$root" \
    --ntasks-per-node="$tasks" ${options[@]+"${options[@]}"} "$root/launch/slurm.sh" job "$root" "$max_restarts" "$@"
}

# job MAX_RESTARTS ARGUMENT...: the job itself, on its first node.
job() {
  local max_restarts=$1 restarts=${SLURM_RESTART_COUNT:-0} status=0 python
  shift
  python=$(environment_folder "$root")/bin/python
  # srun does not take it from sbatch since SLURM 22.05.
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  # SLURM signals the processes itself. --signal=B: would signal this shell alone, and srun, were the signal passed on
  # to it, kills the processes. The trap lets the shell live long enough to see how they ended.
  trap ':' TERM
  # Processes that lose another one end by themselves, saying so; killed at once, they would not.
  srun --kill-on-bad-exit=0 "$python" -m jaxrm.train "$@" || status=$? # the highest of all the processes
  case $status in
    0 | 2) exit "$status" ;;
  esac
  # A job that scancel or the time limit is ending is no longer RUNNING, and stays ended.
  if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" != RUNNING ]; then
    say "jaxrm: ended with status $status as SLURM ended the job; submit the same command to continue"
  elif [ "$restarts" -ge "$max_restarts" ]; then
    say "jaxrm: ended with status $status, for the last time of --max-restarts=$max_restarts; submit the same command to continue"
  else
    say "jaxrm: ended with status $status; requeued, restart $((restarts + 1)) of $max_restarts"
    scontrol requeue "$SLURM_JOB_ID" || say "jaxrm: not requeued; submit the same command to continue"
  fi
  exit "$status"
}

if [ "${1:-}" = job ]; then
  job "${@:3}"
else
  submit "$@"
fi
