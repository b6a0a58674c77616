"""Checkpoints whose files were cut off, changed, removed or replaced: passed over in one line, never used."""

import shutil

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzz import fuzz

from jaxrm.errors import UserError
from jaxrm.runtime.checkpoint import CheckpointConfig, Checkpoints

ARRAYS = {"params": {"x": np.arange(300, dtype=np.float32)}, "opt_state": {"m": np.zeros(5, np.float32)}}
WEIGHTS = "3/params/ocdbt.process_0/d"  # the largest file there holds the numbers


def abstract():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), ARRAYS)


def arrays(step):
    return jax.tree.map(lambda x: jax.numpy.asarray(x + step), ARRAYS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Checkpoints of steps 1 to 3, of which the second is the best."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=3))
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        checkpoints.save(step, arrays(step), {"loader": {"at": step}}, loss)
    checkpoints.close()
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run" / "checkpoints")
    return tmp_path / "run" / "checkpoints"


def resume(folder):
    """What a training that continues starts from: the step that it says it is, with its numbers."""
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=3))
    try:
        step, progress, restored = checkpoints.restore_latest(abstract(), lambda *_: None)
        assert progress["step"] == step and progress["loader"] == {"at": step}
        jax.tree.map(np.testing.assert_array_equal, restored, arrays(step))
        if step < 3:  # the step that was passed over is made again
            checkpoints.save(step + 1, arrays(step + 1), {"loader": {"at": step + 1}}, 0.5)
            checkpoints.wait()
            assert checkpoints.steps()[-1] == step + 1 and checkpoints.damage(step + 1) is None
        return step
    finally:
        checkpoints.close()


def largest(folder, where=WEIGHTS):
    return max((path for path in (folder / where).iterdir()), key=lambda path: path.stat().st_size)


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_the_weights_is_passed_over(folder, capsys):
    path = largest(folder)
    flip(path, path.stat().st_size // 2)
    assert resume(folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    name = path.relative_to(folder / "3")
    aside = folder.parent / "damaged" / "3"
    assert line == (
        f"jaxrm: {folder}/3 is damaged ({name} has another checksum than when it was written) and passed over; "
        f"it is now {aside}"
    )
    assert (aside / name).exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("progress/metadata", "progress/metadata has 0 bytes in place of"),
        ("metrics/metrics", "metrics/metrics cannot be read"),
        ("opt_state/manifest.ocdbt", "opt_state/manifest.ocdbt has 0 bytes in place of"),
        ("checksums.json", "checksums.json cannot be read"),
    ],
)
def test_an_emptied_file_is_named(folder, name, reason, capsys):
    (folder / "3" / name).write_text("")
    assert resume(folder) == 2
    assert f"/3 is damaged ({reason}" in capsys.readouterr().err


def test_a_reader_passes_damage_over_and_moves_nothing(folder, capsys):
    flip(largest(folder, WEIGHTS.replace("3/", "2/")))
    flip(folder / "3/opt_state/manifest.ocdbt")
    checkpoints = Checkpoints(folder, read_only=True)
    assert checkpoints.latest_sound("params") == 3  # its optimizer state is of no interest
    assert checkpoints.latest_sound() == 1
    assert checkpoints.best_sound("params") == 3
    assert checkpoints.best_sound() == 1
    checkpoints.close()
    assert len(capsys.readouterr().err.splitlines()) == 2  # each once
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]


def test_where_all_are_damaged_one_line_says_so(folder):
    for step in "123":
        (folder / step / "progress/metadata").unlink()
    with pytest.raises(UserError) as caught:
        resume(folder)
    assert str(caught.value) == (
        f"all checkpoints of {folder.parent} are damaged (3: progress/metadata is missing, 2: progress/metadata is "
        "missing, 1: progress/metadata is missing); put the run aside and start anew with --config.on_existing=restart"
    )
    assert not (folder.parent / "damaged").exists()


def test_checkpoints_of_before_have_no_checksums_and_are_read(folder):
    for step in "123":
        (folder / step / "checksums.json").unlink()
    assert resume(folder) == 3
    (folder / "3/params/manifest.ocdbt").write_text("")
    assert resume(folder) == 2


def test_a_checkpoint_of_another_shape_is_an_error_of_ours(folder):
    """It is not taken for damage, which would put good checkpoints aside one after another."""
    checkpoints = Checkpoints(folder)
    other = abstract() | {"value_head": abstract()["opt_state"]}
    with pytest.raises(KeyError, match="value_head"):
        checkpoints.restore_latest(other, lambda *_: None)
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]


def damage(path, how, at, folder):
    """One of the things that happen to files."""
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: at % len(data)])
    elif how == "flip":
        flip(path, at % len(data))
    elif how == "remove":
        path.unlink()
    elif how == "become a folder":
        path.unlink()
        path.mkdir()
    elif how == "become a link":
        path.unlink()
        path.symlink_to("nowhere")
    elif how == "become another":
        path.write_bytes(at.to_bytes(4, "big") * 9)
    else:
        shutil.rmtree(path.parent if path.parent != folder else path.parent.parent)


HOW = ["cut", "flip", "remove", "become a folder", "become a link", "become another", "remove the folder"]


@fuzz
@given(which=st.integers(0, 10**6), how=st.sampled_from(HOW), at=st.integers(0, 10**6), steps=st.integers(1, 3))
def test_fuzz_damage_is_passed_over_or_refused(whole, tmp_path_factory, which, how, at, steps):
    """Whatever happens to a file of each of the latest checkpoints: sound numbers of an earlier one, or one line."""
    folder = tmp_path_factory.mktemp("fuzz") / "checkpoints"
    shutil.copytree(whole, folder)
    for step in range(4 - steps, 4):
        files = sorted(path for path in (folder / str(step)).rglob("*") if path.is_file())
        damage(files[which % len(files)], how, at, folder)
    reader = Checkpoints(folder, read_only=True)
    sound, best = reader.latest_sound("params"), reader.best_sound("params")
    for step in {sound, best} - {None}:
        read = reader.restore(step, {"params": abstract()["params"]})
        jax.tree.map(np.testing.assert_array_equal, read, {"params": arrays(step)["params"]})
    reader.close()
    try:
        assert resume(folder) in range(1, 4)
    except UserError as error:
        assert steps == 3 and "\n" not in str(error)
    finally:
        shutil.rmtree(folder.parent)
