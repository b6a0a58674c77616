#!/usr/bin/env bash
# Trains on a TPU slice, or several, of Cloud TPU VMs: ./launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [OPTION...]
#
# Needs the gcloud command, logged in, with a project that has TPU quota. COMMAND is one of
#
#   create    asks for the TPUs (a queued resource). --accelerator-type=v6e-16, --runtime-version=v2-alpha-tpuv6e;
#             --spot; --node-count=2 for two slices that train together; --create-option=--network=NAME goes to gcloud
#   install   copies the repository (HEAD, without uncommitted changes; or --from=GIT_ADDRESS --revision=NAME) to every
#             worker and installs it there. --mount=SOURCE:FOLDER mounts a bucket by gcsfuse, or HOST:/SHARE of NFS
#   start     starts the same command on every worker and returns: what follows -- goes to python -m jaxrm.train
#   status    says the state of the queued resource and of the run on every worker
#   logs      follows the log of a worker: --worker=0 --slice=0
#   stop      SIGTERM to the run on every worker: it saves and ends
#   delete    gives the TPUs back
#   watch     all of it, until the run is done: creates, installs, starts; begins again when the TPUs were preempted or
#             the run was lost, at most --max-restarts=10 times; asks every --interval=60 seconds. Leave it running on a
#             machine that stays on. Its exit status is that of the run; stop ends it with 75
#
#   ./launch/tpu_pod.sh watch --name=rm --zone=us-east5-b --accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e \
#     --spot --mount=10.0.0.2:/share:/mnt/runs -- --config=configs/rm_seq2seq_gemma_2b.py --config.run_dir=/mnt/runs/rm
#
# Every worker reads and writes run_dir, so it has to be on a file system that all see and that outlives the TPUs:
# Filestore (NFS), or a bucket mounted by gcsfuse, best one with hierarchical namespace, where folders are renamed in
# one step. jaxrm takes no addresses like gs://. The same goes for config.data.path where it is a file.
#
# Give every command the same --node-count as create. --project=ID as in gcloud; --ssh-option=--internal-ip goes to
# gcloud's ssh and scp; --dry-run prints the commands and does nothing. For slices of several workers add your key to
# the agent first: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=launch/commands.sh
. "$root/launch/commands.sh"

command=${1:---help}
name='' zone='' project='' accelerator_type='' runtime_version='' node_count=1 from='' revision='' mount=''
worker=0 slice=0 max_restarts=10 interval=60
create_options=(--quiet) ssh_options=(--quiet) arguments=()

parse() {
  while [ "$#" -gt 0 ]; do
    case $1 in
      --name=?*) name=${1#*=} ;;
      --zone=?*) zone=${1#*=} ;;
      --project=?*) project=${1#*=} ;;
      --accelerator-type=?*) accelerator_type=${1#*=} ;;
      --runtime-version=?*) runtime_version=${1#*=} ;;
      --node-count=?*) node_count=${1#*=} ;;
      --spot) create_options+=(--spot) ;;
      --create-option=?*) create_options+=("${1#*=}") ;;
      --ssh-option=?*) ssh_options+=("${1#*=}") ;;
      --from=?*) from=${1#*=} ;;
      --revision=?*) revision=${1#*=} ;;
      --mount=?*:/?*) mount=$1 ;;
      --mount*) stop "'$1' names no mount; use --mount=BUCKET:/FOLDER, e.g. --mount=my-bucket:/mnt/runs" ;;
      --worker=?*) worker=${1#*=} ;;
      --slice=?*) slice=${1#*=} ;;
      --max-restarts=?*) max_restarts=${1#*=} ;;
      --interval=?*) interval=${1#*=} ;;
      --dry-run) dry_run=1 ;;
      --)
        arguments=("${@:2}")
        break
        ;;
      --config*) stop "'$1' is for the run; put it after --, e.g. ./launch/tpu_pod.sh $command --name=NAME --zone=ZONE -- $1" ;;
      *) stop "unknown option '$1'; ./launch/tpu_pod.sh --help lists them" ;;
    esac
    shift
  done
}

