"""Several processes on one machine: the losses of one, an end when one is lost, and one line for what disagrees.

``JAXRM_PROCESSES=2,4`` compares jobs of two and of four processes with one; without it jobs of two, and one of four
that loses a process.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.chat_server import ChatServer, Reply, serving
from support.classifiers import write_classifier

from jaxrm.data.tasks import write_task
from jaxrm.errors import UserError
from jaxrm.runtime.processes import Processes, find_processes

ROOT = Path(__file__).resolve().parents[1]
DEVICES = 4
COUNTS = [int(count) for count in os.environ.get("JAXRM_PROCESSES", "2").split(",")]
STEPS = 24
SFT = ["--config=configs/sft_tiny.py", "--config.data.max_length=64", "--config.evaluation.samples=0"]
SFT += [f"--config.num_steps={STEPS}", "--config.checkpoint.every=8"]
LOGGED = ["--config.logging.every=1", "--config.evaluation.every=1000", "--config.data.max_eval_records=32"]


def start(
    arguments: list[str], folder: Path, count: int, port: int = 0, code: Path | None = None
) -> list[subprocess.Popen]:
    """Start a job of ``count`` processes that have `DEVICES` devices between them; ``code`` is where jaxrm lies."""
    port = port or free_port()
    devices = f"device_count={DEVICES // count}"
    environment = os.environ | {"XLA_FLAGS": re.sub(r"device_count=\d+", devices, os.environ["XLA_FLAGS"])}
    job = []
    for index in range(count):
        which = [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={index}"]
        command = [sys.executable, "-m", "jaxrm.train", *arguments, *LOGGED, f"--config.run_dir={folder}"]
        job.append(
            subprocess.Popen(
                [*command, *(which if count > 1 else [])],
                env=environment,
                cwd=code,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return job


def finish(job: list[subprocess.Popen]) -> list[str]:
    try:
        return [process.communicate(timeout=600)[0] for process in job]
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


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One compilation cache for all launches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process: sft, rm from it, ppo with both."""
    folder = tmp_path_factory.mktemp("alone")
    run(SFT, folder / "sft", 1)
    run(reward_model(folder), folder / "rm", 1)
    run(ppo(folder), folder / "ppo", 1)
    return folder


def reward_model(folder: Path) -> list[str]:
    return [
        "--config=configs/rm_seq2seq_tiny.py",
        f"--config.model.path={folder / 'sft'}",
        "--config.data.path=task:safety",
        "--config.num_steps=3",
        "--config.evaluation.corrections=0",
    ]


def ppo(folder: Path) -> list[str]:
    return [
        "--config=configs/ppo_tiny.py",
        f"--config.model.path={folder / 'sft'}",
        f"--config.reward.model={folder / 'rm'}",
        "--config.num_steps=2",
        "--config.data.batch_size=16",
    ]


