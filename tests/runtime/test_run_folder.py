"""What a run folder holds, and when a run may be continued."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrm.errors import UserError
from jaxrm.runtime import run_lock
from jaxrm.runtime.run_folder import check_run, open_run
from jaxrm.runtime.run_record import note_end

CONFIG = {"seed": 0, "optimizer": {"lr": 1e-5, "betas": [0.9, 0.95]}, "mesh": {"fsdp": 1}, "run_dir": "run"}
DEVICES = {"platform": "cpu", "kind": "cpu", "count": 8, "process_count": 1}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with run_lock.given_back():
        yield


def launch(config=CONFIG, run_dir="run", **options):
    return open_run(run_dir, config, command=["train", "--x"], devices=DEVICES, **options)


def read_run(run_dir="run"):
    return json.loads((Path(run_dir) / "run.json").read_text())


def files():
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def with_lr(lr):
    return CONFIG | {"optimizer": CONFIG["optimizer"] | {"lr": lr}}


def test_a_new_run_says_where_it_came_from():
    folder = launch(run_dir="a/b/run")
    assert (folder.path, folder.resumed, folder.is_writer) == (Path("a/b/run"), False, True)
    run = read_run("a/b/run")
    assert run["config"] == CONFIG
    (first,) = run["launches"]
    assert first["command"] == ["train", "--x"]
    assert first["devices"] == DEVICES
    assert set(first["versions"]) >= {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers",
                                      "numpy", "jaxrm"}  # fmt: skip
    assert first["versions"]["jax"].count(".") == 2
    assert first["git"] is None or set(first["git"]) == {"commit", "dirty"}


def test_devices_are_asked_of_jax_where_none_are_given():
    open_run("run", CONFIG)
    assert read_run()["launches"][0]["devices"] == DEVICES  # the eight fake devices of the tests


def test_the_same_config_continues_the_run_and_notes_the_launch():
    launch()
    Path("run/metrics.jsonl").write_text("{}\n")
    folder = launch()
    assert folder.resumed
    assert "run holds a run started" in folder.message and "continuing it" in folder.message
    assert len(read_run()["launches"]) == 2
    assert folder.metrics.read_text() == "{}\n"


def test_another_config_is_refused_with_its_fields_and_a_remedy():
    launch()
    before = files()
    with pytest.raises(UserError) as caught:
        launch(with_lr(3e-6))
    message = str(caught.value)
    assert message.startswith("config.run_dir is 'run', which holds a run of another config: ")
    assert "config.optimizer.lr was 1e-05 and is 3e-06; use" in message
    assert "--config.on_existing=restart" in message and "--config.run_dir=run-2" in message
    assert "mesh" not in message
    assert files() == before


def test_fields_that_may_differ_are_noted_and_the_run_goes_on():
    launch()
    other = CONFIG | {"mesh": {"fsdp": 4}}
    assert launch(other, may_differ=frozenset({"mesh", "run_dir"})).resumed
    assert read_run()["config"] == other
    assert read_run()["launches"][1]["changed"] == [["mesh.fsdp", 1, 4]]
    with pytest.raises(UserError, match=r"config\.mesh\.fsdp was 4 and is 2"):
        launch(CONFIG | {"mesh": {"fsdp": 2}}, may_differ=frozenset({"mes", "mesh.f"}))


def test_many_differing_fields_are_counted():
    launch({f"x{i}": 0 for i in range(12)})
    with pytest.raises(UserError, match=r"config\.x7 was 0 and is 1, and 4 more; use"):
        launch({f"x{i}": 1 for i in range(12)})


def test_restart_puts_the_old_run_aside_and_deletes_nothing():
    launch()
    Path("run/metrics.jsonl").write_text("first\n")
    folder = launch(with_lr(1.0), on_existing="restart")
    assert not folder.resumed and "run.1" in folder.message
    Path("run/metrics.jsonl").write_text("second\n")
    launch(run_dir="run/", on_existing="restart")
    assert Path("run.1/metrics.jsonl").read_text() == "first\n"
    assert Path("run.2/metrics.jsonl").read_text() == "second\n"
    assert sorted(path.name for path in Path("run").iterdir()) == [".lock", "run.json"]
    assert not Path("run.1/.lock").exists()
    assert len(read_run()["launches"]) == 1


def test_a_stopped_restart_continues_under_the_same_command():
    """A job that is queued again has its restart in the command still; it must not begin anew for ever."""
    config = CONFIG | {"on_existing": "restart"}
    launch()
    assert not launch(config, on_existing="restart").resumed  # another command: it asks for a new beginning
    for _ in range(2):
        folder = launch(config, on_existing="restart")
        assert folder.resumed
        assert "by this very command, which has not ended; continuing it (to start it anew, rename" in folder.message
    assert len(read_run()["launches"]) == 3 and not Path("run.2").exists()
    note_end(Path("run"))
    assert not launch(config, on_existing="restart").resumed
    assert Path("run.2").exists()


@pytest.mark.parametrize("change", ["config", "code", "none recorded"])
def test_a_restart_after_a_change_begins_anew(change):
    config = CONFIG | {"on_existing": "restart"}
    launch(config, on_existing="restart")
    record = read_run()
    if change == "config":
        config = config | {"seed": 1}
    elif change == "code":
        record["launches"][-1]["code"] = "0" * 16
    else:
        del record["launches"][-1]["code"]
    Path("run/run.json").write_text(json.dumps(record))
    assert not launch(config, on_existing="restart").resumed


@pytest.mark.parametrize("algorithm", ["sft", "seq2seq_rm", "ppo", "dpo", "scalar_rm", "evaluate"])
def test_training_longer_is_refused_with_what_to_type(algorithm):
    config = {"algorithm": algorithm, "num_epochs": 3.0, "seed": 0}
    launch(config)
    with pytest.raises(UserError) as caught:
        launch(config | {"num_epochs": 8.0})
    advice = "use --config.model.path=run --config.run_dir=run-2"
    assert str(caught.value).endswith(advice) == (algorithm not in ("scalar_rm", "evaluate"))
    assert ("which becomes its reference too" in str(caught.value)) == (algorithm in ("ppo", "dpo"))


def test_another_model_is_no_reason_to_train_on():
    config = {"algorithm": "sft", "num_epochs": 3.0, "model": {"path": "a"}}
    launch(config)
    with pytest.raises(UserError) as caught:
        launch(config | {"num_epochs": 8.0, "model": {"path": "b"}})
    assert "--config.model.path=" not in str(caught.value)


def test_a_run_in_use_is_refused_whatever_is_to_be_done_with_it(monkeypatch):
    launch()
    monkeypatch.setattr(run_lock, "_mine", {})  # as another process sees it
    before = files()
    for on_existing in ("resume", "restart", "error"):
        for look in (launch, check_run):
            with pytest.raises(UserError, match="which is in use by process"):
                look("run", CONFIG, on_existing=on_existing) if look is check_run else look(on_existing=on_existing)
    assert files() == before


def test_what_a_killed_launch_left_is_cleared():
    launch()
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    from jaxrm.owner import place_name

    for name in (f".run.json.{place_name()}-{int(ended.stdout)}-00000000.tmp", ".old.tmp"):
        Path("run", name).write_text("half")
    os.utime("run/.old.tmp", (0, 0))
    mine = Path("run", f".x.json.{place_name()}-{os.getpid()}-00000000.tmp")
    far = Path("run", f".x.json.{'0' * 8}-1-00000000.tmp")
    for path in (mine, far):
        path.write_text("being written")
    launch()
    assert sorted(path.name for path in Path("run").iterdir()) == sorted([mine.name, far.name, ".lock", "run.json"])


def test_error_refuses_even_the_same_config():
    launch()
    with pytest.raises(UserError, match=r"holds a run started .*on_existing=resume.*on_existing=restart"):
        launch(on_existing="error")


@pytest.mark.parametrize("on_existing", ["resume", "restart", "error"])
def test_a_folder_that_is_no_run_is_left_alone(on_existing):
    Path("run").mkdir()
    Path("run/thesis.tex").write_text("x")
    before = files()
    with pytest.raises(UserError, match=r"is no run but holds 'thesis\.tex'; required an empty or a new folder"):
        launch(on_existing=on_existing)
    assert files() == before


def test_a_launch_killed_before_run_json_blocks_nothing():
    Path("run").mkdir()
    Path("run/.run.json.tmp").write_text('{"config": {')
    assert not launch().resumed
    assert launch().resumed


@pytest.mark.parametrize("text", ["{", "[]", '{"config": {}}', '{"config": 3, "launches": []}'])
def test_a_broken_run_json_is_named(text):
    Path("run").mkdir()
    Path("run/run.json").write_text(text)
    with pytest.raises(UserError, match=r"run/run\.json cannot be read"):
        launch()


@pytest.mark.parametrize(
    ("run_dir", "message"),
    [
        ("", "is empty"),
        ("gs://bucket/x", "a URL"),
        ("f", "is a file"),
        ("f/x", "cannot be"),
        ("a\0b", "cannot be written"),
        ("a" * 300, "cannot be written"),
        ("~nobody-of-this-name/x", "cannot be written"),
        ("\ud800", "cannot be written"),
    ],
)
def test_a_path_that_cannot_be_a_folder_is_refused(run_dir, message):
    Path("f").write_text("x")
    with pytest.raises(UserError, match=message):
        launch(run_dir=run_dir)


def test_only_the_writer_writes():
    assert not launch(is_writer=False).is_writer
    assert files() == {}


PROCESS = """
import sys
import jax
jax.distributed.initialize("localhost:" + sys.argv[2], 2, int(sys.argv[1]))
from jaxrm.errors import UserError
from jaxrm.runtime.preemption import agree
from jaxrm.runtime.run_folder import open_run
me = jax.process_index()
same = dict(process_count=2, is_writer=me == 0)
print(open_run("run", {"x": 1}, **same).resumed, open_run("run", {"x": 1}, **same).resumed)
try:
    open_run("run", {"x": 2}, **same)
except UserError as error:
    print(error)
print(agree(me == 1), agree(False))
"""


@pytest.mark.slow
def test_processes_agree_on_the_run_and_on_stopping(tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    root = str(Path(__file__).resolve().parents[2])
    environment = {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(me), port],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for me in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    lines = [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in outputs]
    assert [line[0] for line in lines] == ["False True"] * 2
    assert lines[0][1].startswith("config.run_dir is 'run', which holds a run of another config: config.x was 1")
    assert lines[1][1] == "config.run_dir is 'run', which the first process refused; its message says why"
    assert [line[2] for line in lines] == ["True False"] * 2
    assert len(read_run()["launches"]) == 2
