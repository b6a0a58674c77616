"""Several processes on one machine: the losses of one, an end when one is lost, and one line for what disagrees."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxrm.errors import UserError
from jaxrm.runtime.processes import Processes, find_processes

DEVICES = 4
SFT = ["--config=configs/sft_tiny.py", "--config.data.max_length=64", "--config.evaluation.samples=0"]
LOGGED = ["--config.logging.every=1", "--config.evaluation.every=1000"]


def start(arguments: list[str], folder: Path, count: int, port: int = 0) -> list[subprocess.Popen]:
    """Start a job of ``count`` processes that have `DEVICES` devices between them."""
    port = port or free_port()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count}",
    }
    job = []
    for index in range(count):
        which = [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={index}"]
        command = [sys.executable, "-m", "jaxrm.train", *arguments, *LOGGED, f"--config.run_dir={folder}"]
        job.append(
            subprocess.Popen(
                [*command, *(which if count > 1 else [])],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return job


def finish(job: list[subprocess.Popen]) -> list[str]:
    try:
        return [process.communicate(timeout=240)[0] for process in job]
    finally:
        for process in job:
            process.kill()


def stop(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def run(arguments: list[str], folder: Path, count: int) -> None:
    job = start(arguments, folder, count)
    said = finish(job)
    assert all(process.returncode == 0 for process in job), "\n".join(said)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def curve(folder: Path, name: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}


def same_curve(first: Path, second: Path, name: str) -> None:
    expected, found = curve(first, name), curve(second, name)
    assert expected.keys() == found.keys() and len(expected) > 1
    np.testing.assert_allclose([found[s] for s in expected], list(expected.values()), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process: sft, rm from it, ppo with both."""
    folder = tmp_path_factory.mktemp("alone")
    run([*SFT, "--config.num_steps=4"], folder / "sft", 1)
    run(reward_model(folder), folder / "rm", 1)
    run(ppo(folder), folder / "ppo", 1)
    return folder


def reward_model(folder: Path) -> list[str]:
    return [
        "--config=configs/rm_seq2seq_tiny.py",
        f"--config.model.path={folder / 'sft'}",
        "--config.data.path=task:safety",
        "--config.num_steps=3",
    ]


def ppo(folder: Path) -> list[str]:
    return [
        "--config=configs/ppo_tiny.py",
        f"--config.model.path={folder / 'sft'}",
        f"--config.reward.model={folder / 'rm'}",
        "--config.num_steps=2",
        "--config.data.batch_size=16",
    ]


@pytest.mark.parametrize("count", [2, 4])
def test_sft_in_several_processes_has_the_losses_of_one(alone: Path, tmp_path: Path, count: int) -> None:
    run([*SFT, "--config.num_steps=4"], tmp_path / "sft", count)
    same_curve(alone / "sft", tmp_path / "sft", "loss")
    same_curve(alone / "sft", tmp_path / "sft", "eval_loss")


def test_a_reward_model_in_two_processes_has_the_losses_of_one(alone: Path, tmp_path: Path) -> None:
    run(reward_model(alone), tmp_path / "rm", 2)
    same_curve(alone / "rm", tmp_path / "rm", "loss")


def test_ppo_in_four_processes_has_the_rewards_and_losses_of_one(alone: Path, tmp_path: Path) -> None:
    run(ppo(alone), tmp_path / "ppo", 4)
    for name in ("reward", "policy_loss", "value_loss", "kl"):
        same_curve(alone / "ppo", tmp_path / "ppo", name)


def test_when_one_process_is_killed_the_others_stop_and_the_job_continues_exactly(tmp_path: Path) -> None:
    arguments = [*SFT, "--config.num_steps=60", "--config.checkpoint.every=20"]
    killed, in_one = tmp_path / "killed", tmp_path / "in_one"
    run(arguments, tmp_path / "whole", 1)
    job = start(arguments, killed, 4)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "20").is_dir() and time.monotonic() < deadline:
        time.sleep(0.02)
    job[3].send_signal(signal.SIGKILL)
    said = finish(job)
    assert all(process.returncode not in (0, None) for process in job), "\n".join(said)
    assert all("another task died" in text or "another one is gone" in text for text in said[:3]), "\n".join(said)
    shutil.copytree(killed, in_one)
    run(arguments, killed, 4)
    run(arguments, in_one, 1)
    same_curve(tmp_path / "whole", killed, "loss")
    same_curve(tmp_path / "whole", in_one, "loss")


def test_processes_that_disagree_on_the_config_all_say_so(tmp_path: Path) -> None:
    port = free_port()
    first = start([*SFT, "--config.seed=1"], tmp_path / "run", 2, port)
    stop(first[1])
    second = start([*SFT, "--config.seed=2"], tmp_path / "run", 2, port)
    stop(second[0])
    for text in finish([first[0], second[1]]):
        assert "process 1 has another config.seed than process 0" in text
    assert not (tmp_path / "run").exists()


def test_a_coordinator_that_is_not_there_is_named_after_a_bounded_wait(tmp_path: Path) -> None:
    port = free_port()
    (nobody, alone) = start([*SFT, "--start_timeout=2"], tmp_path / "run", 2, port)
    stop(nobody)
    (said,) = finish([alone])
    assert alone.returncode == 2
    assert f"--coordinator is localhost:{port}, which could not be reached in 2 s" in said


def test_flags_come_before_variables_and_clusters_are_recognized() -> None:
    jax_variables = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert find_processes(None, None, None, {}) is None
    assert find_processes(None, None, None, jax_variables) == Processes("a:1", 2, 1)
    assert find_processes("b:2", 4, 3, jax_variables) == Processes("b:2", 4, 3)
    assert find_processes("b:2", 1, 0, {}) is None
    assert find_processes(None, None, None, {"SLURM_STEP_NUM_TASKS": "2"}) == Processes()
    assert find_processes(None, None, None, {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert find_processes(None, None, None, {"TPU_WORKER_HOSTNAMES": "t0,t1"}) == Processes()
    assert find_processes(None, None, None, {"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert find_processes(None, None, None, {"TPU_PROCESS_ADDRESSES": "t0:8476,t1:8476"}) == Processes()
    assert find_processes(None, None, None, {"MEGASCALE_NUM_SLICES": "2"}) == Processes()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("a:1", None, None), "--num_processes and --process_id missing"),
        (("a", 2, 0), "--coordinator is 'a'; use host:port"),
        (("a:99999", 2, 0), "--coordinator is 'a:99999'"),
        (("a:1", 0, 0), "--num_processes is '0'"),
        (("a:1", 2, 2), "--process_id is '2'; use 0 to 1"),
    ],
)
def test_half_or_wrong_flags_are_refused(given: tuple, said: str) -> None:
    with pytest.raises(UserError, match=said):
        find_processes(*given, {})