# wanted OPTION VALUE EXAMPLE
wanted() { [ -n "$2" ] || stop "$command needs $1, e.g. $1=$3"; }

tpus() { run gcloud compute tpus "$@" --zone="$zone" ${project:+"--project=$project"}; }

# A queued resource of one node gives it its own name, one of several calls them NAME-0, NAME-1, ...
nodes() {
  local index
  if [ "$node_count" -eq 1 ]; then
    echo "$name"
  else
    for ((index = 0; index < node_count; index++)); do echo "$name-$index"; done
  fi
}

# on_worker NODE WORKER WORD...: these words as a command there. gcloud and ssh hand them over as one line.
on_worker() { tpus tpu-vm ssh "$1" --worker="$2" "${ssh_options[@]}" --command="$(quote_words "${@:3}")"; }

# every_node FUNCTION ARGUMENT...: FUNCTION NODE ARGUMENT... for all nodes at once; fails where one of them does.
every_node() {
  local node process processes=() failed=0
  for node in $(nodes); do
    if [ "$dry_run" = 1 ]; then
      "$1" "$node" "${@:2}"
    else
      "$1" "$node" "${@:2}" &
      processes+=("$!")
    fi
  done
  for process in ${processes[@]+"${processes[@]}"}; do wait "$process" || failed=1; done
  return "$failed"
}

every_worker() { every_node on_worker all "$@"; }
run_on_workers() { every_worker bash jaxrm/launch/tpu_worker.sh "$@"; }

check_shape() {
  wanted --accelerator-type "$accelerator_type" v6e-16
  wanted --runtime-version "$runtime_version" v2-alpha-tpuv6e
}

create() {
  local shape=(--node-id="$name")
  [ "$node_count" -eq 1 ] || shape=(--node-count="$node_count" --node-prefix="$name")
  tpus queued-resources create "$name" "${shape[@]}" --accelerator-type="$accelerator_type" \
    --runtime-version="$runtime_version" "${create_options[@]}"
}

delete() { tpus queued-resources delete "$name" --force --quiet; }

copy_to() { tpus tpu-vm scp "$2" "$1:jaxrm.tar.gz" --worker=all "${ssh_options[@]}"; }

# Every step is asked for its success, since watch calls this where `set -e` does not hold.
install() {
  local archive=$root/dist/jaxrm.tar.gz
  if [ -n "$from" ]; then
    # shellcheck disable=SC2016 # for the shell at the other end
    every_worker bash -euc 'rm -rf jaxrm; git clone --quiet "$1" jaxrm; git -C jaxrm checkout --quiet "$2"' \
      -- "$from" "${revision:-HEAD}" || return
  else
    run mkdir -p "$root/dist" || return
    run git -C "$root" archive --format=tar.gz --prefix=jaxrm/ --output="$archive" "${revision:-HEAD}" || return
    every_node copy_to "$archive" || return
    every_worker bash -euc 'rm -rf jaxrm; tar -xzf jaxrm.tar.gz' || return
  fi
  run_on_workers install ${mount:+"$mount"}
}

check_arguments() {
  [ "${#arguments[@]}" -gt 0 ] || stop "say what to train after --, e.g. ./launch/tpu_pod.sh $command --name=$name --zone=$zone -- --config=configs/sft_gemma_2b.py"
}

start() { run_on_workers start "${arguments[@]}"; }

# queued_state: prints ACTIVE and the like, MISSING where there is none of this name, UNKNOWN where nobody answers.
queued_state() {
  local said
  if said=$(tpus queued-resources describe "$name" --format='value(state.state)' 2>&1); then
    tail -n 1 <<<"$said"
  elif grep -q NOT_FOUND <<<"$said"; then
    echo MISSING
  else
    echo UNKNOWN
  fi
}

