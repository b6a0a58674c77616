"""Prints the JobSet, as JSON (which is YAML too), of a run on GKE; gke.sh is the command for people.

A TPU slice is one Job of the set, a worker of it one pod; several slices that train together are its replicas. GPU
nodes are the pods of one Job. Field names: jobset.sigs.k8s.io/docs/reference and GKE's pages on TPUs and GPUs.
"""

import argparse
import json
import math
import re
import sys
from typing import Any, NoReturn

PORT = 8476
# A checkpoint is written under another name and renamed when it is whole: in a bucket without folders of its own
# gcsfuse renames file by file, and only where it is allowed to. Every worker has to see at once what another wrote.
BUCKET_OPTIONS = "implicit-dirs,rename-dir-limit=200000,metadata-cache:ttl-secs:0"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        """End the program with `message`."""
        print(f"jaxrm: {message}; ./launch/gke.sh --help lists the options", file=sys.stderr)
        sys.exit(2)


def shape(text: str) -> tuple[int, ...]:
    """4x4 or 2x2x4, the topology of a slice, as numbers."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no topology; use one like 4x4 or 2x2x4")
    return tuple(int(part) for part in text.split("x"))


def positive(text: str) -> int:
    """A whole number above 0."""
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number above 0")
    return int(text)


def mount(text: str) -> tuple[str, str]:
    """SOURCE:/FOLDER, taken apart."""
    source, _, folder = text.partition(":")
    if not source or not folder.startswith("/"):
        raise argparse.ArgumentTypeError(f"'{text}' names no mount; use NAME:/FOLDER, e.g. runs:/mnt/runs")
    return source, folder


def kubernetes_name(text: str) -> str:
    """A name from which Kubernetes can make names of jobs and hosts."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(
            f"'{text}' cannot name a JobSet; use up to 40 of a-z, 0-9 and -, e.g. rm-gemma"
        )
    return text


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; what follows -- is in `arguments` of the result."""
    parser = Parser(allow_abbrev=False, add_help=False)
    add = parser.add_argument
    add("--name", required=True, type=kubernetes_name)
    add("--image", required=True)
    add("--namespace", default="default")
    device = parser.add_mutually_exclusive_group(required=True)
    device.add_argument("--tpu")
    device.add_argument("--gpu")
    add("--topology", type=shape)
    add("--chips-per-host", type=positive, default=4)
    add("--slices", type=positive, default=1)
    add("--nodes", type=positive, default=1)
    add("--gpus-per-node", type=positive, default=8)
    add("--spot", action="store_true")
    add("--max-restarts", type=int, default=10)
    add("--pvc", type=mount, action="append", default=[])
    add("--bucket", type=mount, action="append", default=[])
    add("--service-account")
    add("--queue")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, unknown = parser.parse_known_args(arguments[:split])
    options.arguments = arguments[split + 1 :]
    if unknown:
        parser.error(f"unknown option '{unknown[0]}'")
    if not options.arguments:
        parser.error(
            "say what to train after --, e.g. -- --config=configs/sft_gemma_2b.py --config.run_dir=/mnt/runs/sft"
        )
    if options.tpu and not options.topology:
        parser.error("--tpu needs --topology, e.g. --tpu=tpu-v6e-slice --topology=4x4")
    if options.tpu and math.prod(options.topology) % options.chips_per_host:
        chips = math.prod(options.topology)
        parser.error(
            f"--chips-per-host is {options.chips_per_host}, which does not divide the {chips} chips of a slice"
        )
    return options


def jobset(options: argparse.Namespace) -> dict[str, Any]:
    """The manifest."""
    if options.tpu:
        replicas, pods = options.slices, math.prod(options.topology) // options.chips_per_host
    else:
        replicas, pods = 1, options.nodes
    labels = {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {}
    job = {
        "parallelism": pods,
        "completions": pods,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # a pod by itself cannot come back: all begin again together, which is the JobSet's matter
        "podFailurePolicy": {
            "rules": [{"action": "FailJob", "onExitCodes": {"containerName": "jaxrm", "operator": "In", "values": [2]}}]
        },
        "template": pod(options),
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": options.name,
            "namespace": options.namespace,
            "labels": labels,
            # a slice is a node pool of its own
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
            if options.tpu
            else {},
        },
        "spec": {
            # Exit status 2, a mistake of the user, is what podFailurePolicy fails a Job for, and ends the set. Any
            # other (75 asked to stop and saved, 76 another process was lost, a node that went away) starts it again.
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "rules": [{"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "workers", "replicas": replicas, "template": {"spec": job}}],
        },
    }


def pod(options: argparse.Namespace) -> dict[str, Any]:
    """The template of a worker's pod."""
    volumes, mounts = [], []
    for index, (claim, folder) in enumerate(options.pvc):
        volumes.append({"name": f"pvc-{index}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"pvc-{index}", "mountPath": folder})
    for index, (bucket, folder) in enumerate(options.bucket):
        attributes = {"bucketName": bucket, "mountOptions": BUCKET_OPTIONS}
        csi = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}
        volumes.append({"name": f"bucket-{index}", "csi": csi})
        mounts.append({"name": f"bucket-{index}", "mountPath": folder})

    # On TPUs GKE itself sets TPU_WORKER_HOSTNAMES, TPU_WORKER_ID and MEGASCALE_*, which jaxrm and JAX read.
    environment: list[dict[str, Any]] = []
    if options.tpu:
        selector = {
            "cloud.google.com/gke-tpu-accelerator": options.tpu,
            "cloud.google.com/gke-tpu-topology": "x".join(map(str, options.topology)),
        }
        resource = {"google.com/tpu": options.chips_per_host}
    else:
        selector = {"cloud.google.com/gke-accelerator": options.gpu}
        resource = {"nvidia.com/gpu": options.gpus_per_node}
        process = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
        environment = [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{options.name}-workers-0-0.{options.name}:{PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": str(options.nodes)},
            {"name": "JAX_PROCESS_ID", "valueFrom": process},
            {"name": "LD_LIBRARY_PATH", "value": "/usr/local/nvidia/lib64"},  # where GKE puts NVIDIA's driver
        ]
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})  # NCCL's, of 64 MiB by default
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    tolerations = []
    if options.spot:
        spot = "cloud.google.com/gke-spot"
        selector[spot] = "true"
        tolerations = [{"key": spot, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]

    container = {
        "name": "jaxrm",
        "image": options.image,
        # Kubernetes replaces $(NAME) in arguments; a doubled dollar is one that it leaves alone.
        "args": [argument.replace("$", "$$") for argument in options.arguments],
        "env": environment,
        "resources": {"limits": resource},
        "volumeMounts": mounts,
    }
    if options.tpu:  # as xpk does: the chips' devices, and locking memory for them, are root's
        container["securityContext"] = {"privileged": True, "runAsUser": 0}
    spec: dict[str, Any] = {
        "restartPolicy": "Never",  # what podFailurePolicy asks for
        "terminationGracePeriodSeconds": 120,  # from SIGTERM on, to save; Spot machines have about 25 s
        "nodeSelector": selector,
        "tolerations": tolerations,
        # The group of the image's user, who has to write into the mounts.
        "securityContext": {"fsGroup": 1000, "fsGroupChangePolicy": "OnRootMismatch"},
        "containers": [container],
        "volumes": volumes,
    }
    if options.service_account:
        spec["serviceAccountName"] = options.service_account
    return {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"} if options.bucket else {}}, "spec": spec}


if __name__ == "__main__":
    print(json.dumps(jobset(parse(sys.argv[1:])), indent=2))
