"""What reward models and `jaxrm.score` answer to mistakes: one line, exit status 2, no traceback, nothing written.

As in test_bad_input.py, the mistakes are made one at a time in a command line that is otherwise good. Runs are written
as training leaves them, with random parameters.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from support.stage_configs import stage_config

from jaxrm import export, generate, score, train
from jaxrm.config import command_line, dicts
from jaxrm.data.config import DataConfig
from jaxrm.data.tasks import write_task
from jaxrm.data.tokenizer import load_tokenizer
from jaxrm.errors import UserError
from jaxrm.inference.load import save_shape_and_tokenizer
from jaxrm.inference.response_batches import response_batches
from jaxrm.models.build import ModelSource, abstract_decoder, abstract_scalar_model
from jaxrm.models.config import ModelConfig
from jaxrm.runtime import run_lock
from jaxrm.runtime.checkpoint import Checkpoints
from jaxrm.runtime.run_folder import open_run
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import StageConfig

TINY = ModelConfig(
    family="llama",
    vocab_size=256,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position=96,
    tie_embeddings=True,
)
CONFIG = '''"""A reward model on the pairs beside this file."""

from jaxrm.data.config import DataConfig
from jaxrm.stage_config import STAGES
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.metrics import LoggingConfig


def evaluation(algorithm):
    section = type(STAGES[algorithm].config_class().evaluation)
    sampling = SamplingConfig(max_new_tokens=16, temperature=0.0)
    return section() if algorithm == "scalar_rm" else section(sampling=sampling)


def get_config(algorithm="seq2seq_rm"):
    config_class = STAGES[algorithm].config_class
    return config_class(
        run_dir="new",
        num_steps=1,
        model=ModelSource(path="policy"),
        data=DataConfig(path="pairs.jsonl", max_length=96, batch_size=8, packing=False, eval_share=0.2),
        evaluation=evaluation(algorithm),
        logging=LoggingConfig(progress=False, tensorboard=False),
    )
'''


def write_run(folder, algorithm, tokenizer, *, shape=TINY, value=None, **fields):
    """The folder of a run with one checkpoint, of small random parameters or of one value; nothing is compiled."""
    fields = {"model": ModelSource(preset="tiny"), "data": DataConfig(path="pairs.jsonl"), **fields}
    experiment = stage_config(algorithm, run_dir=str(folder), **fields)
    run = open_run(experiment.run_dir, dicts.to_dict(experiment))
    save_shape_and_tokenizer(shape, tokenizer, run)
    abstract = abstract_scalar_model if algorithm == "scalar_rm" else abstract_decoder
    rng = np.random.default_rng(0)

    def draw(leaf):
        drawn = rng.normal(0, 0.1, leaf.shape) if value is None else np.full(leaf.shape, value)
        return jax.numpy.asarray(drawn.astype(np.float32))

    checkpoints = Checkpoints(run.checkpoints)
    params = jax.tree.map(draw, abstract(shape, ModelSource(preset="tiny"))[1])
    checkpoints.save(1, {"params": params}, {"loader": {}, "data": ""}, 1.0)
    checkpoints.close()
    run_lock.give_back(Path(folder))  # else its heartbeat changes what a test compares


def exchange_two_words(folder):
    """Gives two words of a tokenizer each other's id: another vocabulary, of the same size."""
    file = Path(folder) / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = [word for word in vocabulary if word.isalpha()][10:12]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(content))
    return a, b


@pytest.fixture(scope="session")
def rm_sources(tmp_path_factory):
    """A folder with a config file, pairs, and runs of a policy and of both sorts of reward model."""
    folder = tmp_path_factory.mktemp("rm_sources")
    (folder / "config.py").write_text(CONFIG)
    write_task("safety", folder / "task", seed=0)
    for name, source in (("pairs.jsonl", "pairs.jsonl"), ("demonstrations.jsonl", "train.jsonl")):
        lines = (folder / "task" / source).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:60]))
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "how do i wash lamp {i} ?"}}\n' for i in range(30)))
    (folder / "task/tokenizer").rename(folder / "tokenizer")
    shutil.rmtree(folder / "task")
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    write_run(folder / "policy", "sft", tokenizer)
    for name in ("seq2seq_rm", "scalar_rm"):
        write_run(folder / name, name, tokenizer)
    return folder