# Where nothing is installed yet, the answer is idle as well.
ask_workers() {
  every_worker bash -c 'if [ -e jaxrm/launch/tpu_worker.sh ]; then bash jaxrm/launch/tpu_worker.sh status; else echo idle; fi'
}

# run_state: prints what the workers' answers come to: idle, running, done, mistake, stopped, lost or UNKNOWN.
run_state() {
  local said
  said=$(ask_workers 2>/dev/null) || said='' # one that does not answer may be running
  said=$(tr -d '\r' <<<"$said" | grep -xE 'idle|running|lost|stopped|ended [0-9]+' | sort -u) || true
  if [ -z "$said" ]; then
    echo UNKNOWN
  elif grep -qx running <<<"$said"; then
    echo running # where others ended, these are about to
  elif grep -qx 'ended 2' <<<"$said"; then
    echo mistake # which starting again does not mend
  elif grep -qx stopped <<<"$said"; then
    echo stopped
  else
    case $said in
      'ended 0') echo 'done' ;;
      idle) echo idle ;;
      *) echo lost ;; # saved as the TPUs went away, or one of the processes is gone
    esac
  fi
}

watch() {
  local restarts=0 started=0 last='' state
  # again WHY
  again() {
    restarts=$((restarts + 1))
    if [ "$restarts" -gt "$max_restarts" ]; then
      say "jaxrm: $1, and --max-restarts=$max_restarts are used up; look at the log: ./launch/tpu_pod.sh logs --name=$name --zone=$zone"
      exit 1
    fi
    say "$1; beginning again, $restarts of $max_restarts"
  }
  if [ "$dry_run" = 1 ]; then
    create
    tpus queued-resources describe "$name" --format='value(state.state)'
    install
    start
    return
  fi
  while :; do
    state=$(queued_state)
    [ "$state" != ACTIVE ] || state=$(run_state)
    [ "$state" = "$last" ] || say "$(date '+%F %T') $name: $state"
    last=$state
    # What an earlier run came to does not matter to this one.
    if [ "$started" = 0 ] && [[ $state =~ ^(done|mistake|stopped|lost)$ ]]; then state=idle; fi
    case $state in
      MISSING)
        [ "$started" = 0 ] || again "the TPUs are gone"
        create || again "the TPUs could not be asked for"
        ;;
      SUSPENDED | FAILED)
        again "the TPUs were taken away, or not given ($state)"
        if ! delete || ! create; then say "That did not work; trying again in $interval s."; fi
        ;;
      idle | lost)
        [ "$state" = idle ] || again "the run was lost"
        if install && start; then started=1; else again "jaxrm could not be installed and started"; fi
        ;;
      running) started=1 ;;
      done) return 0 ;;
      mistake) return 2 ;;
      stopped) return 75 ;;
    esac
    sleep "$interval"
  done
}

status() {
  tpus queued-resources describe "$name" --format='value(state.state)'
  ask_workers
}

logs() {
  local all
  read -r -d '' -a all < <(nodes) || true
  [ -n "${all[slice]:-}" ] || stop "--slice is $slice; use 0 to $((node_count - 1)), and the --node-count of create"
  on_worker "${all[slice]}" "$worker" bash jaxrm/launch/tpu_worker.sh log
}

case $command in
  --help)
    show_help "$0"
    exit
    ;;
  create | install | start | status | logs | stop | delete | watch) parse "${@:2}" ;;
  *) stop "unknown command '$command'; use create, install, start, status, logs, stop, delete or watch" ;;
esac
wanted --name "$name" rm
wanted --zone "$zone" us-east5-b
whole_number --node-count "$node_count"
whole_number --slice "$slice"
whole_number --max-restarts "$max_restarts"
whole_number --interval "$interval"
need gcloud "install Google Cloud's command line (cloud.google.com/sdk) and log in with: gcloud auth login"
case $command in create | watch) check_shape ;; esac
case $command in start | watch) check_arguments ;; esac
case $command in
  stop) run_on_workers stop ;; # `stop` is the name of another function here
  *) "$command" ;;
esac
