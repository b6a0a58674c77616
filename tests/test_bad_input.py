"""What the commands answer to mistakes: one line, exit status 2, no traceback, and nothing written.

The mistakes are made one at a time, in a command line that is otherwise good: the same one trains (`trained`).
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrm import export, generate, train
from jaxrm.config import command_line
from jaxrm.data.tasks import write_task
from jaxrm.models.build import ModelSource, abstract_decoder
from jaxrm.models.config import ModelConfig
from jaxrm.models.hub import export_model
from jaxrm.stage_config import SFT

ROOT = Path(__file__).resolve().parents[1]
TINY = ModelConfig(
    family="llama",
    vocab_size=512,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position=96,
    tie_embeddings=True,
)

CONFIG = '''"""A run of one step on the files beside this one."""

from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import EvaluationConfig
from jaxrm.stage_config import SFT
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.runtime.metrics import LoggingConfig


def get_config():
    return SFT(
        run_dir="run",
        num_steps=1,
        model=ModelSource(path="model"),
        data=DataConfig(path="records.jsonl", max_length=48, batch_size=8, packing=False, eval_share=0.2),
        checkpoint=CheckpointConfig(every=1),
        evaluation=EvaluationConfig(samples=1, sampling=SamplingConfig(max_new_tokens=4, temperature=0.0)),
        logging=LoggingConfig(progress=False, tensorboard=False),
    )
'''


def params_of(config):
    """Parameters of small random numbers, without compiling anything."""
    rng = np.random.default_rng(0)
    _, shapes, _ = abstract_decoder(config, ModelSource(preset="tiny"))
    return jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """A folder with a config file, records, a model and its tokenizer."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "config.py").write_text(CONFIG)
    write_task("safety", folder / "task", seed=0)
    lines = (folder / "task/train.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").write_text("".join(lines[:60]))
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "how do i wash lamp {i} ?"}}\n' for i in range(30)))
    (folder / "task/tokenizer").rename(folder / "tokenizer")
    shutil.rmtree(folder / "task")
    export_model(folder / "model", params_of(TINY), TINY, tokenizer=folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def trained(sources, tmp_path_factory):
    """A run folder: what the good command line leaves behind."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(sources, folder, dirs_exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        argv = ["train", "--config=config.py"]
        assert command_line.run(train.main, SFT, define_flags=train.define_flags, argv=argv) == 0
    finally:
        os.chdir(before)
    return folder / "run"


@pytest.fixture
def place(sources, tmp_path, monkeypatch):
    """The working directory: a copy of the sources."""
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def refuse(place, capsys):
    """Runs a mistaken command line: the one line that it is answered with, after `jaxrm: error: `."""

    def run(command, *arguments, **options):
        before = everything_in(place)
        capsys.readouterr()
        status = command_line.run(command.main, argv=["jaxrm", *arguments], **options)
        out, err = capsys.readouterr()
        assert (status, out) == (2, ""), (status, out, err)
        assert err.startswith("jaxrm: error: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert everything_in(place) == before
        return err.removeprefix("jaxrm: error: ").rstrip()

    return run


@pytest.fixture
def refuse_train(refuse):
    return lambda *arguments: refuse(
        train, "--config=config.py", *arguments, config_class=SFT, define_flags=train.define_flags
    )


@pytest.fixture
def refuse_generate(refuse):
    def run(*arguments):
        flags = {"define_flags": generate.define_flags, "flag_of_field": generate.FLAG_OF_FIELD}
        message = refuse(generate, *arguments, **flags)
        assert not re.search(r"\bconfig\.(?!json)", message), "generate has no --config"
        return message

    return run


@pytest.fixture
def refuse_export(refuse):
    def run(*arguments):
        flags = {"define_flags": export.define_flags, "flag_of_field": export.FLAG_OF_FIELD}
        return refuse(export, *arguments, **flags)

    return run


def write_records(name, rows):
    Path(name).write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


# --- fields of the config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.data.batchsize=8"], "is no field of the config; did you mean --config.data.batch_size?"),
        (
            ["--config.learning_rate=8"],
            "no field of the config; did you mean --config.optimizer.lr?",
        ),
        (["--config.optimizer.learning_rate=8"], "did you mean --config.optimizer.lr?"),
        (["--config.lr=8"], "config.lr is no field of the config; did you mean --config.optimizer.lr?"),
        (["--config.data.batch_size=many"], "config.data.batch_size is 'many'; required int; e.g. --config.data."),
        (["--config.optimizer.lr=high"], "config.optimizer.lr is 'high'; required float; e.g. --config.optimizer.lr="),
        (["--config.data.packing=perhaps"], "config.data.packing is 'perhaps'; required bool"),
        (["--config.algorithm=pro"], "config.algorithm is sft by the class of the config"),
        (["--config.on_existing=delete"], "config.on_existing is 'delete'; required 'resume' or 'restart' or 'error'"),
        (["--config.dpo.beta=3"], "config.dpo.beta is a field of dpo; this is a run of sft"),
        (
            ["--config.reward.kind=soft"],
            "config.reward.kind is a field of seq2seq_rm, scalar_rm, ppo, ",
        ),
        (["--config.evaluation.judge=x"], "config.evaluation.judge is a field of seq2seq_rm, scalar_rm, ppo, dpo, "),
        (["--config.num_steps=0"], "config.num_steps is 0; it must be at least 1"),
        (["--config.num_epochs=inf"], "config.num_epochs is inf; it must be above 0 and finite"),
        (["--config.num_microbatches=0"], "config.num_microbatches is 0"),
        (["--config.seed=-1"], "config.seed is -1; it must be at least 0"),
        (
            ["--config.seed=99999999999999999999"],
            "config.seed is 99999999999999999999; it must be at",
        ),
        (["--config.data.max_length=1"], "config.data.max_length is 1; it must be at least 2"),
        (["--config.data.batch_size=0"], "config.data.batch_size is 0; it must be at least 1"),
        (["--config.data.eval_share=1"], "config.data.eval_share is 1.0; it must be above 0 and below 1"),
        (["--config.data.max_bad_share=2"], "config.data.max_bad_share is 2.0"),
        (["--config.data.schema=sharegpt"], "config.data.schema is 'sharegpt'; it must be one of auto, preference"),
        (["--config.data.train_on=first"], "config.data.train_on is 'first'"),
        (["--config.model.dtype=float16"], "config.model.dtype is 'float16'; it must be one of float32, bfloat16"),
        (["--config.model.remat=some"], "config.model.remat is 'some'; it must be one of"),
        (["--config.model.attention=flash"], "config.model.attention is 'flash'; it must be one of auto, xla"),
        (["--config.model.attention=splash"], "config.model.attention is 'splash', which runs on TPU, but the devices"),
        (
            ["--config.model.attention=cudnn", "--config.model.dtype=bfloat16"],
            "config.model.attention is 'cudnn', which runs on GPU, but the devices are of platform cpu",
        ),
        (["--config.model.preset=tiny"], "config.model has both path 'model' and preset 'tiny'"),
        (["--config.optimizer.name=adam"], "config.optimizer.name is 'adam'; it must be one of adamw, adafactor"),
        (["--config.optimizer.schedule=step"], "config.optimizer.schedule is 'step'"),
        (["--config.optimizer.lr=-1"], "config.optimizer.lr is -1.0; it must be above 0"),
        (["--config.optimizer.lr=inf"], "config.optimizer.lr is inf; it must be above 0 and finite"),
        (["--config.optimizer.lr=nan"], "config.optimizer.lr is nan"),
        (
            ["--config.optimizer.warmup=1"],
            "config.optimizer.warmup is 1.0; it must be at least 0 and below 1, a share",
        ),
        (["--config.optimizer.b1=1"], "config.optimizer.b1 is 1.0; it must be at least 0 and below 1"),
        (["--config.optimizer.eps=0"], "config.optimizer.eps is 0.0; it must be above 0"),
        (["--config.optimizer.weight_decay=-1"], "config.optimizer.weight_decay is -1.0"),
        (["--config.optimizer.final_lr_share=2"], "config.optimizer.final_lr_share is 2.0"),
        (["--config.optimizer.clip_norm=0"], "config.optimizer.clip_norm is 0.0; it must be above 0, or None"),
        (["--config.checkpoint.every=0"], "config.checkpoint.every is 0; it must be at least 1"),
        (["--config.evaluation.every=0"], "config.evaluation.every is 0; it must be at least 1"),
        (["--config.evaluation.samples=-1"], "config.evaluation.samples is -1; it must be at least 0"),
        (["--config.logging.every=0"], "config.logging.every is 0"),
        (
            ["--config.evaluation.sampling.top_p=0"],
            "config.evaluation.sampling.top_p is 0.0; it must be above 0 and at most 1, "
            "e.g. --config.evaluation.sampling.top_p=1.0",
        ),
        (
            ["--config.evaluation.sampling.max_new_tokens=96"],
            "config.evaluation.sampling.max_new_tokens is 96, but the model reads 96 tokens, prompt and response "
            "together; e.g. --config.evaluation.sampling.max_new_tokens=24",
        ),
        (
            ["--config.data.max_length=97"],
            "config.data.max_length is 97, but the model reads at most 96 tokens; e.g. --config.data.max_length=96",
        ),
    ],
    ids=lambda value: value[0].removeprefix("--config.") if isinstance(value, list) else "",
)
def test_a_wrong_field_is_named(refuse_train, arguments, message):
    assert message in refuse_train(*arguments)


# --- devices


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.data.batch_size=30"], "is 30, but the data and fsdp axes of config.mesh have 8 devices; use a "
         "multiple of 8, e.g. --config.data.batch_size=32"),
        (["--config.num_microbatches=3"], "config.num_microbatches is 3, which does not divide the rows of "
         "a device (config.data.batch_size 8 over 8: 1); use --config.num_microbatches=1, or a multiple of 24, e.g. "
         "--config.data.batch_size=24"),
        (["--config.mesh.data=3"], "config.mesh is data 3 x fsdp 1 x tensor 1, which does not fit 8 devices"),
        (["--config.mesh.fsdp=16"], "config.mesh is data -1 x fsdp 16 x tensor 1, which does not fit 8 devices"),
        (["--config.mesh.fsdp=-1"], "config.mesh.data is -1; it must be a number of devices, since config.mesh.fsdp"),
        (["--config.mesh.tensor=0"], "config.mesh.tensor is 0; it must be a number of devices, or -1"),
        (["--config.mesh.tensor=8"], "config.mesh.tensor is 8, but axis 'heads' of attention has size 4; use a "
         "divisor of it, e.g. --config.mesh.tensor=4"),
    ],
)  # fmt: skip
def test_what_the_mesh_does_not_divide_is_refused(refuse_train, arguments, message):
    """The message shows a batch, or a model size, that it divides."""
    assert message in refuse_train(*arguments)


# --- records


def test_missing_data_is_named_by_its_field(refuse_train):
    message = refuse_train("--config.data.path=absent.jsonl")
    assert message.startswith("config.data.path is 'absent.jsonl', which is no file, folder or data set")
    message = refuse_train("--config.data.eval_path=absent.jsonl")
    assert message.startswith("config.data.eval_path is 'absent.jsonl', which is no file, folder or data set")
    assert "config.data.path is empty" in refuse_train("--config.data.path=")
    assert "did you mean task:safety?" in refuse_train("--config.data.path=task:saftey")
    Path("empty").mkdir()
    assert "no file that ends in .jsonl" in refuse_train("--config.data.path=empty")
    Path("empty/train.jsonl").touch()
    assert "no usable records (0 read)" in refuse_train("--config.data.path=empty")
    assert "there is no file of split 'test'" in refuse_train("--config.data.path=empty", "--config.data.split=test")


def test_a_data_set_that_the_hub_does_not_have_is_one_line(refuse_train):
    message = refuse_train("--config.data.path=nobody/nothing")
    assert message.startswith("config.data.path 'nobody/nothing' is no file or folder here, and as a data set")


def test_an_unknown_schema_names_the_fields_that_were_found(refuse_train):
    write_records("odd.jsonl", [{"question": "a", "answer": "b"}] * 20)
    message = refuse_train("--config.data.path=odd.jsonl")
    assert "config.data.path 'odd.jsonl' has no known schema: its fields are 'question', 'answer'" in message
    assert "required is one of" in message and "messages (messages)" in message


def test_prompts_alone_are_no_demonstrations(refuse_train):
    message = refuse_train("--config.data.path=prompts.jsonl")
    assert "whose records are prompts without a response" in message and "prompts.jsonl:" in message


def test_bad_records_past_the_share_are_counted(refuse_train):
    """The message shows the first record of the most frequent reason."""
    good = Path("records.jsonl").read_text().splitlines()
    bad = ["{", '{"messages": 3}', "{"]
    write_records("mixed.jsonl", [*good[:20], *bad, *good[20:40]])
    message = refuse_train("--config.data.path=mixed.jsonl")
    assert "mixed.jsonl: 3 of 43 records are unusable, more than config.data.max_bad_share 0.05" in message
    assert "invalid JSON (2, first at mixed.jsonl:21)" in message and "--config.data.max_bad_share=0.08" in message
    write_records("empty_text.jsonl", [{"prompt": "a", "chosen": " ", "rejected": "b"}] * 9)
    message = refuse_train("--config.data.path=empty_text.jsonl")
    assert "9 of 9 records are unusable and none is left; most often: 'chosen' is empty" in message
    write_records("no_field.jsonl", [{"prompt": "a", "rejected": "b"}] * 9)
    message = refuse_train("--config.data.path=no_field.jsonl", "--config.data.schema=preference")
    assert "missing field 'chosen' (9, first at no_field.jsonl:1)" in message


def test_examples_that_are_all_too_long_name_the_length(refuse_train):
    message = refuse_train("--config.data.max_length=4")
    assert "and none is left" in message and "response longer than config.data.max_length 4" in message
    message = refuse_train("--config.data.max_length=4", "--config.data.too_long=error")
    assert re.search(r"the response has \d+ tokens, but a row has 4; e\.g\. --config\.data\.max_length=\d+", message)


def test_a_batch_larger_than_the_data_is_refused(refuse_train):
    """The message shows one that fits data and mesh."""
    message = refuse_train("--config.data.batch_size=64")
    proposed = int(re.search(r"make only \d+ rows of 48 tokens; .*--config\.data\.batch_size=(\d+)", message)[1])
    assert proposed % 8 == 0 and proposed >= 40
    message = refuse_train("--config.data.max_records=6")
    assert "make only 6 rows" in message and "--config.data.batch_size" not in message


def test_an_empty_held_out_side_is_refused(refuse_train):
    message = refuse_train("--config.data.eval_share=1e-9")
    assert "has no usable held-out records (60 read)" in message and "--config.data.eval_share=0.2" in message


# --- model and tokenizer


def change_config_json(**changes):
    file = Path("model/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(change):
    """Rewrites the weights after `change` has been at the dict of tensors."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file("model/model.safetensors")
    change(tensors)
    save_file(tensors, "model/model.safetensors")


def test_a_model_that_is_not_there_is_named_by_its_field(refuse_train):
    message = refuse_train("--config.model.path=models/a/b")
    assert message.startswith("config.model.path is 'models/a/b', but there is no model at that place; give a folder")
    message = refuse_train("--config.model.path=nobody/nothing")
    assert message.startswith("config.model.path: nobody/nothing is neither a folder here nor a model")
    message = refuse_train("--config.model.path=records.jsonl")
    assert message.startswith("config.model.path is 'records.jsonl', which is a file")
    message = refuse_train("--config.model.path=None")
    assert message.startswith("config.model has neither path nor preset")
    message = refuse_train("--config.model.path=None", "--config.model.preset=gema-2b")
    assert message.startswith("config.model.preset is 'gema-2b', which is no preset; did you mean gemma-2b")


def test_a_model_folder_without_config_or_weights_names_the_lack(refuse_train):
    Path("model/model.safetensors").rename("weights")
    assert "holds no .safetensors files" in refuse_train()
    Path("weights").rename("model/pytorch_model.bin")
    assert "pytorch_model.bin, a pickle" in refuse_train()
    Path("model/config.json").unlink()
    assert "model has no config.json" in refuse_train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; jaxrm supports llama, "),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'; it must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be at least 1"),
        ({"num_hidden_layers": None}, "has no 'num_hidden_layers'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"num_hidden_layers": 2}, "lacks 9 tensors: model.layers.1.input_layernorm.weight"),
        ({"vocab_size": 600}, "model.embed_tokens.weight has shape [512, 16]; the model config asks for [600, 16]"),
        ({"tie_word_embeddings": False}, "lacks 1 tensor: lm_head.weight"),
    ],
)
def test_a_wrong_config_json_or_one_of_other_weights_is_named(refuse_train, changes, message):
    change_config_json(**changes)
    assert message in refuse_train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "lacks 1 tensor: model.norm.weight"),
        (
            lambda tensors: tensors.update({"model.vision.weight": np.zeros(3, np.float32)}),
            "holds 1 tensor: model.vision.weight, which the model config has no place for",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": np.zeros(3, np.float32)}),
            "model.norm.weight has shape [3]; the model config asks for [16]",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": np.zeros(16, np.int8)}),
            "model.norm.weight is stored as I8; jaxrm reads F64, F32, F16, BF16",
        ),
    ],
    ids=["missing", "extra", "misshapen", "quantised"],
)
def test_tensors_that_do_not_fit_are_named_before_any_run_folder(
    refuse_train, refuse_generate, refuse_export, change, message
):
    change_tensors(change)
    assert message in refuse_train()
    assert message in refuse_generate("--weights=model", "--prompt=hello")
    assert message in refuse_export("--weights=model", "--output=exported")