@pytest.fixture
def place(rm_sources, tmp_path, monkeypatch):
    """The working directory: a copy of the sources."""
    shutil.copytree(rm_sources, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


OPTIONS = {
    train: {"config_class": StageConfig, "define_flags": train.define_flags},
    score: {
        "config_class": score.CONFIG_CLASSES,
        "config_required": False,
        "define_flags": score.define_flags,
        "flag_of_field": score.FLAG_OF_FIELD,
    },
    generate: {"define_flags": generate.define_flags, "flag_of_field": generate.FLAG_OF_FIELD},
    export: {"define_flags": export.define_flags, "flag_of_field": export.FLAG_OF_FIELD},
}


@pytest.fixture
def refuse(place, capsys):
    """Runs a mistaken command line: the one line that it is answered with, after `jaxrm: error: `."""

    def run(command, *arguments):
        before = everything_in(place)
        capsys.readouterr()
        status = command_line.run(command.main, argv=["jaxrm", *arguments], **OPTIONS[command])
        out, err = capsys.readouterr()
        assert (status, out) == (2, ""), (status, out, err)
        assert err.startswith("jaxrm: error: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert everything_in(place) == before
        return err.removeprefix("jaxrm: error: ").rstrip()

    return run


@pytest.fixture
def refuse_train(refuse):
    return lambda *arguments: refuse(train, "--config=config.py", *arguments)


@pytest.fixture
def refuse_score(refuse):
    """Runs `jaxrm.score` with good flags, but for those that are given; None leaves one out."""

    def run(*arguments, checkpoint="seq2seq_rm", input="pairs.jsonl", output="scored.jsonl"):
        flags = {"checkpoint": checkpoint, "input": input, "output": output}
        return refuse(score, *(f"--{name}={value}" for name, value in flags.items() if value is not None), *arguments)

    return run


def run_score(*arguments):
    return command_line.run(score.main, argv=["jaxrm", *arguments], **OPTIONS[score])


def write_records(name, rows):
    Path(name).write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


def read_records(name):
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def pair(i, chosen="a lamp", rejected="a rope"):
    return {"prompt": f"how do i wash lamp {i} ?", "chosen": chosen, "rejected": rejected}


BOTH = pytest.mark.parametrize("algorithm", ["seq2seq_rm", "scalar_rm"])


# --- training: fields


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.reward.kind=nonsense"], "config.reward.kind is 'nonsense'; it must be one of literal, signed, "),
        (
            ["--config.reward.scale=0"],
            "config.reward.scale is a field of ppo, best_of_n, evaluate; this",
        ),
        (["--config.reward.center=moving"], "config.reward.center is 'moving'; required 'running' or 'fixed' or "),
        (
            ["--config.reward.center_momentum=1"],
            "config.reward.center_momentum is a field of ppo, best_of_n, ",
        ),
        (["--config.mapping.correction_weight=0"], "config.mapping.correction_weight is 0.0; it must be above 0"),
        (["--config.mapping.edit_weight=0"], "config.mapping.edit_weight is 0.0; it must be above 0 and finite"),
        (
            ["--config.mapping.identity_weight=nan"],
            "config.mapping.identity_weight is nan, not a number; required ",
        ),
        (
            ["--config.mapping.identity_weight=0"],
            "above 0 and finite (identity=False leaves the mapping out)",
        ),
        (["--config.mapping.identity_warmup_steps=-1"], "config.mapping.identity_warmup_steps is -1; it must be at"),
        (
            ["--config.mapping.identity_warmup_steps=3", "--config.mapping.identity=False"],
            "config.mapping.identity_warmup_steps is 3; it must be 0 where config.mapping.identity is False",
        ),
        (
            ["--config=config.py:scalar_rm", "--config.scalar_rm.margin=-1"],
            "margin is -1.0; it must be at least 0",
        ),
        (
            ["--config=config.py:scalar_rm", "--config.scalar_rm.l2=inf"],
            "scalar_rm.l2 is inf; it must be at least 0 and",
        ),
        (["--config.evaluation.corrections=-1"], "config.evaluation.corrections is -1; it must be at least 0"),
        (
            ["--config.evaluation.judge=task:nope"],
            "config.evaluation.judge is 'task:nope'; there is a judge for task:safety, task:summarize, task:dialogue; ",
        ),
    ],
    ids=lambda value: value[-1].removeprefix("--config.") if isinstance(value, list) else "",
)
def test_a_wrong_field_of_a_reward_model_is_named(refuse_train, arguments, message):
    assert message in refuse_train(*arguments)


