"""Runs whose files are spoiled, as every command opens them: what they hold, or one line."""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzz import fuzz

from jaxrm.errors import UserError
from jaxrm.inference import run_checkpoint, weights
from jaxrm.runtime.metrics import LoggingConfig, open_metrics, read_rows
from jaxrm.runtime.run_folder import RunFolder, check_run
from jaxrm.storage import failure_of

HOW = ["cut", "flip", "remove", "become a folder", "become a link", "become another"]
ROWS = [f'{{"step": {step}, "loss": 1.0}}\n' for step in range(4)]


@pytest.fixture(scope="module")
def whole(make_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_run(folder, losses=((2, 1.0), (4, 2.0)))
    (folder / "metrics.jsonl").write_text("".join(ROWS))
    return folder


def spoil(path, how, at):
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: at % len(data)])
    elif how == "flip":
        spoiled = bytearray(data)
        spoiled[at % len(data)] ^= 1 << at % 8
        path.write_bytes(spoiled)
    elif how == "become another":
        path.write_bytes(at.to_bytes(4, "big") * 9)
    else:
        path.unlink()
        if how == "become a folder":
            path.mkdir()
        elif how == "become a link":
            path.symlink_to("nowhere")


@fuzz
@given(which=st.integers(0, 10**6), how=st.sampled_from(HOW), at=st.integers(0, 10**6))
def test_fuzz_a_spoiled_run_is_opened_or_one_line(whole, tmp_path_factory, which, how, at):
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    shutil.copytree(whole, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "checkpoints" not in path.parts)
    spoil(files[which % len(files)], how, at)
    try:
        for path in (folder, folder / "checkpoints/best"):
            if run_checkpoint.is_run(str(path)):
                checkpoint = run_checkpoint.find_checkpoint(str(path), "model.path")
                assert checkpoint.step == (4 if path == folder else 2)
                checkpoint.vocabulary()
        weights.identity_of(str(folder))
    except UserError as error:
        assert "\n" not in str(error)
    for look in (
        lambda: check_run(str(folder), {}, on_existing="error"),
        lambda: read_rows(folder / "metrics.jsonl"),
        lambda: open_metrics(RunFolder(folder, True, ""), LoggingConfig(tensorboard=False), after_step=2).close(),
    ):
        try:
            look()
        except UserError as error:
            assert "\n" not in str(error)
        except OSError as error:  # a command makes one line of it
            assert failure_of(error) is not None
    shutil.rmtree(folder.parent)


def test_a_half_last_row_is_mended_when_the_run_goes_on(whole, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(ROWS) + '{"step": 4, "lo')
    with open_metrics(RunFolder(tmp_path, True, ""), LoggingConfig(tensorboard=False), after_step=3) as writer:
        writer.write(4, {"loss": 0.5})
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3, 4]