def test_truncated_weights_are_refused_before_any_run_folder(refuse_train):
    file = Path("model/model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    assert "is cut short" in refuse_train()
    Path("broken.gguf").write_bytes(b"GGUF")
    assert "broken.gguf is not a GGUF file, or is cut short" in refuse_train("--config.model.path=broken.gguf")


def test_a_model_without_tokenizer_asks_for_one(refuse_train, refuse_generate):
    for file in Path("model").glob("tokenizer*"):
        file.unlink()
    message = refuse_train()
    assert "model has no tokenizer file; required is one of tokenizer.json, tokenizer.model" in message
    assert message.endswith("e.g. --config.data.tokenizer=folder/model.gguf")
    message = refuse_train("--config.model.path=None", "--config.model.preset=tiny", "--config.data.max_length=96")
    assert message.startswith("config.data.tokenizer is None and there are no weights to find it beside")
    assert "tokenizer 'a/b/c' is neither" in refuse_train("--config.data.tokenizer=a/b/c")
    assert refuse_generate("--weights=model", "--prompt=x").endswith("e.g. --tokenizer=folder/model.gguf")


def test_a_damaged_tokenizer_is_one_line(refuse_train):
    Path("model/tokenizer.json").write_text("{")
    assert refuse_train().startswith("tokenizer 'model' could not be loaded: ")


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(refuse_train):
    small = ModelConfig(**{**TINY.__dict__, "vocab_size": 64})
    export_model("small", params_of(small), small, tokenizer="tokenizer")
    message = refuse_train("--config.model.path=small")
    expected = r"the tokenizer small has '.+' with id 64, but the model's vocabulary holds 64 tokens; use the tokenizer"
    assert re.match(expected, message)


def test_a_missing_template_or_one_that_does_not_fit_is_refused(refuse_train, refuse_generate):
    message = refuse_train("--config.data.template=vicuna")
    assert message.startswith("config.data.template is 'vicuna'; use auto or one of chatml, ")
    assert "no token '<start_of_turn>'" in refuse_train("--config.data.template=gemma")
    message = refuse_generate("--weights=model", "--prompt=x", "--template=vicuna")
    assert message.startswith("--template is 'vicuna'; use auto or one of chatml, ")


# --- run folders


def test_a_run_of_another_config_is_refused_before_reading_data(refuse_train, trained, place):
    shutil.copytree(trained, place / "run")
    message = refuse_train("--config.optimizer.lr=0.5", "--config.data.path=absent.jsonl")
    assert message.startswith("config.run_dir is 'run', which holds a run of another config: config.")
    assert "config.optimizer.lr was 2e-05 and is 0.5" in message and "--config.on_existing=restart" in message
    assert refuse_train("--config.on_existing=error").startswith("run holds a run started ")


def test_a_folder_that_is_no_run_is_left_alone(refuse_train):
    Path("thesis").mkdir()
    Path("thesis/chapter.tex").write_text("once")
    message = refuse_train("--config.run_dir=thesis")
    assert message.startswith("config.run_dir is 'thesis', which is no run but holds 'chapter.tex'")
    message = refuse_train("--config.run_dir=thesis", "--config.on_existing=restart")
    assert "which is no run but holds 'chapter.tex'" in message
    Path("thesis/run.json").write_text("{")
    assert "run.json cannot be read" in refuse_train("--config.run_dir=thesis")


def test_a_run_folder_that_cannot_be_written_is_refused(refuse_train, monkeypatch):
    assert "config.run_dir is empty" in refuse_train("--config.run_dir=")
    assert "a URL; required a folder" in refuse_train("--config.run_dir=gs://bucket/run")
    assert "which is a file" in refuse_train("--config.run_dir=records.jsonl")
    message = refuse_train("--config.run_dir=records.jsonl/run")
    assert "'records.jsonl/run', which cannot be written (" in message and "records.jsonl is a file" in message
    Path("locked").mkdir()
    permitted = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and permitted(path, mode))
    message = refuse_train("--config.run_dir=locked/run")
    assert "which cannot be written (no permission to write in " in message