@pytest.mark.each_python
@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_sft_in_several_processes_has_the_losses_of_one(alone: Path, tmp_path: Path, count: int) -> None:
    run(SFT, tmp_path / "sft", count)
    same_curve(alone / "sft", tmp_path / "sft", "loss")
    same_curve(alone / "sft", tmp_path / "sft", "eval_loss")


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_a_reward_model_in_several_processes_trains_as_in_one(alone: Path, tmp_path: Path, count: int) -> None:
    run(reward_model(alone), tmp_path / "rm", count)
    same_curve(alone / "rm", tmp_path / "rm", "loss")


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_ppo_in_several_processes_trains_as_in_one(alone: Path, tmp_path: Path, count: int) -> None:
    run(ppo(alone), tmp_path / "ppo", count)
    for name in ("reward", "policy_loss", "value_loss", "kl"):
        same_curve(alone / "ppo", tmp_path / "ppo", name)


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_adapters_in_several_processes_train_as_in_one(
    alone: Path, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policy and critic on one base, which all processes read a part of; two responses to each prompt.

    Rewards add up: of a run, a classifier, a judge, and a function that reads fields in which records of one prompt
    differ.
    """
    arguments = [*ppo(alone), "--config.lora.rank=4", "--config.mesh.data=1", "--config.mesh.fsdp=-1"]
    arguments += ["--config.rollout.responses_per_prompt=2", "--config.reward.model=None"]
    arguments += marked_prompts(tmp_path, monkeypatch)
    write_classifier(tmp_path / "classifier", "qwen2", max_position_embeddings=512)
    for name, source in {
        "words": f"model={alone / 'rm'}",
        "score": f"kind=scalar model={tmp_path / 'classifier'}",
        "mark": "kind=scalar function=marks:mark",
    }.items():
        arguments += [f"--config.rewards.{name}.{field}" for field in f"calibration_responses=32 {source}".split()]
    with serving(ChatServer(reply=lambda _, question: Reply(f"Score: {1 + len(question) % 9}"))) as server:
        judge = ["kind=scalar", f"endpoint.url={server.url}", "endpoint.model=judge", "calibration_responses=32"]
        arguments += [f"--config.rewards.judge.{field}" for field in judge]
        for name, processes in (("one", 1), ("several", count)):
            cache = f"--config.rewards.judge.endpoint.cache={tmp_path / name}_answers"
            run([*arguments, cache], tmp_path / name, processes)
    sources = [f"reward/{name}" for name in ("words", "score", "mark", "judge")]
    for name in ("reward", *sources, "policy_loss", "value_loss", "kl"):
        same_curve(tmp_path / "one", tmp_path / "several", name)
    assert (tmp_path / "one" / "base.json").read_text() == (tmp_path / "several" / "base.json").read_text()


def marked_prompts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts of the task, each in two records with marks of their own, and a function that pays by the mark."""
    write_task("safety", folder / "task", seed=0)
    lines = (folder / "task" / "prompts.jsonl").read_text().splitlines()[:300]
    records = [json.loads(line) | {"mark": mark} for line in lines for mark in (1, -1)]
    (folder / "marked.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (folder / "marks.py").write_text(
        "def mark(prompts, responses, fields):\n"
        "    return [row['mark'] * float(len(response)) for response, row in zip(responses, fields)]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return [f"--config.data.path={folder / 'marked.jsonl'}"]


@pytest.mark.slow
def test_a_killed_process_stops_the_job_which_continues_exactly(alone: Path, tmp_path: Path) -> None:
    killed, in_one = tmp_path / "killed", tmp_path / "in_one"
    job = start(SFT, killed, 4)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "8").is_dir() and time.monotonic() < deadline:
        time.sleep(0.02)
    job[3].send_signal(signal.SIGKILL)
    said = finish(job)
    assert all(process.returncode not in (0, None) for process in job), "\n".join(said)
    # Where what a neighbor still sends meets another collective, gloo ends the process itself.
    signs = ("another task died", "another one is gone", "gloo::EnforceNotMet")
    assert all(any(sign in text for sign in signs) for text in said[:3]), "\n".join(said)
    shutil.copytree(killed, in_one)
    run(SFT, killed, 4)
    run(SFT, in_one, 1)
    same_curve(alone / "sft", killed, "loss")
    same_curve(alone / "sft", in_one, "loss")


@pytest.mark.slow
def test_processes_that_disagree_on_the_config_all_say_so(tmp_path: Path) -> None:
    port = free_port()
    first = start([*SFT, "--config.seed=1"], tmp_path / "run", 2, port)
    stop(first[1])
    second = start([*SFT, "--config.seed=2"], tmp_path / "run", 2, port)
    stop(second[0])
    for text in finish([first[0], second[1]]):
        assert "process 1 has another config.seed than process 0" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_with_other_code_all_say_so(tmp_path: Path) -> None:
    for name in ("jaxrm", "configs"):
        shutil.copytree(ROOT / name, tmp_path / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "code" / "jaxrm" / "ops" / "kl.py").open("a", encoding="utf-8") as changed:
        changed.write("# another version\n")
    port = free_port()
    first, second = (start(SFT, tmp_path / "run", 2, port, code) for code in (ROOT, tmp_path / "code"))
    stop(first[1])
    stop(second[0])
    for text in finish([first[0], second[1]]):
        assert "process 1 has another code of jaxrm than process 0; install the same commit" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["config.data.path", "tokenizer"])
def test_processes_that_read_other_inputs_all_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Another copy of the file, or of the tokenizer, under the same name: hosts that do not share a disk."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    hosts = [tmp_path / "first", tmp_path / "second"]
    for host in hosts:
        write_task("safety", host / "task", seed=0)
    if what == "tokenizer":
        special = hosts[1] / "task" / "tokenizer" / "tokenizer_config.json"
        record = json.loads(special.read_text())
        special.write_text(json.dumps({**record, "unk_token": record["eos_token"]}))
    else:
        file = hosts[1] / "task" / "train.jsonl"
        first, *others = file.read_text().splitlines(keepends=True)
        file.write_text("".join([*others, first]))
    arguments = [f"--config={ROOT}/configs/sft_tiny.py", *SFT[1:], "--config.data.max_records=64"]
    arguments += ["--config.data.path=task/train.jsonl", "--config.data.tokenizer=task/tokenizer"]
    port = free_port()
    first_job, second_job = (start(arguments, tmp_path / "run", 2, port, host) for host in hosts)
    stop(first_job[1])
    stop(second_job[0])
    for text in finish([first_job[0], second_job[1]]):
        assert f"the processes disagree: process 1 has another {what} than process 0; give every host the same" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_missing_coordinator_is_named_after_a_bounded_wait(tmp_path: Path) -> None:
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
