#!/usr/bin/env bash
# One worker of a TPU slice: launch/tpu_pod.sh calls this on each, as COMMAND of install, start, status, stop, log.
#
#   tpu_worker.sh install [--mount=SOURCE:FOLDER]   Python, environment, jaxrm's requirements with JAX for TPUs; mounts
#   tpu_worker.sh start --config=...                starts python -m jaxrm.train and leaves it running
#   tpu_worker.sh status                            one word: idle, running, lost, stopped, or "ended STATUS"
#   tpu_worker.sh stop                              SIGTERM, and waits until the run has saved
#   tpu_worker.sh log                               follows the log
#
# The environment is ~/.venv-jaxrm and what is known of the run is in ~/jaxrm-run, both outside the repository, which
# a new installation replaces.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=launch/environment.sh
. "$root/launch/environment.sh"
export JAXRM_VENV=$HOME/.venv-jaxrm
folder=$HOME/jaxrm-run

# mount_at SOURCE:FOLDER
mount_at() {
  local source=${1%:*} target=${1##*:}
  ! mountpoint --quiet "$target" || return 0
  sudo mkdir -p "$target"
  case $source in
    *:/*)
      command -v mount.nfs >/dev/null || sudo apt-get install --yes --quiet nfs-common
      sudo mount -t nfs "$source" "$target"
      ;;
    *)
      need gcsfuse "install it on the workers as Google's page 'Install Cloud Storage FUSE' says, or mount NFS, e.g. --mount=10.0.0.2:/share:$target"
      sudo chown "$(id -u)" "$target"
      # For checkpoints, as in jobset.py.
      gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 "$source" "$target"
      ;;
  esac
}

# install [--mount=SOURCE:FOLDER]
install() {
  local option
  for option in "$@"; do mount_at "${option#--mount=}"; done
  if ! (find_python) >/dev/null 2>&1; then # images of TPU VMs have Ubuntu 22.04, whose Python is 3.10
    say "Installing Python 3.12."
    python3 -m pip install --quiet --user uv
    python3 -m uv python install --quiet 3.12
    PYTHON=$(python3 -m uv python find 3.12)
  fi
  make_environment "$JAXRM_VENV"
  cd "$root"
  install_jaxrm tpu
}

# metadata NAME: what Google's metadata server says of this VM.
metadata() {
  curl --silent --fail --max-time 10 --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1" ||
    stop "the metadata server does not say '$1'; is this a TPU VM?"
}

# Tells jaxrm of the other workers by JAX's variables. On GKE they are in the environment, on a TPU VM in the metadata:
# worker-network-endpoints is a list of host names, or of name:id:address.
name_processes() {
  local workers index slices=1 slice=0 tpu
  workers=$(metadata worker-network-endpoints)
  index=$(metadata agent-worker-number)
  tpu=$(metadata tpu-env)
  of_slices() { sed -n "s/^ *MEGASCALE_$1: *'\{0,1\}\([^']*\)'\{0,1\} *\$/\1/p" <<<"$tpu"; }
  IFS=, read -r -a workers <<<"$workers"
  JAX_COORDINATOR_ADDRESS=${workers[0]##*:}
  if [ -n "$(of_slices NUM_SLICES)" ]; then
    slices=$(of_slices NUM_SLICES)
    slice=$(of_slices SLICE_ID)
    JAX_COORDINATOR_ADDRESS=$(of_slices COORDINATOR_ADDRESS) # with the port of another service
    JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS%%:*}
  fi
  export JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS:8476
  export JAX_NUM_PROCESSES=$((slices * ${#workers[@]}))
  export JAX_PROCESS_ID=$((slice * ${#workers[@]} + index))
}

# Asks for the process that writes down how the run ended. The machine may have been started anew since, and its number
# be another's.
is_running() {
  [ -s "$folder/supervisor" ] && [ ! -e "$folder/status" ] &&
    tr '\0' ' ' 2>/dev/null <"/proc/$(cat "$folder/supervisor")/cmdline" | grep -q 'tpu_worker.sh supervise'
}

status() {
  if [ ! -s "$folder/supervisor" ]; then
    echo idle
  elif is_running; then
    echo running
  elif [ ! -e "$folder/status" ]; then
    echo lost
  elif [ -e "$folder/stopped" ] && [ "$(cat "$folder/status")" = 75 ]; then
    echo stopped
  else
    echo "ended $(cat "$folder/status")"
  fi
}

# start ARGUMENT...
start() {
  ! is_running || stop "a run is going on already; stop it first: ./launch/tpu_pod.sh stop"
  [ -x "$JAXRM_VENV/bin/python" ] || stop "jaxrm is not installed here; install it first: ./launch/tpu_pod.sh install"
  name_processes
  mkdir -p "$folder"
  rm -f "$folder/pid" "$folder/supervisor" "$folder/status" "$folder/stopped"
  # In a session of its own, so that it outlives the ssh connection.
  setsid --fork "${BASH_SOURCE[0]}" supervise "$@" >>"$folder/log" 2>&1 </dev/null
  until [ -s "$folder/pid" ]; do sleep 0.1; done
  echo "started process $JAX_PROCESS_ID of $JAX_NUM_PROCESSES"
}

# supervise ARGUMENT...: runs it and writes down how it ended.
supervise() {
  local code=0
  cd "$root"
  echo "$$" >"$folder/supervisor"
  say "== $(date -u '+%F %T') UTC, process $JAX_PROCESS_ID of $JAX_NUM_PROCESSES: $(quote_words python -m jaxrm.train "$@")"
  "$JAXRM_VENV/bin/python" -m jaxrm.train "$@" &
  echo "$!" >"$folder/pid.part"
  mv "$folder/pid.part" "$folder/pid"
  wait "$!" || code=$?
  say "== $(date -u '+%F %T') UTC: ended with status $code"
  echo "$code" >"$folder/status.part"
  mv "$folder/status.part" "$folder/status"
}

stop_run() {
  if is_running; then
    touch "$folder/stopped"
    kill -TERM "$(cat "$folder/pid")"
    while is_running; do sleep 0.5; done
  fi
  status
}

case ${1:-} in
  install | start | supervise | status) "$@" ;;
  stop) stop_run ;;
  log) exec tail -n 200 -F "$folder/log" ;;
  --help) show_help "$0" ;;
  *) stop "unknown command '${1:-}'; use install, start, status, stop or log" ;;
esac