def test_a_warm_up_as_long_as_the_run_is_refused(refuse_train):
    message = refuse_train("--config.mapping.identity_warmup_steps=1")
    assert message.startswith("config.mapping.identity_warmup_steps is 1, but the run has 1 steps in all")


def test_a_judge_of_other_data_is_refused_before_training(refuse_train):
    write_records("foreign.jsonl", [pair(i) for i in range(60)])
    message = refuse_train("--config.data.path=foreign.jsonl", "--config.evaluation.judge=task:safety")
    assert message.startswith("config.evaluation.judge is 'task:safety', but foreign.jsonl:")
    assert "has no prompt of that task" in message and "--config.evaluation.judge=None" in message


def test_corrections_without_room_are_refused_before_training(refuse_train):
    message = refuse_train("--config.evaluation.sampling.max_new_tokens=80")
    assert message.startswith("config.evaluation.sampling.max_new_tokens is 80, but the model reads 96 tokens: a token")
    most = int(message.rpartition("=")[2])
    # One more than what it says is still refused: it says the most that fits.
    assert f"leave {most};" in refuse_train(f"--config.evaluation.sampling.max_new_tokens={most + 1}")


# --- training: pairs


@BOTH
@pytest.mark.parametrize("name", ["demonstrations.jsonl", "prompts.jsonl"])
def test_records_that_are_no_pairs_teach_no_reward_model(refuse_train, algorithm, name):
    message = refuse_train(f"--config=config.py:{algorithm}", f"--config.data.path={name}")
    assert message.startswith(f"{name}:") and "without a chosen and a rejected response" in message
    assert "give records with prompt, chosen and rejected" in message


@BOTH
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"chosen": "a lamp", "rejected": "a lamp"}, "both responses are the same"),
        ({"chosen": "a lamp", "rejected": " a lamp\n"}, "both responses are the same"),
        ({"rejected": " "}, "'rejected' is empty"),
        ({"chosen": ""}, "'chosen' is empty"),
    ],
    ids=["equal", "equal but for space", "rejected empty", "chosen empty"],
)
def test_bad_pairs_past_the_share_are_counted_with_the_first(refuse_train, algorithm, bad, reason):
    good = read_records("pairs.jsonl")
    write_records("bad.jsonl", [*good[:40], *(pair(i) | bad for i in range(20))])
    message = refuse_train(f"--config=config.py:{algorithm}", "--config.data.path=bad.jsonl")
    assert "records are unusable, more than config.data.max_bad_share 0.05" in message
    assert reason in message and "first at bad.jsonl:4" in message and "--config.data.max_bad_share=0." in message


@pytest.mark.parametrize(
    ("algorithm", "what"),
    [("seq2seq_rm", "source, request and target"), ("scalar_rm", "the two responses")],
)
def test_pairs_too_long_for_a_row_are_counted_or_refused(refuse_train, algorithm, what):
    """They are never cut."""
    choice = [f"--config=config.py:{algorithm}", "--config.data.max_length=30"]
    message = refuse_train(*choice)
    assert "and none is left" in message and f"{what} longer than config.data.max_length 30" in message
    message = refuse_train(*choice, "--config.data.too_long=error")
    assert f"pairs.jsonl:1: {what} and one token of the prompt take " in message and "but a row has 30; " in message
    assert "--config.data.max_length=" in message and "--config.data.too_long=drop" in message


def test_held_out_pairs_that_do_not_fit_twice_are_not_scored(refuse_train):
    """A long rejected response fits the row of a mapping, but not the row that scores it, which has it twice."""
    lopsided = [pair(i, "a", "lamp " * 50) for i in range(20)]
    write_records("held_out.jsonl", [*read_records("pairs.jsonl")[:20], *lopsided])
    message = refuse_train("--config.data.eval_path=held_out.jsonl")
    assert message.startswith("held_out.jsonl: 20 of 40 records are unusable")
    assert "a response too long for the 96 tokens of the model (20, first at held_out.jsonl:21)" in message


