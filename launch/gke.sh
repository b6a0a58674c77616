#!/usr/bin/env bash
# Trains on GKE, on TPU slices or GPU nodes: ./launch/gke.sh COMMAND --name=NAME [OPTION...] -- --config=...
#
# Needs kubectl, connected to a cluster with JobSet 0.6 or newer and with node pools of the machines that are asked
# for, Python 3.11 or newer here, and an image of jaxrm (launch/Dockerfile) that the cluster can pull. COMMAND is one of
#
#   apply      starts the run: writes the JobSet and gives it to kubectl
#   manifest   prints what apply would give, and does nothing
#   status     says the state of the JobSet and of its pods
#   logs       follows the log of a worker: --worker=0 --slice=0
#   delete     SIGTERM to the run, which saves, and removes it. apply with the same run_dir continues
#   xpk        starts it with the xpk command instead, on a cluster that xpk made: --cluster=NAME --tpu-type=v6e-16,
#              with --name, --image, --slices, --max-restarts and xpk's --zone and --project. Mounts come from
#              xpk storage attach
#
# Options of apply and manifest:
#
#   --image=IMAGE                                 e.g. us-docker.pkg.dev/PROJECT/jaxrm/jaxrm:tpu
#   --tpu=tpu-v6e-slice --topology=4x4            GKE's names of the TPU and of the slice's shape; --slices=2 for two
#                                                 that train together; --chips-per-host=4, which is 8 on some machines
#   --gpu=nvidia-h100-80gb --nodes=2              GKE's name of the GPU; --gpus-per-node=8
#   --pvc=NAME:/FOLDER, --bucket=NAME:/FOLDER     mounts a volume claim (Filestore, say) or a bucket, by gcsfuse
#   --service-account=NAME                        the Kubernetes account that may use the bucket
#   --spot, --queue=NAME, --namespace=NAME        Spot machines; a queue of Kueue; another namespace than default
#   --max-restarts=10                             how often the run may begin again, from its latest checkpoint
#
#   ./launch/gke.sh apply --name=rm --image=IMAGE --tpu=tpu-v6e-slice --topology=4x4 --slices=2 --pvc=runs:/mnt/runs \
#     -- --config=configs/rm_seq2seq_gemma_2b.py --config.run_dir=/mnt/runs/rm
#
# Every worker reads and writes run_dir, so it has to be below one of the mounts; jaxrm takes no addresses like gs://.
# A run that ended with status 2, something to mend, fails at once; with any other than 0 all workers begin again.
# --dry-run prints the commands and does nothing.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=launch/environment.sh
. "$root/launch/environment.sh"

command=${1:---help}
name='' namespace=default worker=0 slice=0 cluster='' tpu_type='' image='' slices=1 max_restarts=10
xpk_options=() arguments=() given=()

# What apply and manifest take is looked at by jobset.py; this is for the others.
parse() {
  while [ "$#" -gt 0 ]; do
    case $command:$1 in
      *:--name=?*) name=${1#*=} ;;
      logs:--namespace=?* | status:--namespace=?* | delete:--namespace=?*) namespace=${1#*=} ;;
      logs:--worker=?*) worker=${1#*=} ;;
      logs:--slice=?*) slice=${1#*=} ;;
      xpk:--cluster=?*) cluster=${1#*=} ;;
      xpk:--tpu-type=?*) tpu_type=${1#*=} ;;
      xpk:--image=?*) image=${1#*=} ;;
      xpk:--slices=?*) slices=${1#*=} ;;
      xpk:--max-restarts=?*) max_restarts=${1#*=} ;;
      xpk:--zone=?* | xpk:--project=?*) xpk_options+=("$1") ;;
      xpk:--)
        arguments=("${@:2}")
        break
        ;;
      *) stop "unknown option '$1' of $command; ./launch/gke.sh --help lists them" ;;
    esac
    shift
  done
}

# wanted OPTION VALUE EXAMPLE
wanted() { [ -n "$2" ] || stop "$command needs $1, e.g. $1=$3"; }

need_kubectl() { need kubectl "install it (kubernetes.io/docs/tasks/tools), then connect it: gcloud container clusters get-credentials CLUSTER"; }

manifest() {
  local interpreter
  interpreter=$(find_python)
  "$interpreter" "$root/launch/jobset.py" ${given[@]+"${given[@]}"}
}

apply() {
  local text
  need_kubectl
  text=$(manifest)
  if [ "$dry_run" = 1 ]; then
    printf '%s | kubectl apply --filename=-\n' "$(quote_words "$root/launch/gke.sh" manifest "${given[@]}")"
  else
    kubectl apply --filename=- <<<"$text"
  fi
}

xpk_create() {
  wanted --cluster "$cluster" my-cluster
  wanted --tpu-type "$tpu_type" v6e-16
  wanted --image "$image" us-docker.pkg.dev/PROJECT/jaxrm/jaxrm:tpu
  [ "${#arguments[@]}" -gt 0 ] || stop "say what to train after --, e.g. -- --config=configs/sft_gemma_2b.py"
  need xpk "install it with: pip install xpk"
  # By itself xpk begins again after the statuses 42 and 127 to 255 only.
  run xpk workload create --workload="$name" --cluster="$cluster" --tpu-type="$tpu_type" --num-slices="$slices" \
    --docker-image="$image" --max-restarts="$max_restarts" --restart-on-exit-codes=75,76 \
    --termination-grace-period-seconds=120 ${xpk_options[@]+"${xpk_options[@]}"} \
    --command="$(quote_words python -m jaxrm.train "${arguments[@]}")"
}

# Options up to --, after which everything is the run's.
here=1
for argument in "${@:2}"; do
  [ "$argument" != -- ] || here=0
  if [ "$here$argument" = 1--dry-run ]; then dry_run=1; else given+=("$argument"); fi
done
case $command in
  --help)
    show_help "$0"
    exit
    ;;
  manifest | apply)
    "$command"
    exit
    ;;
  logs | status | delete | xpk) parse ${given[@]+"${given[@]}"} ;;
  *) stop "unknown command '$command'; use apply, manifest, status, logs, delete or xpk" ;;
esac
wanted --name "$name" rm
pods=jobset.sigs.k8s.io/jobset-name=$name
[ "$command" = xpk ] || need_kubectl
case $command in
  logs)
    pods+=,jobset.sigs.k8s.io/job-index=$slice,batch.kubernetes.io/job-completion-index=$worker
    run kubectl logs --namespace="$namespace" --selector="$pods" --container=jaxrm --tail=200 --follow
    ;;
  status)
    run kubectl get jobset "$name" --namespace="$namespace"
    run kubectl get pods --namespace="$namespace" --selector="$pods" --output=wide
    ;;
  delete) run kubectl delete jobset "$name" --namespace="$namespace" ;;
  xpk) xpk_create ;;
esac
