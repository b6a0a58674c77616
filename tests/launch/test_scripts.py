"""The start scripts, run for real against stand-ins for the tools that they call."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("train.sh", "slurm.sh", "tpu_pod.sh", "tpu_worker.sh", "gke.sh")
# What shells and wrappers like to break.
AWKWARD = (
    "--config=configs/sft_tiny.py",
    "--config.a=two  words",
    '--config.b=it\'s "$HOME" `id` $(id) \\ ; & * ?',
    "",
)
WAIT = "trap 'exit 75' TERM\nwhile :; do sleep 0.05; done"
POD = ("--name=rm", "--zone=us-east5-b")
SHAPE = ("--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e")
GPUS = ("--name=rm", "--image=jaxrm:gpu", "--gpu=nvidia-h100-80gb", "--nodes=2")
SLICES = ("--name=rm", "--image=jaxrm:tpu", "--tpu=tpu-v6e-slice", "--topology=4x4", "--slices=2")


# --- every script


@pytest.mark.parametrize("script", COMMANDS)
def test_help_is_the_comment_that_opens_the_script(machine, script):
    said = machine.run(script, "--help").stdout
    header = (ROOT / "launch" / script).read_text().split("set -euo pipefail")[0].splitlines()[1:]
    assert said.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in header]


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("train.sh", (), "say what to train, e.g."),
        ("train.sh", ("--accelerator=npu", "--config=c"), "use --accelerator=cpu, gpu or tpu"),
        ("slurm.sh", ("--gpus-per-node=8", "--config=c.py"), "put it after --"),
        ("slurm.sh", ("--gpus-per-node=8",), "say what to train after --"),
        ("slurm.sh", ("--nodes=2", "--", "--config=c.py"), "say how many GPUs a node has, e.g. --gpus-per-node=8"),
        ("slurm.sh", ("--gpus-per-node=all", "--", "--config=c.py"), "use a whole number"),
        ("slurm.sh", ("--gpus-per-node=1", "--max-restarts=-1", "--", "--config=c.py"), "--max-restarts is '-1'"),
        ("slurm.sh", ("--gpus-per-node=1", "--", "--config=c.py"), "'sbatch' is not on PATH"),
        ("tpu_pod.sh", ("make",), "unknown command 'make'; use create,"),
        ("tpu_pod.sh", ("create", *POD, "--sopt"), "unknown option '--sopt'; ./launch/tpu_pod.sh --help"),
        ("tpu_pod.sh", ("start", *POD, "--config=c.py"), "put it after --"),
        ("tpu_pod.sh", ("create", "--zone=z"), "create needs --name, e.g. --name=rm"),
        ("tpu_pod.sh", ("create", *POD), "'gcloud' is not on PATH; install Google Cloud's command line"),
        ("tpu_pod.sh", ("create", *POD, "--dry-run"), "create needs --accelerator-type, e.g."),
        ("tpu_pod.sh", ("start", *POD, "--dry-run"), "say what to train after --"),
        ("tpu_pod.sh", ("install", *POD, "--mount=bucket"), "use --mount=BUCKET:/FOLDER"),
        ("tpu_pod.sh", ("status", *POD, "--node-count=two"), "--node-count is 'two'; use a whole number"),
        ("tpu_pod.sh", ("logs", *POD, "--slice=1", "--dry-run"), "--slice is 1; use 0 to 0"),
        ("tpu_worker.sh", ("begin",), "unknown command 'begin'"),
        ("tpu_worker.sh", ("start", "--config=c.py"), "install it first: ./launch/tpu_pod.sh install"),
        ("gke.sh", ("run",), "unknown command 'run'; use apply,"),
        ("gke.sh", ("logs",), "logs needs --name"),
        ("gke.sh", ("logs", "--name=rm"), "'kubectl' is not on PATH; install it"),
        ("gke.sh", ("logs", "--name=rm", "--spot"), "unknown option '--spot' of logs"),
        ("gke.sh", ("manifest", *GPUS, "--sopt", "--", "--config=c"), "unknown option '--sopt'"),
        ("gke.sh", ("manifest", *GPUS), "say what to train after --"),
        ("gke.sh", ("manifest", *GPUS, "--name=R M", "--", "--config=c"), "'R M' cannot name a JobSet"),
        ("gke.sh", ("manifest", *SLICES, "--topology=4", "--", "--config=c"), "use one like 4x4 or 2x2x4"),
        ("gke.sh", ("manifest", *SLICES, "--chips-per-host=3", "--", "--config=c"), "does not divide the 16 chips"),
        ("gke.sh", ("manifest", *GPUS, "--pvc=runs", "--", "--config=c"), "use NAME:/FOLDER"),
        ("gke.sh", ("xpk", "--name=rm", "--", "--config=c"), "xpk needs --cluster, e.g."),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_type(machine, script, arguments, said):
    result = machine.run(script, *arguments, status=2)
    assert result.stderr.startswith("jaxrm: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
    assert not result.stdout
    assert not machine.record.exists()


@pytest.mark.parametrize(
    ("script", "arguments", "last"),
    [
        ("train.sh", ("--dry-run", *AWKWARD), ["-m", "jaxrm.train", *AWKWARD]),
        ("slurm.sh", ("--gpus-per-node=8", "--dry-run", "--", *AWKWARD), ["10", *AWKWARD]),
        ("gke.sh", ("delete", "--name=rm", "--dry-run"), ["kubectl", "delete", "jobset", "rm", "--namespace=default"]),
    ],
)
def test_a_dry_run_prints_the_commands_and_does_nothing(machine, script, arguments, last):
    machine.stand_in("sbatch")
    machine.stand_in("kubectl")
    lines = machine.run(script, *arguments, JAXRM_VENV=str(machine.folder / "new")).stdout.splitlines()
    assert machine.words(lines[-1])[-len(last) :] == last
    if script != "gke.sh":
        assert machine.words(lines[0])[-4:] == ["-m", "venv", "--clear", str(machine.folder / "new")]
        assert machine.words(lines[1]) == ["cd", str(machine.root)]
        assert machine.words(lines[2])[:3] == ["uv", "pip", "install"]
    assert not machine.record.exists()
    assert not (machine.folder / "new").exists()


# --- train.sh


def test_train_installs_once_and_hands_every_argument_on(machine):
    for _ in range(2):
        machine.run("train.sh", "--accelerator=cpu", *AWKWARD)
    assert [call[-2:] for call in machine.calls("uv")] == [["-r", "requirements.txt"]]
    runs = [note for note in machine.notes("python") if note["arguments"][1] == "jaxrm.train"]
    assert [note["arguments"] for note in runs] == [["-m", "jaxrm.train", *AWKWARD]] * 2
    assert {note["folder"] for note in runs} == {str(machine.root)}


@pytest.mark.parametrize(("driver", "installed"), [("exit 0", ".[gpu]"), ("exit 9", "requirements.txt")])
def test_train_takes_a_gpu_whose_driver_answers(machine, driver, installed):
    machine.stand_in("nvidia-smi", driver)
    machine.run("train.sh", "--config=c.py")
    assert machine.calls("uv")[0][-1] == installed


@pytest.mark.parametrize(
    ("devices", "found"),
    [({}, "cpu"), ({"00": "8086:0D57", "01": "1AE0:0042"}, "cpu"), ({"00": "1AE0:0042", "01": "1AE0:006F"}, "tpu")],
)
def test_a_tpu_is_known_by_its_pci_device(machine, devices, found):
    for slot, number in devices.items():
        folder = machine.folder / "sys/bus/pci/devices" / slot
        folder.mkdir(parents=True)
        (folder / "uevent").write_text(f"DRIVER=vfio-pci\nPCI_ID={number}\n")
    command = f". '{machine.root}/launch/environment.sh'; find_accelerator '{machine.folder}/'"
    said = subprocess.run(
        ["bash", "-euc", command], env=machine.environment, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == found


@pytest.mark.parametrize("status", [2, 75])
def test_train_ends_as_the_run_did(machine, status):
    machine.virtual_environment(machine.folder / "other", f"exit {status}")
    machine.run("train.sh", "--config=c.py", status=status, JAXRM_VENV=str(machine.folder / "other"))


def test_quickstart_takes_what_train_installed(machine):
    machine.run("train.sh", "--accelerator=cpu", "--config=c.py")
    machine.run("quickstart.sh", *AWKWARD[1:])
    assert len(machine.calls("uv")) == 1
    assert machine.calls("python")[-1] == ["-m", "jaxrm.train", "--config=configs/quickstart.py", *AWKWARD[1:]]


# --- slurm.sh


def test_slurm_submits_one_task_a_gpu(machine):
    """Options of the user come last, so that they win."""
    machine.stand_in("sbatch")
    machine.run("slurm.sh", "--nodes=2", "--gpus-per-node=h100:8", "--time=1:00", "--max-restarts=3", "--", *AWKWARD)
    script = [str(machine.root / "launch/slurm.sh"), "job", str(machine.root), "3", *AWKWARD]
    (call,) = machine.calls("sbatch")
    assert call[-len(script) :] == script
    options = call[: -len(script)]
    assert options[-3:] == ["--nodes=2", "--gpus-per-node=h100:8", "--time=1:00"]
    assert {"--requeue", "--signal=TERM@120", "--ntasks-per-node=8", f"--chdir={machine.root}"} < set(options)
    assert machine.calls("uv")[0][-1] == ".[gpu]"


def test_slurm_without_gpus_takes_a_number_of_tasks(machine):
    """It installs the requirements of CPUs."""
    machine.stand_in("sbatch")
    machine.run("slurm.sh", "--ntasks-per-node=4", "--", "--config=c.py")
    assert machine.calls("sbatch")[0].count("--ntasks-per-node=4") == 1
    assert machine.calls("uv")[0][-1] == "requirements.txt"


@pytest.mark.parametrize(
    ("status", "restarts", "state", "requeued"),
    [
        (0, 0, "RUNNING", False),
        (2, 0, "RUNNING", False),
        (75, 0, "RUNNING", True),
        (76, 2, "RUNNING", True),
        (137, 0, "RUNNING", True),
        (75, 3, "RUNNING", False),
        (75, 0, "COMPLETING", False),
    ],
)
def test_slurm_requeues_what_can_go_on_so_many_times(machine, status, restarts, state, requeued):
    # The shell of the job hears SIGTERM as well, and lives on to see how its processes ended.
    machine.stand_in("srun", f"kill -TERM $PPID; sleep 0.1; exit {status}")
    machine.stand_in("squeue", f"echo {state}")
    machine.stand_in("scontrol")
    variables = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(restarts), "SLURM_CPUS_PER_TASK": "6"}
    machine.run("slurm.sh", "job", str(machine.root), "3", *AWKWARD, status=status, **variables)
    python = machine.environment["JAXRM_VENV"] + "/bin/python"
    (note,) = machine.notes("srun")
    assert note["arguments"] == ["--kill-on-bad-exit=0", python, "-m", "jaxrm.train", *AWKWARD]
    assert note["variables"]["SRUN_CPUS_PER_TASK"] == "6"
    assert machine.calls("scontrol") == ([["requeue", "17"]] if requeued else [])


# --- tpu_pod.sh


def test_pod_asks_for_a_slice_or_for_several(cloud):
    cloud.run("tpu_pod.sh", "create", *POD, *SHAPE, "--spot", "--project=p", "--create-option=--network=a b")
    cloud.run("tpu_pod.sh", "create", *POD, *SHAPE, "--node-count=2")
    one, two = ([word for word in call if word.startswith("--")] for call in cloud.tpu_calls("create"))
    assert one == ["--node-id=rm", *SHAPE, "--quiet", "--spot", "--network=a b", "--zone=us-east5-b", "--project=p"]
    assert two == ["--node-count=2", "--node-prefix=rm", *SHAPE, "--quiet", "--zone=us-east5-b"]


@pytest.mark.parametrize("count", [1, 2])
def test_pod_runs_one_command_on_every_worker_until_stopped(cloud, count):
    pod = (*POD, f"--node-count={count}")
    cloud.trains(WAIT)
    cloud.states("ACTIVE")
    cloud.run("tpu_pod.sh", "create", *pod, *SHAPE)
    assert cloud.run("tpu_pod.sh", "status", *pod).stdout.split().count("idle") == 2 * count
    cloud.run("tpu_pod.sh", "install", *pod)
    assert [call[-1] for call in cloud.calls("uv")] == [".[tpu]"] * 2 * count
    cloud.run("tpu_pod.sh", "start", *pod, "--", *AWKWARD)
    assert cloud.run("tpu_pod.sh", "status", *pod).stdout.split().count("running") == 2 * count
    cloud.run("tpu_pod.sh", "start", *pod, "--", *AWKWARD, status=1)  # one is going on already
    assert cloud.run("tpu_pod.sh", "stop", *pod).stdout.split().count("stopped") == 2 * count
    runs = [note for note in cloud.notes("python") if note["arguments"][1] == "jaxrm.train"]
    assert [note["arguments"][2:] for note in runs] == [list(AWKWARD)] * 2 * count
    variables = [note["variables"] for note in runs]
    assert {entry["JAX_NUM_PROCESSES"] for entry in variables} == {str(2 * count)}
    assert {entry["JAX_PROCESS_ID"] for entry in variables} == {str(index) for index in range(2 * count)}
    # gcloud's own 10.0.0.1:8081 is another service's port; rm- of a single slice has no number
    assert {entry["JAX_COORDINATOR_ADDRESS"] for entry in variables} == {f"10.0.{'rm' if count == 1 else 0}.1:8476"}
    assert "ended with status 75" in next(cloud.cloud.glob("*/1/jaxrm-run/log")).read_text()


def test_pod_installs_from_an_address_and_mounts_what_is_named(cloud):
    said = cloud.run("tpu_pod.sh", "install", *POD, "--from=a b'c", "--mount=my runs:/mnt/r", "--dry-run").stdout
    clone, install = (cloud.words(line)[-2].removeprefix("--command=") for line in said.splitlines())
    assert cloud.words(clone)[-2:] == ["a b'c", "HEAD"]
    assert cloud.words(install) == ["bash", "jaxrm/launch/tpu_worker.sh", "install", "--mount=my runs:/mnt/r"]
    assert not cloud.calls("gcloud")


@pytest.mark.parametrize(
    ("source", "command"),
    [("my-bucket", ["gcsfuse", "my-bucket"]), ("10.0.0.2:/share", ["mount", "-t", "nfs", "10.0.0.2:/share"])],
)
def test_worker_mounts_buckets_and_nfs_once(cloud, source, command):
    cloud.virtual_environment(cloud.folder / ".venv-jaxrm")
    cloud.stand_in("sudo")
    cloud.stand_in("gcsfuse")
    cloud.stand_in("mount.nfs")
    cloud.run("tpu_worker.sh", "install", f"--mount={source}:/mnt/no such folder")
    calls = cloud.calls("sudo") + [["gcsfuse", *call] for call in cloud.calls("gcsfuse")]
    assert any(call[0] == command[0] and call[-2:] == [source, "/mnt/no such folder"] for call in calls)
    cloud.record.unlink()
    cloud.run("tpu_worker.sh", "install", f"--mount={source}:/proc")
    assert not cloud.calls("sudo") + cloud.calls("gcsfuse")


def test_worker_of_an_old_image_gets_a_python(cloud):
    cloud.virtual_environment(cloud.folder / ".venv-jaxrm")
    new = cloud.folder / "new-python"
    (cloud.bin / "python3.12").rename(new)
    cloud.stand_in("python3", f'[ "$1" != -c ] || exit 1\ncase $* in *find*) echo {new} ;; esac')
    cloud.run("tpu_worker.sh", "install")
    asked = [call for call in cloud.calls("python3") if call[0] != "-c"]
    assert [call[2] for call in asked] == ["install", "python", "python"]


def test_worker_whose_machine_was_started_anew_has_lost_its_run(cloud):
    folder = cloud.folder / "jaxrm-run"
    folder.mkdir()
    (folder / "supervisor").write_text(f"{os.getpid()}\n")  # the number is another process's by now
    assert cloud.run("tpu_worker.sh", "status").stdout == "lost\n"
    (folder / "status").write_text("76\n")
    assert cloud.run("tpu_worker.sh", "status").stdout == "ended 76\n"


def test_watch_creates_installs_and_restarts_after_preemption(cloud):
    cloud.states("WAITING_FOR_RESOURCES PROVISIONING ACTIVE ACTIVE SUSPENDING SUSPENDED", "ACTIVE")
    cloud.trains(f'if [ "$CREATED" = 2 ]; then exit 0; fi\n{WAIT}')
    said = cloud.run("tpu_pod.sh", "watch", *POD, *SHAPE, "--interval=0", "--", *AWKWARD).stderr
    assert "taken away, or not given (SUSPENDED); beginning again, 1 of 10" in said
    changes = [call[3] for call in cloud.calls("gcloud") if call[2] == "queued-resources" and call[3] != "describe"]
    assert changes == ["create", "delete", "create"]
    runs = [call for call in cloud.calls("python") if call[1] == "jaxrm.train"]
    assert runs == [["-m", "jaxrm.train", *AWKWARD]] * 4


def test_watch_gives_up_after_so_many_restarts(cloud):
    cloud.states("ACTIVE")
    cloud.trains("exit 76")
    options = (*POD, *SHAPE, "--interval=0", "--max-restarts=2")
    said = cloud.run("tpu_pod.sh", "watch", *options, "--", "--config=c.py", status=1).stderr
    assert said.splitlines()[-1].startswith("jaxrm: the run was lost, and --max-restarts=2 are used up")
    assert len([call for call in cloud.calls("python") if call[1] == "jaxrm.train"]) == 3 * 2


@pytest.mark.parametrize(
    ("training", "status"),
    [("exit 2", 2), ('touch "$HOME/jaxrm-run/stopped"; exit 75', 75)],
    ids=["a mistake", "stopped by hand"],
)
def test_watch_does_not_start_again_what_should_not_go_on(cloud, training, status):
    cloud.states("ACTIVE")
    cloud.trains(training)
    cloud.run("tpu_pod.sh", "watch", *POD, *SHAPE, "--interval=0", "--", "--config=c.py", status=status)
    assert len([call for call in cloud.calls("python") if call[1] == "jaxrm.train"]) == 2


# --- gke.sh


def manifest(machine, *arguments: str) -> dict:
    return yaml.safe_load(machine.run("gke.sh", "manifest", *arguments, "--", *AWKWARD).stdout)


def job_and_pod(jobset: dict) -> tuple[dict, dict]:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    return replicated, job["template"]["spec"]


def test_gke_slices_are_replicas_and_their_hosts_pods(machine):
    jobset = manifest(machine, *SLICES, "--spot", "--queue=q", "--service-account=s", "--bucket=runs:/mnt/runs")
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    annotations = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert jobset["metadata"]["annotations"] == annotations
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    replicated, pod = job_and_pod(jobset)
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 4, 4, 0)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["securityContext"] == {"privileged": True, "runAsUser": 0}  # the chips are root's
    assert container["env"] == []  # GKE itself tells TPU workers of each other
    assert pod["serviceAccountName"] == "s"
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "runs"
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert container["volumeMounts"] == [{"name": pod["volumes"][0]["name"], "mountPath": "/mnt/runs"}]


def test_gke_gpu_pods_are_told_of_each_other(machine):
    replicated, pod = job_and_pod(manifest(machine, *GPUS, "--pvc=runs:/mnt/runs"))
    assert (replicated["replicas"], replicated["template"]["spec"]["parallelism"]) == (1, 2)
    assert replicated["template"]["spec"]["completionMode"] == "Indexed"
    (container,) = pod["containers"]
    variables = {entry["name"]: entry for entry in container["env"]}
    assert variables["JAX_COORDINATOR_ADDRESS"]["value"] == f"rm-{replicated['name']}-0-0.rm:8476"
    assert variables["JAX_NUM_PROCESSES"]["value"] == "2"
    path = variables["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "runs"}
    names = [volume["name"] for volume in pod["volumes"]]
    assert names == [mount["name"] for mount in container["volumeMounts"]]


def test_gke_fails_at_a_mistake_and_begins_again_otherwise(machine):
    jobset = manifest(machine, *GPUS, "--max-restarts=3")
    replicated, pod = job_and_pod(jobset)
    rules = replicated["template"]["spec"]["podFailurePolicy"]["rules"]
    assert [(rule["action"], rule["onExitCodes"]["values"]) for rule in rules] == [("FailJob", [2])]
    assert rules[0]["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert pod["restartPolicy"] == "Never"
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 3
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]


def test_gke_arguments_survive_yaml_and_kubernetes_dollars(machine):
    _, pod = job_and_pod(manifest(machine, *GPUS))
    # Kubernetes makes one dollar of two and leaves what follows alone.
    assert [word.replace("$$", "$") for word in pod["containers"][0]["args"]] == list(AWKWARD)
    assert "$(" not in pod["containers"][0]["args"][2].replace("$$", "")


def test_gke_applies_the_manifest_and_lists_the_pods_of_the_run(machine):
    machine.stand_in("kubectl", f'[ "$1" != apply ] || cat >{machine.folder}/applied')
    machine.run("gke.sh", "apply", *SLICES, "--", *AWKWARD)
    assert json.loads((machine.folder / "applied").read_text()) == manifest(machine, *SLICES)
    machine.run("gke.sh", "logs", "--name=rm", "--worker=3", "--slice=1", "--namespace=n")
    machine.run("gke.sh", "status", "--name=rm")
    machine.run("gke.sh", "delete", "--name=rm")
    pods = "jobset.sigs.k8s.io/jobset-name=rm"
    index = ",jobset.sigs.k8s.io/job-index=1,batch.kubernetes.io/job-completion-index=3"
    default = "--namespace=default"
    assert machine.calls("kubectl") == [
        ["apply", "--filename=-"],
        ["logs", "--namespace=n", f"--selector={pods}{index}", "--container=jaxrm", "--tail=200", "--follow"],
        ["get", "jobset", "rm", default],
        ["get", "pods", default, f"--selector={pods}", "--output=wide"],
        ["delete", "jobset", "rm", default],
    ]


def test_gke_xpk_gets_the_run_as_one_quoted_command(machine):
    machine.stand_in("xpk")
    options = ("--name=rm", "--cluster=c", "--tpu-type=v6e-16", "--image=i", "--slices=2", "--zone=z")
    machine.run("gke.sh", "xpk", *options, "--", *AWKWARD)
    (call,) = machine.calls("xpk")
    assert call[:6] == ["workload", "create", "--workload=rm", "--cluster=c", "--tpu-type=v6e-16", "--num-slices=2"]
    assert "--restart-on-exit-codes=75,76" in call
    assert "--zone=z" in call
    command = call[-1].removeprefix("--command=")
    assert machine.words(command) == ["python", "-m", "jaxrm.train", *AWKWARD]


# --- Dockerfile


def test_the_container_file_knows_the_extras_of_pyproject(machine):
    text = (ROOT / "launch/Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert re.search(r"^ *gpu \| tpu\) pip install", text, re.MULTILINE)
    assert {"gpu", "tpu"} <= set(project["optional-dependencies"])
    version = re.search(r"^FROM python:3\.(\d+)", text, re.MULTILINE)
    assert version is not None
    assert int(version[1]) >= int(project["requires-python"].removeprefix(">=3."))
    instructions = [line.split()[0] for line in text.splitlines() if re.match(r"[A-Z]+ ", line)]
    assert instructions.index("USER") < instructions.index("ENTRYPOINT")
    assert 'ENTRYPOINT ["python", "-m", "jaxrm.train"]' in text
    # what is copied before the code is what an installation reads
    copied = re.search(r"^COPY (?!--)(.*) \./$", text, re.MULTILINE)
    assert copied is not None
    assert {"requirements.txt", "pyproject.toml", "setup.py", *project["license-files"], project["readme"]} == set(
        copied[1].split()
    )