@BOTH
def test_a_batch_larger_than_the_pairs_is_refused(refuse_train, algorithm):
    """The message shows one that fits."""
    message = refuse_train(f"--config=config.py:{algorithm}", "--config.data.batch_size=512")
    assert "config.data.batch_size is 512, but the " in message and "e.g. --config.data.batch_size=" in message


# --- training: vocabularies and checkpoints of another kind


@pytest.mark.parametrize("algorithm", ["sft", "seq2seq_rm", "scalar_rm"])
def test_a_tokenizer_of_other_weights_is_refused(refuse_train, algorithm):
    """Even one of the same size."""
    shutil.copytree("tokenizer", "exchanged")
    a, b = exchange_two_words("exchanged")
    message = refuse_train(f"--config=config.py:{algorithm}", "--config.data.tokenizer=exchanged")
    assert message.startswith("the tokenizer exchanged is not that of the weights policy: token id ")
    assert f"is {a!r} in the one and {b!r} in the other" in message
    assert message.endswith("--config.data.tokenizer=policy/tokenizer")


@BOTH
def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(refuse_train, algorithm):
    write_run("small", "sft", load_tokenizer("tokenizer"), shape=dataclasses.replace(TINY, vocab_size=64))
    message = refuse_train(f"--config=config.py:{algorithm}", "--config.model.path=small")
    assert (
        "'erase' with id 64, but the model's vocabulary holds 64 tokens; use the tokenizer that belongs to the model"
        in message
    )


@pytest.mark.parametrize("algorithm", ["sft", "seq2seq_rm", "scalar_rm"])
def test_a_scalar_reward_model_is_no_model_to_start_from(refuse_train, algorithm):
    message = refuse_train(f"--config=config.py:{algorithm}", "--config.model.path=scalar_rm")
    assert message.startswith("config.model.path is 'scalar_rm', a run of scalar_rm; required a model of sft or ppo or")


def test_a_scalar_reward_model_writes_no_text(refuse):
    message = refuse(generate, "--checkpoint=scalar_rm", "--prompt=hello")
    assert message.startswith("--checkpoint is 'scalar_rm', a run of scalar_rm; required a model of sft or ppo or ")


@pytest.mark.parametrize(("command", "rest"), [(generate, "--prompt=hello"), (export, "--output=exported")])
def test_a_run_given_as_published_weights_is_told_its_flag(refuse, command, rest):
    message = refuse(command, "--weights=seq2seq_rm", rest)
    assert message.startswith("--weights is 'seq2seq_rm', the folder of a run; required are published weights")
    assert message.endswith("--checkpoint=seq2seq_rm")


# --- score: flags and files