# --- generate and export


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --prompt=TEXT, --input=FILE and --interactive"),
        (["--prompt=a", "--interactive", "--weights=model"], "give one of --prompt=TEXT"),
        (["--prompt=a"], "give one of --checkpoint=RUN_DIR and --weights=MODEL"),
        (["--prompt=a", "--weights=model", "--checkpoint=run"], "give one of --checkpoint=RUN_DIR and --weights"),
        (["--prompt= ", "--weights=model"], "--prompt is empty; required some text"),
        (["--prompt=a", "--weights=model", "--output=a.jsonl"], "--output goes with --input=FILE"),
        (["--prompt=a", "--checkpoint=run", "--tokenizer=x"], "--tokenizer and --template go with --weights"),
        (["--prompt=a", "--checkpoint=run", "--template=hh"], "--tokenizer and --template go with --weights"),
        (["--prompt=a", "--weights=model", "--dtype=int8"], "--dtype is 'int8'; use one of float32, bfloat16"),
        (["--prompt=a", "--weights=model", "--top_p=1.5"], "--top_p is 1.5; it must be above 0 and at most 1, e.g. "
         "--top_p=1.0"),
        (["--prompt=a", "--weights=model", "--temperature=-1"], "--temperature is -1.0; it must be at least 0"),
        (["--prompt=a", "--weights=model", "--top_k=-1"], "--top_k is -1; it must be at least 0"),
        (["--prompt=a", "--weights=model", "--max_new_tokens=0"], "--max_new_tokens is 0; it must be at least 1"),
        (["--prompt=a", "--weights=model", "--max_new_tokens=few"], "--max_new_tokens is 'few'; required an integer"),
        (["--prompt=a", "--weights=model", "--seed=-1"], "--seed is '-1'"),
        (["--input=prompts.jsonl", "--weights=model", "--batch_size=0"], "--batch_size is '0'; required a positive"),
        (["--prompt=a", "--weights=nobody/nothing"], "--weights: nobody/nothing is neither"),
        (["--prompt=a", "--weights=a/b/c"], "--weights is 'a/b/c', but there is no model at that place"),
        (["--prompt=a", "--weights=model", "--max_new_tokens=96"], "max_new_tokens is 96, but the model reads 96"),
        (["--prompt=" + "lamp " * 100, "--weights=model", "--max_new_tokens=8"], "but the model reads 96 in all and 8"),
        (["--input=absent.jsonl", "--weights=model"], "--input is 'absent.jsonl', which is no file, folder or data"),
        (["--input=prompts.jsonl", "--weights=model", "--output=model"], "--output is 'model', which is a folder"),
        (["--input=prompts.jsonl", "--weights=model", "--output=no/a.jsonl"], "--output is 'no/a.jsonl', which cannot"),
    ],
)  # fmt: skip
def test_generate_refuses(refuse_generate, arguments, message):
    assert message in refuse_generate(*arguments)


