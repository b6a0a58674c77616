"""Disks that are full, read-only or gone: one line with what is saved and what to do, and nothing hangs."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxrm import atomic
from jaxrm.config import command_line
from jaxrm.errors import StorageError
from jaxrm.runtime.checkpoint import Checkpoints
from jaxrm.stages import table
from jaxrm.storage import failure_of

ROOT = Path(__file__).resolve().parents[1]
LIMITED = """
import resource, sys
import numpy as np, jax.numpy as jnp
from pathlib import Path
from jaxrm.config import command_line
from jaxrm.runtime.checkpoint import Checkpoints
from jaxrm.runtime.metrics import LoggingConfig, open_metrics
from jaxrm.runtime.run_folder import RunFolder

def save(config, flags):
    numbers = jnp.asarray(np.random.default_rng(0).normal(size=100_000).astype(np.float32))
    checkpoints = Checkpoints("run/checkpoints")
    for step in (1, 2, 3):
        checkpoints.save(step, {"params": {"x": numbers[: 100_000 if step > 1 else 9]}}, {})
        if step == 1:
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

def log(config, flags):
    folder = Path("run")
    folder.mkdir()
    with open_metrics(RunFolder(folder, False, ""), LoggingConfig(), after_step=None) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        for step in range(4000):
            writer.write(step, {"loss": 1.0, "accuracy": 0.5})

sys.exit(command_line.run({"save": save, "log": log}[sys.argv.pop()]))
"""


def limited(what, folder):
    """Runs a piece of work that may write files of 20,000 bytes, as on a disk that is full."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, what], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    return done.returncode, done.stderr.splitlines()


def test_a_checkpoint_that_does_not_fit_ends_in_one_line(tmp_path):
    status, lines = limited("save", tmp_path)
    assert status == command_line.EXIT_STORAGE and len(lines) == 1, lines
    good = tmp_path / "run/checkpoints/1"
    assert lines[0].startswith("jaxrm: error: a checkpoint could not be written (/")
    assert lines[0].endswith(
        f": File too large); the last good checkpoint is {good}; make room or mend the disk and give the same command "
        "again, which continues from there"
    )
    assert len(list((tmp_path / "run/checkpoints").iterdir())) > 1  # what was begun
    Checkpoints(tmp_path / "run/checkpoints").close()
    assert list((tmp_path / "run/checkpoints").iterdir()) == [good]


def test_metrics_that_do_not_fit_end_in_one_line(tmp_path):
    """A thread of tensorboardX that the disk ends would leave the run waiting for ever."""
    pytest.importorskip("tensorboardX")
    status, lines = limited("log", tmp_path)
    assert (status, lines) == (
        74,
        ["jaxrm: error: File too large; mend that or make room, and give the same command again"],
    )


def test_the_line_names_file_and_reason_whoever_met_it():
    assert failure_of(OSError(errno.ENOSPC, "x", "/a/b")) == "/a/b: No space left on device"
    tensorstore = ValueError(
        'RESOURCE_EXHAUSTED: Error writing "x/0" in OCDBT database at local file "/run/checkpoints/20/": Failed to '
        "write 5971968 bytes to file 16: No space left on device [os_error_code='28']"
    )
    assert failure_of(tensorstore) == "/run/checkpoints/20/: No space left on device"
    wrapped = RuntimeError("a handler failed")
    wrapped.__cause__ = OSError(errno.EDQUOT, "x", b"/a")
    assert failure_of(wrapped) == "/a: Disk quota exceeded"
    assert failure_of(ExceptionGroup("both", [KeyError("x"), OSError(errno.EROFS, "x")])) == "Read-only file system"


def test_errors_of_other_kinds_keep_their_traceback():
    accidental = KeyError("ours")
    accidental.__context__ = FileNotFoundError(errno.ENOENT, "x", "/looked/for")
    for error in (accidental, ValueError("28"), ConnectionResetError(errno.ECONNRESET, "gone"), OSError("no number")):
        assert failure_of(error) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ENOENT])
def test_a_stage_whose_disk_fails_says_what_is_saved(tmp_path, monkeypatch, number):
    (tmp_path / "checkpoints/12").mkdir(parents=True)
    (tmp_path / "checkpoints/16.orbax-checkpoint-tmp").mkdir()

    def fail(config):
        raise OSError(number, os.strerror(number), "/runs/x/samples.jsonl")

    monkeypatch.setattr(table.importlib, "import_module", lambda name: SimpleNamespace(run=fail))
    config = SimpleNamespace(algorithm="sample_pairs", run_dir=str(tmp_path))
    with pytest.raises(StorageError) as caught:
        table.run_stage(config)
    assert str(caught.value) == (
        f"the run stopped (/runs/x/samples.jsonl: {os.strerror(number)}); the last good checkpoint is "
        f"{tmp_path}/checkpoints/12; make room or mend the disk and give the same command again, which continues from "
        "there"
    )


def test_a_command_whose_file_does_not_fit_ends_in_one_line(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "scores.jsonl"))

    monkeypatch.setattr(Path, "open", refuse)
    status = command_line.run(lambda config, flags: atomic.write_text(tmp_path / "scores.jsonl", "x"), argv=["score"])
    assert status == 74
    assert capsys.readouterr().err == (
        f"jaxrm: error: {tmp_path}/scores.jsonl: No space left on device; mend that or make room, and give the same "
        "command again\n"
    )


def test_output_that_nobody_reads_on_ends_the_command_quietly():
    code = "import sys; from jaxrm.config import command_line\n"
    code += "sys.exit(command_line.run(lambda config, flags: [print(i, flush=True) for i in range(10**6)] and 0))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=600) == command_line.EXIT_BROKEN_PIPE
    process.stderr.close()