@pytest.mark.parametrize(
    ("flags", "arguments", "message"),
    [
        ({"checkpoint": None}, [], "--checkpoint is missing; e.g. --checkpoint=runs/"),
        ({"input": None}, [], "--input is missing; e.g. --input=pairs.jsonl"),
        ({"output": None}, [], "--output is missing; e.g. --output=scored.jsonl"),
        ({"output": ""}, [], "--output is missing; e.g. --output=scored.jsonl"),
        ({"output": "policy"}, [], "--output is 'policy', which is a folder; give a file, e.g. --output=scored.jsonl"),
        ({"output": "no/a.jsonl"}, [], "--output is 'no/a.jsonl', which cannot be written, since no is no such folder"),
        ({}, ["--html=no/a.html"], "--html is 'no/a.html', which cannot be written, since no is no such folder"),
        ({}, ["--html=scored.jsonl"], "--html is 'scored.jsonl', and so is --output; name two files, e.g. --html=sc"),
        ({"output": "pairs.jsonl"}, [], "--output is 'pairs.jsonl', which is --input and would be overwritten; name a"),
        ({"output": "policy/../pairs.jsonl"}, [], "which is --input and would be overwritten"),
        ({}, ["--html=pairs.jsonl"], "--html is 'pairs.jsonl', which is --input and would be overwritten"),
        ({"input": "tokenizer", "output": "tokenizer/tokenizer.json"}, [], "which is a file of --input and would be "),
        ({"input": "absent.jsonl"}, [], "--input is 'absent.jsonl', which is no file, folder or data set (org/name)"),
        ({}, ["--kind=sof"], "signed, prefix, soft, margin, contrast, edit_aligned; did you mean --kind=sof"),
        ({}, ["--kind=zzz"], "--kind is 'zzz'; use one of literal, signed, prefix, soft, margin, contrast, edit_ali"),
        ({}, ["--kind=scalar"], "--kind is 'scalar', but seq2seq_rm, step 1 is a seq2seq reward model, whose kinds a"),
        ({"checkpoint": "scalar_rm"}, ["--kind=soft"], "--kind is 'soft', but scalar_rm, step 1 is a scalar reward m"),
        (
            {"checkpoint": "scalar_rm"},
            ["--config=config.py"],
            "config.reward.kind is 'literal', but scalar_rm, step 1 is a scalar reward model, whose kinds are scalar, "
            "scalar_length_residual, value_difference; e.g. --kind=scalar",
        ),
        ({}, ["--config.reward.kind=soft"], "--config.reward.kind overrides nothing; give its file too"),
        ({}, ["--kind=contrast"], "the kind is contrast, and --reference is None; contrast and dpo compare with a "),
        ({}, ["--reference=policy"], "the kind is literal, and --reference is policy; contrast and dpo compare "),
        ({}, ["--kind=contrast", "--reference=absent"], "--reference is 'absent', but absent has no run.json"),
        ({}, ["--kind=contrast", "--reference=scalar_rm"], "--reference is 'scalar_rm', a run of scalar_rm; required"),
        ({}, ["--max_new_tokens=0"], "--max_new_tokens is '0'; required a positive integer"),
        ({}, ["--max_records=0"], "--max_records is '0'; required a positive integer"),
        ({}, ["--batch_size=0"], "--batch_size is '0'; required a positive integer"),
        ({}, ["--dtype=int8"], "--dtype is 'int8'; use one of float32, bfloat16"),
        ({"checkpoint": "policy"}, [], "--checkpoint is 'policy', a run of sft; required a model of seq2seq_rm or sca"),
        ({"checkpoint": "absent"}, [], "--checkpoint is 'absent', but absent has no run.json"),
        ({"checkpoint": "seq2seq_rm/checkpoints/7"}, [], "but the checkpoints of that run are 1, and best"),
        ({"input": "prompts.jsonl"}, [], "--input is 'prompts.jsonl', of which nothing can be scored: a prompt withou"),
    ],
)  # fmt: skip
def test_score_refuses(refuse_score, flags, arguments, message):
    assert message in refuse_score(*arguments, **flags)


def test_a_kind_that_a_run_recorded_asks_for_its_reference_too(refuse_score):
    recorded = json.loads(Path("seq2seq_rm/run.json").read_text())
    recorded["config"]["reward"]["kind"] = "contrast"
    Path("seq2seq_rm/run.json").write_text(json.dumps(recorded))
    message = refuse_score()
    assert message.startswith("the kind is contrast, and --reference is None") and "--reference=runs/" in message


def test_a_reward_model_without_a_checkpoint_yet_is_refused(refuse_score):
    shutil.rmtree("seq2seq_rm/checkpoints")
    assert refuse_score().startswith("--checkpoint is 'seq2seq_rm', which has no checkpoint yet; wait for one, or ")


def test_a_reference_of_another_vocabulary_is_refused(refuse_score):
    """Even one of the same size."""
    shutil.copytree("policy", "other")
    a, b = exchange_two_words("other/tokenizer")
    message = refuse_score("--kind=contrast", "--reference=other")
    assert message.startswith("--reference is 'other', which has another vocabulary than seq2seq_rm, step 1: token id ")
    assert f"{a!r}" in message and f"{b!r}" in message and "required a policy that reads the same ids" in message


def test_a_reference_that_lacks_some_of_the_ids_is_refused(refuse_score):
    write_run("small", "sft", load_tokenizer("tokenizer"), shape=dataclasses.replace(TINY, vocab_size=64))
    message = refuse_score("--kind=contrast", "--reference=small")
    assert (
        message.startswith("--reference is 'small', which has another vocabulary")
        and "for which small, step 1 has no token;" in message
    )