def test_generate_refuses_a_bad_prompt_before_answering_any(refuse_generate):
    good = [{"prompt": "how do i wash a lamp ?"}] * 20
    write_records("bad.jsonl", [*good, {"prompt": " "}])
    message = refuse_generate("--weights=model", "--input=bad.jsonl", "--output=out.jsonl")
    assert "where 1 of 21 records are no prompts: 'prompt' is empty (first at bad.jsonl:21)" in message
    write_records("long.jsonl", [*good, {"prompt": "lamp " * 100}])
    arguments = ["--weights=model", "--input=long.jsonl", "--output=out.jsonl", "--max_new_tokens=4"]
    assert refuse_generate(*arguments, "--batch_size=2").startswith("prompt 21 has ")


def test_a_checkpoint_that_is_not_there_is_refused(refuse_generate, refuse_export, trained, place):
    shutil.copytree(trained, place / "run")
    for refuse, rest in ((refuse_generate, ("--prompt=a",)), (refuse_export, ("--output=exported",))):
        message = refuse("--checkpoint=absent", *rest)
        assert message.startswith("--checkpoint is 'absent', but absent has no run.json; give the folder of a run")
        message = refuse("--checkpoint=model", *rest)  # weights where a run is asked for
        assert "but model has no run.json" in message and "e.g. --checkpoint=" in message
        message = refuse("--checkpoint=run/checkpoints/7", *rest)
        assert message.startswith(
            "--checkpoint is 'run/checkpoints/7', but the checkpoints of that run are 1, and best"
        )
    shutil.copy("run/model.json", "model.json")
    Path("run/model.json").write_text("{")
    assert "whose model.json is damaged" in refuse_generate("--checkpoint=run", "--prompt=a")
    Path("model.json").rename("run/model.json")
    Path("run/checkpoints").rename("elsewhere")
    assert "which has no checkpoint yet" in refuse_generate("--checkpoint=run", "--prompt=a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights=model"], "--output is missing; give the folder to make"),
        (["--output=x"], "give one of --checkpoint=RUN_DIR and --weights=MODEL"),
        (["--output=x", "--weights=model", "--checkpoint=run"], "give one of --checkpoint=RUN_DIR and --weights"),
        (["--output=x", "--checkpoint=run", "--tokenizer=model"], "--tokenizer goes with --weights"),
        (["--output=x", "--weights=model", "--dtype=int8"], "--dtype is 'int8'; use one of float32, bfloat16, float16"),
        (["--output=x", "--weights=model", "--max_shard_mb=0"], "--max_shard_mb is '0'; required a positive integer"),
        (["--output=tokenizer", "--weights=absent"], "is not empty; name another, or replace it with --overwrite"),
        (["--output=tokenizer", "--weights=absent", "--overwrite"], "holds something that is not a model"),
        (["--output=records.jsonl", "--weights=absent"], "records.jsonl is a file; name a folder"),
        (["--output=records.jsonl/x", "--weights=absent"], "records.jsonl is a file; name a folder"),
        (["--output=x", "--weights=a/b/c"], "--weights is 'a/b/c', but there is no model at that place"),
    ],
)
def test_export_refuses(refuse_export, arguments, message):
    assert message in refuse_export(*arguments)


def test_export_works_on_devices_that_do_not_divide_the_model(place):
    narrow = ModelConfig(**{**TINY.__dict__, "hidden_size": 12})  # of which 8 is no divisor
    export_model("narrow", params_of(narrow), narrow, tokenizer="tokenizer")
    argv = ["export", "--weights=narrow", "--output=exported"]
    assert command_line.run(export.main, define_flags=export.define_flags, argv=argv) == 0
    assert Path("exported/model.safetensors").read_bytes() == Path("narrow/model.safetensors").read_bytes()


# --- as a process


@pytest.mark.slow
def test_a_process_answers_with_status_2_and_one_line(place):
    """What in-process runs cannot see: output of native libraries, and what is said at exit."""
    change_tensors(lambda tensors: tensors.pop("model.norm.weight"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    before = everything_in(place)
    done = subprocess.run(
        [sys.executable, "-m", "jaxrm.train", "--config=config.py"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"jaxrm: error: model lacks 1 tensor: model\.norm\.weight; .*\n", done.stderr), done.stderr
    assert everything_in(place) == before


def test_the_good_command_line_trains(trained):
    assert {"run.json", "metrics.jsonl", "model.json", "checkpoints"} <= {path.name for path in trained.iterdir()}
