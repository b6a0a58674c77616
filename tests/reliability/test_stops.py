"""Real processes stopped at moments that were hard, and continued. For more: `tests/reliability/campaign.py`.

SFT, both reward models and PPO are stopped in `tests/test_resume.py` and `tests/test_resume_ppo.py`.
"""

import shutil
import signal
import subprocess
import sys
import time

import pytest
from support.launches import CTRL_C, KILL, ROOT, TERM, command, cpu_seconds, environment, errors_of, finish, launch
from support.same_run import closing_report, differences

from jaxrm.runtime.preemption import EXIT_INTERRUPTED, EXIT_PREEMPTED


def stop_after(seconds, number, *arguments):
    """Exit status and output of a command that gets a signal after so many CPU seconds."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(ROOT / ".jax_cache" / "tests"),
    )
    while process.poll() is None and cpu_seconds(process) < seconds:
        time.sleep(0.002)
    process.send_signal(number)
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


@pytest.mark.parametrize("seconds", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("number", [TERM, CTRL_C])
def test_training_ends_with_75_from_its_first_second(seconds, number, tmp_path):
    run_dir = tmp_path / "stopped-here"
    arguments = ("jaxrm.train", "--config=configs/sft_tiny.py", f"--config.run_dir={run_dir}")
    status, output = stop_after(seconds, number, *arguments)
    name = signal.Signals(number).name
    assert (status, output) == (
        EXIT_PREEMPTED,
        f"\njaxrm: {name}: stopped; nothing was written; the same command starts anew\n",
    )
    assert not run_dir.exists()


@pytest.mark.parametrize("seconds", [0.1, 0.4])
@pytest.mark.parametrize("name", ["generate", "score", "export", "plan"])
def test_other_commands_answer_ctrl_c_in_one_line(seconds, name):
    arguments = (f"jaxrm.{name}", "--config=configs/sft_tiny.py", "--topology=cpu:1", "--model=tiny")
    if name != "plan":
        arguments = (f"jaxrm.{name}", "--checkpoint=nowhere")
    status, output = stop_after(seconds, CTRL_C, *arguments)
    # It was refused before; while Python ends, a signal decides the status.
    if status == 2 or (status == -signal.SIGINT and output.startswith("jaxrm: error: ")):
        return
    assert (status, output.strip()) == (EXIT_INTERRUPTED, "jaxrm: interrupted")


def test_ctrl_c_raises_nothing_in_a_module_being_imported(tmp_path):
    """A compiled module aborts the process where Python raises in it, as jaxlib's do."""
    (tmp_path / "compiled.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    os.abort()\n"
    )
    code = "from jaxrm.runtime import preemption; preemption.say_interrupted(); import compiled"
    variables = environment(ROOT / ".jax_cache" / "tests") | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.strip()) == (EXIT_INTERRUPTED, "jaxrm: interrupted")


@pytest.fixture(scope="module")
def needed(make_run, small, task_folder, tmp_path_factory):
    """Folder of the policy, the reward model and the pairs that stages are built on."""
    folder = tmp_path_factory.mktemp("needed")
    make_run(folder / "sft")
    make_run(folder / "seq2seq_rm", algorithm="seq2seq_rm")
    (folder / "pairs").mkdir()
    lines = (task_folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (folder / "pairs" / "pairs.jsonl").write_text("".join(lines[:120]))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "stops"),
    [
        ("dpo", [(TERM, "read reference"), (KILL, '"eval_loss"')]),
        ("best_of_n", [(TERM, "calibrate"), (KILL, '"winner"')]),
    ],
)
def test_a_run_stopped_at_hard_moments_ends_the_same(stage, stops, needed, tmp_path):
    """Each stop comes when a text appears in what the run prints or writes."""
    variables, output = environment(ROOT / ".jax_cache" / "tests"), tmp_path / "output.txt"
    finish(command(stage, tmp_path / "unbroken", needed), variables, output)
    report = closing_report(output.read_bytes(), tmp_path / "unbroken")
    run_dir = tmp_path / "stopped-here"
    for number, text in stops:
        process = launch(command(stage, run_dir, needed), variables, output)
        files = (errors_of(output), run_dir / "metrics.jsonl", run_dir / "candidates.jsonl")
        while process.poll() is None and not any(text in file.read_text() for file in files if file.exists()):
            time.sleep(0.002)
        process.send_signal(number)
        status = process.wait(timeout=600)
        assert status == (EXIT_PREEMPTED if number == TERM else -KILL), errors_of(output).read_text()
        assert "Traceback" not in errors_of(output).read_text()
    finish(command(stage, run_dir, needed), variables, output)
    assert differences(run_dir, tmp_path / "unbroken") == []
    assert closing_report(output.read_bytes(), run_dir) == report
    shutil.rmtree(run_dir)