# --- score: what cannot be scored


def test_a_file_of_which_nothing_is_usable_is_refused(refuse_score):
    write_records("damaged.jsonl", ["{", "{", "[1]"])
    message = refuse_score(input="damaged.jsonl")
    assert message.startswith("damaged.jsonl: 3 of 3 records are unusable and none is left; most often: invalid JSON ")
    assert "(2, first at damaged.jsonl:1)" in message
    write_records("long.jsonl", [pair(i, rejected="lamp " * 100) for i in range(3)])
    message = refuse_score(input="long.jsonl")
    assert (
        "nothing can be scored: a response too long for the 96 tokens of the model (first at long.jsonl:1)" in message
    )


def test_corrections_without_room_are_refused_before_scoring(refuse_score):
    message = refuse_score()  # --max_new_tokens is 128 by default
    assert message.startswith("--max_new_tokens is 128, but the model reads 96 tokens") and "(pairs.jsonl:" in message
    most = int(message.rpartition("--max_new_tokens=")[2])
    assert f"leave {most};" in refuse_score(f"--max_new_tokens={most + 1}")


def test_unscorable_records_are_counted_and_the_rest_is_scored(place, capsys):
    good = read_records("pairs.jsonl")[:3]
    bad = ["{", pair(1, rejected="lamp " * 100), pair(2, "a lamp", " a lamp "), pair(3, rejected=" ")]
    write_records("mixed.jsonl", [*good, *bad, {"prompt": "how do i wash a lamp ?", "chosen": "x"}])
    flags = ["--checkpoint=scalar_rm", "--input=mixed.jsonl", "--output=scored.jsonl"]
    assert run_score(*flags) == 0
    assert [row["source"] for row in read_records("scored.jsonl")] == [f"mixed.jsonl:{i}" for i in (1, 2, 3)]
    table = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {
        "read 8",
        "used 3",
        "invalid JSON 1 mixed.jsonl:4",
        "a response too long for the 96 tokens of the model 1 mixed.jsonl:5",
        "both responses are the same 1 mixed.jsonl:6",
        "'rejected' is empty 1 mixed.jsonl:7",
        "missing field 'rejected' 1 mixed.jsonl:8",
    } <= table


def test_a_diverged_reward_model_is_refused(place, capsys):
    """Nothing is written."""
    write_run("diverged", "scalar_rm", load_tokenizer("tokenizer"), value=np.nan)
    before = everything_in(place)
    assert run_score("--checkpoint=diverged", "--input=pairs.jsonl", "--output=scored.jsonl", "--max_records=2") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("jaxrm: error: diverged, step 1 rewards a response of pairs.jsonl:")
    assert "with nan, which is no finite number" in message and "e.g. --checkpoint=RUN_DIR/checkpoints/best" in message
    assert everything_in(place) == before


def test_help_of_score_lists_what_is_required(capsys):
    """It leaves out the fields of the config."""
    assert run_score("--help") == 0
    out = capsys.readouterr().out
    assert "usage: python -m jaxrm.… [--config=configs/….py [--config.section.field=value …]] [flags]" in out
    assert out.count("required: ") == 2 and "--nocorrections" in out
    assert "--config.optimizer" not in out


# --- scoring from Python


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ([[5], [6]], [[7], []], r"^responses\[1\] has no token; it must have at least 1"),
        ([[5], []], [[7], [8]], r"^prompts\[1\] has no token"),
        ([[5], [6]], [[7], [8, 256]], r"^responses\[1\] has token id 256, but ids of the model go from 0 to 255; "),
        ([[5], [6]], [[7], [-1, 8]], r"^responses\[1\] has token id -1"),
        ([[300], [6]], [[7], [8]], r"^prompts\[0\] has token id 300"),
        ([[5], [6]], [[7]], "^there are 2 prompts and 1 responses"),
    ],
)
def test_responses_that_no_model_can_read_are_refused_at_once(prompts, responses, message):
    mesh = build_mesh(MeshConfig())
    prompts, responses = ([np.array(ids, np.int32) for ids in texts] for texts in (prompts, responses))
    with pytest.raises(UserError, match=message):
        response_batches(prompts, responses, 8, mesh, vocab_size=256)
