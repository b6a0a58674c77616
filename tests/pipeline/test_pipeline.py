"""Several stages in one config: what they are called on the command line, how they build on each other and continue.

The stages are stubs that leave behind what a stage leaves.
"""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxrm import train
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.config import command_line, dicts
from jaxrm.errors import UserError, flag, option
from jaxrm.pipeline import record as pipeline_record
from jaxrm.pipeline import report as pipeline_report
from jaxrm.pipeline import run as pipeline_run
from jaxrm.pipeline.config import Pipeline, PipelineStage, pipeline, resolve, stage_names
from jaxrm.runtime import run_lock
from jaxrm.runtime.run_folder import open_run
from jaxrm.runtime.run_record import note_end
from jaxrm.stage_config import PPO, RESUMABLE_FIELDS, SFT, StageConfig
from jaxrm.stages.inspection import Inspection

CONFIG = '''"""Three stages that build on each other."""

from jaxrm.data.config import DataConfig
from jaxrm.models.build import ModelSource
from jaxrm.pipeline.config import pipeline
from jaxrm.stage_config import SFT, SamplePairs, Seq2SeqRM


def get_config():
    return pipeline(
        run_dir="runs/q",
        sft=SFT(model=ModelSource(preset="tiny"), data=DataConfig(path="task:safety")),
        pairs=SamplePairs(seed=5, model=ModelSource(path="stage:sft")),
        model=Seq2SeqRM(
            model=ModelSource(path="stage:sft/checkpoints/best"),
            data=DataConfig(path="stage:pairs/pairs.jsonl"),
        ),
    )
'''
SINGLE = '''"""One stage."""

from jaxrm.stage_config import SFT


def get_config():
    return SFT(run_dir="runs/one")
'''
DEVICES = {"platform": "cpu", "kind": "cpu", "count": 1, "process_count": 1}
NAMES = ("sft", "pairs", "model")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The working directory: it holds the config files. Nothing compiled for other tests is freed."""
    (tmp_path / "three.py").write_text(CONFIG)
    (tmp_path / "one.py").write_text(SINGLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline_run, "_release", lambda: None)
    monkeypatch.setattr("jaxrm.runtime.run_folder.git_state", lambda: None)


def run_command(main, *arguments, file="three.py"):
    argv = ["train", f"--config={file}", *arguments]
    return command_line.run(main, (StageConfig, Pipeline), argv=argv)


def parse(*arguments, file="three.py"):
    """The config that a command line describes."""
    received = []
    assert run_command(lambda config, _: received.append(config), *arguments, file=file) == 0
    return received[0]


@pytest.fixture
def launch(capsys):
    """Runs the pipeline with stub stages: exit status, the stages that ran, and what was said.

    ``ends`` is how a stage ends: an exit status, an exception, or a function that makes one.
    """

    def run(*arguments, ends=(), file="three.py", crashes=False):
        ran = []

        def run_stage(experiment):
            name = Path(experiment.run_dir).name
            ran.append(name)
            end = dict(ends).get(name, 0)
            end = end() if callable(end) else end  # an error that names options must be made inside the stage
            if isinstance(end, UserError):
                raise end
            open_run(
                experiment.run_dir,
                dicts.to_dict(experiment),
                on_existing=experiment.on_existing,
                may_differ=RESUMABLE_FIELDS,
                command=["train"],
                devices=DEVICES,
            )
            run_lock.give_back(Path(experiment.run_dir))
            if isinstance(end, BaseException):
                raise end
            if end == 0:
                note_end(Path(experiment.run_dir))
            return end

        capsys.readouterr()
        status = None
        with pytest.raises(RuntimeError) if crashes else contextlib.nullcontext():
            status = run_command(
                lambda config, _: pipeline_run.run_pipeline(config, run_stage, lambda stage: Inspection({})),
                *arguments,
                file=file,
            )
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, ran=ran, out=out, err=err.removeprefix("jaxrm: error: ").rstrip())

    return run


@pytest.fixture
def refuse(launch):
    """Runs a mistaken command line: the one line that it is answered with, before any stage."""

    def run(*arguments, **options):
        before = everything()
        result = launch(*arguments, **options)
        assert (result.status, result.ran, result.out) == (2, [], "")
        assert everything() == before
        return result.err

    return run


def everything():
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def record(run_dir="runs/q"):
    return json.loads((Path(run_dir) / "pipeline.json").read_text())["stages"]


def states():
    return {name: one["state"] for name, one in record().items()}


# --- config and command line


def test_stages_keep_the_order_of_the_file():
    """A config dict sorts its keys."""
    config = parse()
    assert isinstance(config, Pipeline)
    assert stage_names(config) == config.stages == NAMES
    assert (config.run_dir, config.seed, config.on_existing) == ("runs/q", None, "resume")


def test_folders_references_and_seed_are_filled_in():
    result = resolve(parse("--config.run_dir=runs/w/"))
    assert [stage.experiment.run_dir for stage in result.values()] == ["runs/w/sft", "runs/w/pairs", "runs/w/model"]
    assert result["pairs"].experiment.model.path == "runs/w/sft"
    assert result["model"].experiment.model.path == "runs/w/sft/checkpoints/best"
    assert result["model"].experiment.data.path == "runs/w/pairs/pairs.jsonl"
    assert result["model"].needs == {"config.model.model.path": "sft", "config.model.data.path": "pairs"}
    assert [stage.experiment.seed for stage in result.values()] == [0, 5, 0]
    assert [stage.experiment.seed for stage in resolve(parse("--config.seed=2")).values()] == [2, 2, 2]


def test_references_follow_a_stage_to_a_folder_of_its_own(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    result = resolve(parse("--config.sft.run_dir=~/sft"))
    assert result["sft"].experiment.run_dir == "~/sft"
    assert result["pairs"].experiment.model.path == "/somewhere/sft"


def test_fields_of_a_stage_are_set_under_its_name():
    config = parse(
        "--config.sft.optimizer.lr=2",
        "--noconfig.pairs.data.packing",
        "--config.pairs.pairs.count=7",
        "--config.model.num_steps=3",
        "--config.model.num_steps=None",
        "--config.stages=pairs,sft",
    )
    assert (config.sft.optimizer.lr, config.model.num_steps) == (2.0, None)
    assert (config.pairs.data.packing, config.sft.data.packing, config.pairs.pairs.count) == (False, True, 7)
    assert config.stages == ("pairs", "sft") and stage_names(config) == NAMES


def test_a_star_sets_a_field_of_every_stage_that_has_it():
    """``pairs`` samples and trains nothing, so it has neither adapters nor steps."""
    config = parse("--config.*.lora.rank=8", "--config.*.num_steps=3", "--noconfig.*.data.packing", "--config.*.seed=4")
    assert (config.sft.lora.rank, config.model.lora.rank) == (8, 8)
    assert (config.sft.num_steps, config.model.num_steps) == (3, 3)
    assert [stage.data.packing for stage in (config.sft, config.pairs, config.model)] == [False] * 3
    assert [stage.seed for stage in (config.sft, config.pairs, config.model)] == [4] * 3
    assert config.seed is None


@pytest.mark.parametrize("is_first", [True, False])
def test_a_stages_own_name_goes_before_the_star(is_first):
    named = ["--config.*.lora.rank=8", "--config.sft.lora.rank=0"]
    config = parse(*(reversed(named) if is_first else named))
    assert (config.sft.lora.rank, config.model.lora.rank) == (0, 8)


def test_a_star_in_a_config_without_stages_is_refused(refuse):
    message = refuse("--config.*.lora.rank=8", file="one.py")
    assert message.startswith("config.*.lora.rank is a field of every stage of a pipeline, but one.py has no stages")
    assert "--config.lora.rank=" in message


def test_a_file_of_one_stage_is_read_as_before():
    config = parse("--config.optimizer.lr=2", file="one.py")
    assert isinstance(config, SFT) and config.optimizer.lr == 2.0


def test_help_lists_the_stages_fields_with_their_values(capsys):
    assert run_command(train.main, "--help") == 0
    out = capsys.readouterr().out
    assert "Three stages that build on each other." in out
    for line in ("stages=sft,pairs,model  (tuple of str)", "seed=None  (int or None)", "pairs.seed=5  (int)"):
        assert f"--config.{line}" in out
    assert out.index("--config.sft.run_dir") < out.index("--config.pairs.run_dir")
    assert out.count("--config.*.FIELD=value") == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.sft.optimzer.lr=3", "config.sft.optimzer.lr is no field of the config; did you mean "
         "--config.sft.optimizer.lr?"),
        ("--config.stf.num_epochs=3", "config.stf.num_epochs is no field of the config; did you mean "
         "--config.sft.num_epochs?"),
        ("--config.sft.optimizer.lr=x", "config.sft.optimizer.lr is 'x'; required float; e.g. "
         "--config.sft.optimizer.lr=2e-05"),
        ("--config.sft.optimizer.learning_rate=1", "did you mean --config.sft.optimizer.lr?"),
        ("--config.sft=x", "config.sft is a section; set its fields"),
        ("--config.sft.optimizer.lr=-1", "config.sft.optimizer.lr is -1.0; it must be above 0 and finite, e.g. "
         "--config.sft.optimizer.lr=2e-05"),
        ("--config.pairs.pairs.count=0", "config.pairs.pairs.count is 0; it must be at least 1, e.g. "
         "--config.pairs.pairs.count=2000"),
        ("--config.model.model.dtype=x", "config.model.model.dtype is 'x'; it must be one of float32, bfloat16, e.g. "
         "--config.model.model.dtype=float32"),
        ("--config.pairs.algorithm=x", "config.pairs.algorithm is sample_pairs by the class"),
        ("--config.sft.evaluation.sampling.top_p=2", "config.sft.evaluation.sampling.top_p is 2.0"),
        ("--config.seed=-1", "config.seed is -1; it must be at least 0 and below 4294967296, or None, e.g. --"),
        ("--config.stages=sft,pair", "config.stages has 'pair', but the stages are sft, pairs, model; did you mean "
         "pairs?"),
        ("--config.stages=zzz", "the stages are sft, pairs, model; e.g. --config.stages=sft,pairs,model"),
        ("--config.stages=", "config.stages is (); it must be each stage to run, once, e.g. "
         "--config.stages=sft,pairs,model"),
        ("--config.stages=sft,sft", "config.stages is ('sft', 'sft'); it must be each stage to run, once"),
        ("--config.model.data.path=stage:pair/pairs.jsonl", "config.model.data.path is 'stage:pair/pairs.jsonl', but "
         "there is no stage 'pair'; did you mean --config.model.data.path=stage:pairs/pairs.jsonl?"),
        ("--config.pairs.model.path=stage:zzz", "there is no stage 'zzz'; the stages are sft, model, pairs"),
        ("--config.pairs.model.path=stage:pairs", "config.pairs.model.path is 'stage:pairs', the stage itself; refer "
         "to another one, e.g. --config.pairs.model.path=stage:sft"),
        ("--config.stages=pairs,sft", "config.pairs.model.path is 'stage:sft', which runs after pairs; put it first, "
         "e.g. --config.stages=sft,pairs"),
        ("--config.stages=pairs", "config.pairs.model.path refers to the stage sft, which is not done in runs/q/sft "
         "and not among those to run; e.g. --config.stages=sft,pairs"),
        ("--config.*.lora.rank=x", "config.*.lora.rank is 'x'; required int; e.g. --config.*.lora.rank=0"),
        ("--config.*.lora.rank=-1", "config.sft.lora.rank is -1; it must be at least 0"),
        ("--config.*.lora.rnak=1", "config.*.lora.rnak is no field of any stage, which are sft, pairs, model; did you "
         "mean --config.*.lora.rank?"),
        ("--config.*.lora=1", "config.*.lora is a section; set its fields, e.g. --config.*.lora.rank=…"),
        ("--config.*=1", "config.* is no field of the config"),
        ("--config.run_dir=", "config.run_dir is empty; required a folder"),
        ("--config.run_dir=three.py", "config.run_dir is 'three.py', which cannot be written"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_line_that_names_the_stages_field(refuse, argument, message):
    assert message in refuse(argument)


@pytest.mark.parametrize(
    ("stages_given", "message"),
    [
        ("", "bad.py:6: pipeline() has no stage"),
        (", sft=3", "bad.py:6: the stage sft of pipeline() is int; required a stage"),
        (", stages=SFT()", "has a stage called stages, which means something else"),
        (", sft=SFT(seed=-1)", "bad.py:6: SFT.seed is -1"),
    ],
)
def test_a_config_file_with_no_pipeline_gets_one_line(refuse, stages_given, message):
    text = "from jaxrm.stage_config import SFT\nfrom jaxrm.pipeline.config import pipeline\n\n"
    Path("bad.py").write_text(f"{text}\ndef get_config():\n    return pipeline('runs/q'{stages_given})\n")
    assert message in refuse(file="bad.py")


def test_a_broken_config_file_is_reported_before_its_overrides(refuse):
    """The file would explain what is wrong with the overrides."""
    Path("bad.py").write_text("1 / 0\n")
    assert refuse("--config.sft.seed=1", file="bad.py") == "bad.py:1: ZeroDivisionError: division by zero"
    assert "--config cannot be read" in refuse("--config.sft.seed=1", file="nowhere.py")
    assert command_line.run(None, StageConfig, argv=["train", "--config"]) == 2


# --- running and continuing


def test_stages_run_in_order_and_leave_their_record(launch):
    result = launch()
    assert (result.status, result.ran) == (0, list(NAMES))
    places = [result.out.index(f"stage {i} of 3: {name}\n") for i, name in enumerate(NAMES, 1)]
    assert places == sorted(places)
    assert states() == dict.fromkeys(NAMES, "done")
    assert record()["pairs"]["config"]["model"]["path"] == "runs/q/sft"
    assert record()["pairs"]["config"] == json.loads(Path("runs/q/pairs/run.json").read_text())["config"]
    assert Path("runs/q/report.html").is_file() and "runs/q/report.html" in result.out


def test_what_is_done_is_not_run_again(launch):
    launch()
    result = launch()
    assert (result.status, result.ran) == (0, [])
    assert "sft: done in 0 s, runs/q/sft\n" in result.out and "stage 1 of 3" not in result.out
    assert "Stages in runs/q" in result.out


def test_a_stopped_stage_ends_the_pipeline_which_then_continues(launch, monkeypatch):
    """The same command continues it."""
    clock = iter([0.0, 60.0, 100.0, 107.5, 0.0, 5.0, 0.0, 1.0])  # start and end of each stage that runs
    monkeypatch.setattr(pipeline_run, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    result = launch(ends={"pairs": 75})
    assert (result.status, result.ran) == (75, ["sft", "pairs"])
    assert result.out.endswith("The pipeline stopped in stage 2 of 3, pairs; the same command continues it.\n")
    assert states() == {"sft": "done", "pairs": "running"} and not Path("runs/q/report.html").exists()
    result = launch()
    assert (result.status, result.ran) == (0, ["pairs", "model"])
    assert "sft: done in 1:00, runs/q/sft\n" in result.out
    assert {name: one["seconds"] for name, one in record().items()} == {"sft": 60.0, "pairs": 12.5, "model": 1.0}


@pytest.mark.parametrize("end", [KeyboardInterrupt(), UserError("config.data.path is 'x'")])
def test_a_failed_stage_runs_again_and_those_before_it_do_not(launch, end):
    assert launch(ends={"model": end}).status in (130, 2)
    assert states() == {"sft": "done", "pairs": "done", "model": "running"}
    assert launch().ran == ["model"]


def test_a_stage_is_recorded_before_it_runs(launch, monkeypatch):
    """So a run that is killed leaves a pipeline that goes on."""
    seen = []
    monkeypatch.setattr(pipeline_run, "_release", lambda: seen.append(everything()["runs/q/pipeline.json"]))
    launch()
    killed = json.loads(seen[0])["stages"] | {"pairs": record()["pairs"] | {"state": "running", "seconds": 0.0}}
    Path("runs/q/pipeline.json").write_text(json.dumps({"stages": killed}))  # as it is while pairs runs
    Path("runs/q/.pipeline.json.tmp").write_text("{")
    assert launch().ran == ["pairs", "model"]


@pytest.mark.parametrize("text", ["{", "[]", '{"stages": {"sft": {"state": "done", "config": {}}}}'])
def test_a_damaged_record_is_refused_and_can_be_put_aside(launch, refuse, text):
    launch()
    Path("runs/q/pipeline.json").write_text(text)
    message = refuse()
    assert "runs/q/pipeline.json cannot be read" in message and "--config.on_existing=restart" in message
    assert launch("--config.on_existing=restart").ran == list(NAMES)


def test_an_empty_folder_or_one_without_a_record_is_new(launch):
    """A launch that is killed before its record leaves such a folder."""
    Path("runs/q").mkdir(parents=True)
    Path("runs/q/.pipeline.json.tmp").write_text("{")
    assert launch().ran == list(NAMES)


def test_a_stages_mistake_names_the_stage_and_its_fields(launch):
    result = launch(ends={"pairs": lambda: UserError(option("data.path"), "'x'", "a folder", f"{flag('data.path')}=y")})
    assert result.err == (
        "stage pairs: config.pairs.data.path is 'x'; it must be a folder, e.g. --config.pairs.data.path=y"
    )


def test_a_first_stage_that_refuses_leaves_nothing_behind(launch):
    before = everything()
    assert launch(ends={"sft": UserError("no")}).status == 2
    assert everything() == before
    launch(ends={"pairs": UserError("no")})
    assert states() == {"sft": "done", "pairs": "running"}


def test_another_config_of_a_run_is_refused_with_what_to_type(launch, refuse):
    launch()
    message = refuse("--config.pairs.pairs.count=7")
    assert message.startswith(
        "config.pairs.run_dir is 'runs/q/pairs', which holds a run of another config: config.pairs.pairs.count was "
        "2000 and is 7; use --config.pairs.on_existing=restart to put it aside and start anew"
    )
    assert message.endswith("; --config.on_existing=restart starts the whole pipeline anew")
    assert "config.sft.seed was 0 and is 1" in refuse("--config.seed=1")
    assert launch("--config.sft.mesh.fsdp=2", "--config.model.evaluation.every=3").ran == []


def test_restart_puts_the_whole_pipeline_aside(launch):
    launch()
    before = everything()
    result = launch("--config.on_existing=restart", "--config.seed=1", ends={"pairs": 75})
    assert result.ran == ["sft", "pairs"]
    assert "runs/q is new; what was there is now " in result.out
    assert "the same command continues it" in result.out
    now = everything()
    moved = {name.replace("runs/q", "runs/q.1", 1): text for name, text in before.items()}
    assert {name: now[name] for name in moved} == moved
    assert record()["sft"]["config"]["seed"] == 1
    assert launch("--config.seed=1").ran == ["pairs", "model"]


def test_a_stopped_restart_of_the_pipeline_is_continued(launch):
    """A job that is queued again has its restart in the command still."""
    launch()
    restart = "--config.on_existing=restart"
    assert launch(restart, ends={"pairs": 75}).ran == ["sft", "pairs"]
    assert launch(restart, ends={"model": RuntimeError("power cut")}, crashes=True).ran == ["pairs", "model"]
    assert launch(restart).ran == ["model"]
    assert not Path("runs/q.2").exists()
    assert launch(restart).ran == list(NAMES)
    assert Path("runs/q.2").exists()


def test_a_stopped_restart_of_stages_is_continued(launch):
    launch()
    restart = ("--config.pairs.on_existing=restart", "--config.model.on_existing=restart")
    assert launch(*restart, ends={"model": 75}).ran == ["pairs", "model"]
    assert launch(*restart).ran == ["model"]
    assert sorted(path.name for path in Path("runs/q").glob("*.1")) == ["model.1", "pairs.1"]
    assert launch(*restart).ran == ["pairs", "model"]


def test_a_pipeline_in_use_is_refused(launch, refuse, monkeypatch):
    launch(ends={"pairs": 75})
    run_lock.take(Path("runs/q"), "runs/q")
    monkeypatch.setattr(run_lock, "_mine", {})  # as another process sees it
    for on_existing in ("resume", "restart"):
        message = refuse(f"--config.on_existing={on_existing}")
        assert message.startswith("config.run_dir is 'runs/q', which is in use by process ")
    Path("runs/q/.lock").rename("runs/q/sft/.lock")  # one of its stages, launched alone
    assert refuse("--config.on_existing=restart").startswith("config.sft.run_dir is 'runs/q/sft', which is in use by ")


def test_restart_of_a_stage_takes_what_is_built_on_it(launch, refuse):
    launch()
    restart_last = ("--config.model.on_existing=restart", "--config.model.num_steps=3")
    assert launch(*restart_last).ran == ["model"]
    assert Path("runs/q/model.1/run.json").exists()
    message = refuse("--config.pairs.on_existing=restart", "--config.model.num_steps=3")
    assert message == (
        "config.model.on_existing is 'resume', but its run is built on pairs, which starts anew; use "
        "--config.model.on_existing=restart to start it anew too; --config.on_existing=restart starts the whole "
        "pipeline anew"
    )
    assert launch("--config.pairs.on_existing=restart", *restart_last).ran == ["pairs", "model"]


def test_a_removed_run_is_remade_only_with_what_builds_on_it(launch, refuse):
    launch()
    Path("runs/q/pairs").rename("elsewhere")
    assert "its run is built on pairs, which starts anew" in refuse()
    Path("runs/q/model").rename("elsewhere/model")
    assert launch().ran == ["pairs", "model"]


def test_error_refuses_a_folder_that_holds_a_pipeline(launch, refuse):
    assert launch("--config.on_existing=error").ran == list(NAMES)
    assert "runs/q holds a pipeline; use --config.on_existing=resume" in refuse("--config.on_existing=error")


def test_folders_that_hold_something_else_are_refused(launch, refuse):
    Path("thesis").mkdir()
    Path("thesis/chapter.tex").touch()
    for more in ("resume", "restart"):
        message = refuse("--config.run_dir=thesis", f"--config.on_existing={more}")
        assert message.startswith("config.run_dir is 'thesis', which is no pipeline but holds 'chapter.tex'")
    open_run("runs/q", {}, command=[], devices=DEVICES)
    assert refuse().startswith("runs/q holds a single run; use --config.on_existing=restart to put it aside")
    assert launch("--config.on_existing=restart").ran == list(NAMES)
    assert Path("runs/q.1/run.json").exists()


def test_some_of_the_stages_run_alone_where_the_others_are_done(launch):
    assert launch("--config.stages=sft").ran == ["sft"]
    result = launch("--config.stages=pairs")
    assert result.ran == ["pairs"] and "stage 1 of 1: pairs" in result.out
    assert launch().ran == ["model"]


def test_processes_follow_the_writer(launch, monkeypatch):
    """A process that writes nothing, and sees no folder, skips what the writer says is done."""
    monkeypatch.setattr(pipeline_run.jax, "process_count", lambda: 2)
    monkeypatch.setattr(pipeline_run.jax, "process_index", lambda: 1)
    monkeypatch.setattr(pipeline_record, "from_writer", lambda outcome, is_writer: 0b011)
    result = launch()
    assert (result.status, result.ran, result.out) == (0, ["model"], "")
    assert not Path("runs/q/pipeline.json").exists()
    monkeypatch.setattr(pipeline_record, "from_writer", lambda outcome, is_writer: -1)
    assert "which the first process refused" in launch().err


def test_what_a_stage_left_in_memory_is_freed_before_the_next(launch, monkeypatch):
    freed = []
    monkeypatch.setattr(pipeline_run, "_release", lambda: freed.append(sorted(states())))
    launch()
    assert freed == [["sft"], ["pairs", "sft"], ["model", "pairs", "sft"]]


# --- the report


def ppo_stages(**evaluations):
    """PPO stages, done, whose runs hold an evaluation each."""
    made = {"sft": SFT(), **{name: PPO() for name in evaluations}}
    config = pipeline("runs/q", **made)
    result = resolve(config)
    for name, evaluation in evaluations.items():
        folder = Path("runs/q") / name
        folder.mkdir(parents=True)
        if evaluation is not None:
            (folder / "evaluation.json").write_text(json.dumps({"step": 9, "prompts": 64, **evaluation}))
    return list(result.values())


def write_rows(name, file, *rows):
    (Path("runs/q") / name / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


LITERAL = {"kind": "literal", "before": {"reward": 1.0, "judge": 0.25, "kl": 0.0, "odd": 1.0}, "after": {"reward": 2.5,
           "judge": 0.75, "kl": 3.5}}  # fmt: skip
SCALAR = {"kind": "scalar", "before": {"reward": -4.0, "judge": 0.25, "kl": 0.0}, "after": {"reward": 6.0,
          "judge": 0.5, "kl": "nan"}}  # fmt: skip


def test_policies_are_compared_by_what_all_of_them_measured():
    result = pipeline_report.policy_table(ppo_stages(a=LITERAL))
    assert result.columns == ("policy", "reward", "judge", "kl")
    assert result.rows == (("SFT", 1.0, 0.25, 0.0), ("a (literal)", 2.5, 0.75, 3.5))
    assert (result.title, result.note) == ("Policies on 64 held-out prompts", "")


def test_rewards_of_different_reward_models_share_no_number():
    result = pipeline_report.policy_table(ppo_stages(a=LITERAL, b=SCALAR))
    assert result.rows[:2] == (("SFT", None, 0.25, 0.0), ("a (literal)", "1 → 2.5", 0.75, 3.5))
    assert result.rows[2][:3] == ("b (scalar)", "-4 → 6", 0.5) and str(result.rows[2][3]) == "nan"
    assert result.note.startswith("reward: before → after")


def test_without_ppo_there_is_nothing_to_compare():
    assert pipeline_report.policy_table(ppo_stages()) is None
    assert pipeline_report.policy_table(ppo_stages(a=None)) is None


def test_curves_have_a_line_for_each_run_that_measured_it():
    result = ppo_stages(a=LITERAL, b=SCALAR)
    write_rows("a", "metrics.jsonl", {"step": 0, "eval_judge": 0.25}, {"step": 1, "reward": 1.0, "kl": 0.5},
               {"step": 2, "reward": "nan", "kl": 0.75, "eval_judge": 0.5})  # fmt: skip
    write_rows("b", "metrics.jsonl", {"step": 1, "reward": 3.0})
    lines = {chart.title: {line.name: (line.x, line.y) for line in chart.series} for chart in
             pipeline_report.curves(result)}  # fmt: skip
    assert lines["Judge, held-out prompts"] == {"a": ((0.0, 2.0), (0.25, 0.5))}
    assert lines["KL from the SFT policy"] == {"a": ((1.0, 2.0), (0.5, 0.75))}
    rewards = lines["Reward of the rollouts"]
    assert rewards["b"] == ((1.0,), (3.0,)) and str(rewards["a"][1]) == "(1.0, nan)"


def test_examples_show_the_first_and_last_response_of_each_run():
    result = ppo_stages(a=LITERAL, b=SCALAR)
    row = {
        "prompt": "p",
        "step": 0,
        "response": "first",
        "reward": 0.5,
        "tokens": ["fi", "rst"],
        "rewards": [0.25, 0.25],
    }
    changes = [
        {},
        {"step": 5, "response": "middle"},
        {"step": 9, "response": "cut off"},
        {"step": 9, "response": "last"},
    ]
    write_rows("a", "samples.jsonl", *({**row, **change} for change in changes))
    write_rows(
        "b", "samples.jsonl", {**row, "response": "same first"}, {**row, "step": 7, "response": "b", "judge": 1.0}
    )
    (example,) = pipeline_report.examples(result)
    shown = [(response.name, response.text) for response in example.responses]
    assert shown == [("SFT", "first"), ("a, step 9", "last"), ("b, step 7", "b")]
    assert example.responses[0].tokens == ("fi", "rst") and example.responses[0].rewards == (0.25, 0.25)
    assert example.responses[2].facts == (("reward", "0.5"), ("judge", "1"))


def test_tables_are_printed_and_the_report_is_written(capsys):
    result = ppo_stages(a=LITERAL)
    write_rows("a", "metrics.jsonl", {"step": 1, "reward": 1.0}, {"step": 2, "reward": 2.0})
    write_rows("a", "samples.jsonl", {"step": 0, "prompt": "how?", "response": "so"})
    pipeline_report.publish(Path("runs/q"), result, {"sft": 62.0, "a": 3.0})
    out = capsys.readouterr().out
    assert "sft    supervised fine-tuning  1:02" in out and "a      PPO, literal rewards    3 s" in out
    assert "all                            1:05" in out
    assert "a (literal)     2.5   0.75  3.5" in out
    assert out.index("Stages in") < out.index("Policies on") < out.index("runs/q/report.html")
    report = Path("runs/q/report.html").read_text()
    for text in ("a (literal)", "supervised fine-tuning", "Reward of the rollouts", "how?"):
        assert text in report


def test_each_source_of_a_sum_has_its_row_line_and_tokens(capsys):
    """In the tables, the charts and the examples of the report."""
    two = {"words": RewardConfig(model="x"), "rule": RewardConfig(kind="scalar", function="a:b", weight=0.5)}
    (first, *_) = ppo_stages(a=LITERAL)
    stage = PipelineStage("a", PPO(run_dir="runs/q/a", rewards=two), {})
    metrics = {"reward/rule": 3.0, "reward/words": 1.0, "reward_share/rule": 0.25, "reward_share/words": 0.75}
    metrics |= {f"reward_length_correlation/{name}": -0.5 for name in two} | {"reward_correlation/rule/words": 0.125}
    Path("runs/q/a/evaluation.json").write_text(
        json.dumps(
            {
                "step": 2,
                "prompts": 4,
                "kind": "k",
                "before": {"reward": 0.0} | metrics,
                "after": {"reward": 2.5} | metrics,
            }
        )
    )
    write_rows("a", "metrics.jsonl", {"step": 1, "reward": 2.5, **metrics}, {"step": 2, "reward": 2.5, **metrics})
    sources = {"words": {"weight": 1.0, "reward": 1.0, "rewards": [1.0]}}
    row = {"step": 2, "prompt": "p", "response": "so", "reward": 1.0, "tokens": ["so"], "rewards": [1.0]}
    write_rows("a", "samples.jsonl", row | {"sources": sources})

    (table,) = pipeline_report.source_tables([first, stage])
    assert table.columns == (
        "source",
        "reward, before",
        "reward, after",
        "share",
        "r with length",
        "r with rule",
        "r with words",
    )
    assert table.rows[0] == ("rule", 3.0, 3.0, 0.25, -0.5, None, 0.125)
    lines = {chart.title: [line.name for line in chart.series] for chart in pipeline_report.curves([stage])}
    assert (
        lines["Reward of the rollouts by source"] == lines["Share of the reward by source"] == ["a, words", "a, rule"]
    )
    (example,) = pipeline_report.examples([stage])
    assert [source.rewards for source in example.responses[0].sources] == [(1.0,)]
    pipeline_report.publish(Path("runs/q"), [stage], {"a": 3.0})
    out = capsys.readouterr().out
    assert (
        "Sources of the reward of a, held-out prompts" in out
        and "PPO, words (literal) + 0.5 * rule (scalar) rewards" in out
    )
    assert "reward_share" not in out
