"""PEFT folders as models: exported from runs, loaded on their base, merged, and as the start of a stage."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from absl import flags
from support.adapters import change_config
from support.stage_configs import stage_config

import jaxrm
from jaxrm import export, generate, score
from jaxrm.data.config import DataConfig
from jaxrm.data.records import Message
from jaxrm.data.templates import encode_prompt
from jaxrm.errors import UserError, naming
from jaxrm.inference import parameters
from jaxrm.inference.load import load_policy, load_reward_model
from jaxrm.inference.sharded_model import shard_model
from jaxrm.models import lora as low_rank
from jaxrm.models.build import ModelSource
from jaxrm.models.hub import read_model_config
from jaxrm.models.lora import LoRAConfig
from jaxrm.sharding.mesh import MeshConfig, build_mesh

LORA = LoRAConfig(3, alpha=6.0, targets=("v_proj", "q_proj", "down_proj"))
PROMPT = "how do i wash the lamp ?"


def run_command(command, *arguments):
    values = flags.FlagValues()
    command.define_flags(values)
    values([command.__name__, *arguments])
    with naming(command.FLAG_OF_FIELD):
        assert command.main(None, values) == 0


@pytest.fixture(scope="module")
def folders(make_run, tmp_path_factory):
    """A base, and two runs with adapters on it, each with its PEFT folder: of a policy and of a scalar reward model."""
    root = tmp_path_factory.mktemp("peft")
    make_run(root / "whole")
    run_command(export, f"--checkpoint={root / 'whole'}", f"--output={root / 'base'}")
    for algorithm in ("sft", "scalar_rm"):
        run = root / algorithm
        make_run(run, algorithm, base=root / "base", lora=LORA, template="hh")
        run_command(export, f"--checkpoint={run}", f"--output={root / 'peft' / algorithm}")
    return root


def assert_close(one, other, tolerance=0.0):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.abs(np.asarray(mine, np.float32) - np.asarray(theirs, np.float32)).max() <= tolerance


def refusal(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_exported_adapter_is_the_runs_on_its_base(folders):
    """Bit by bit, with the chat template of its training."""
    run = load_policy(str(folders / "sft"))
    policy = load_policy(str(folders / "base"), adapter=str(folders / "peft/sft"))
    assert (policy.model.lora.rank, policy.model.lora.scale) == (LORA.rank, LORA.scale)
    assert_close(policy.params, run.params)
    dialogue = [Message("user", "hello"), Message("assistant", "good"), Message("user", "why 12?")]
    written = encode_prompt(policy.tokenizer, dialogue, policy.template)
    assert written == encode_prompt(run.tokenizer, dialogue, run.template)
    assert written != encode_prompt(run.tokenizer, dialogue, "auto")


def test_an_exported_scalar_adapter_scores_as_its_run(folders):
    run = load_reward_model(str(folders / "scalar_rm"))
    model = load_reward_model(str(folders / "base"), adapter=str(folders / "peft/scalar_rm"))
    assert not model.is_seq2seq
    assert_close(model.params, run.params)
    scores = [one.score([PROMPT], ["with water"]).sum[0] for one in (run, model)]
    assert scores[0] == scores[1] != 0


@pytest.mark.parametrize("algorithm", ["sft", "scalar_rm"])
@pytest.mark.parametrize("source", ["run", "peft"])
def test_merged_weights_are_base_and_adapter(folders, tmp_path, algorithm, source):
    if source == "run":
        arguments = [f"--checkpoint={folders / algorithm}"]
    else:
        arguments = [f"--weights={folders / 'base'}", f"--adapter={folders / 'peft' / algorithm}"]
    run_command(export, *arguments, "--merge", f"--output={tmp_path / 'merged'}")
    run = (load_reward_model if algorithm == "scalar_rm" else load_policy)(str(folders / algorithm))
    expected = low_rank.merge(run.params, LORA)
    if algorithm == "sft":
        assert_close(load_policy(str(tmp_path / "merged")).params, expected, 1e-5)
        return
    from safetensors.numpy import load_file

    tensors = load_file(tmp_path / "merged/model.safetensors")
    assert np.array_equal(tensors["score.weight"][0], expected["scalar_head"]["kernel"])
    down = tensors["model.layers.1.mlp.down_proj.weight"].T
    assert np.abs(down - np.asarray(expected["decoder"]["layers"]["mlp"]["down"]["kernel"][1])).max() < 1e-5


def test_generate_answers_with_an_adapter_as_its_run_does(folders, capsys):
    answer = [f"--prompt={PROMPT}", "--temperature=0", "--max_new_tokens=8"]
    run_command(generate, f"--checkpoint={folders / 'sft'}", *answer)
    expected = capsys.readouterr().out
    for adapter in ("sft", "peft/sft"):
        run_command(generate, f"--weights={folders / 'base'}", f"--adapter={folders / adapter}", *answer)
        assert capsys.readouterr().out == expected


def test_score_reads_an_adapter_as_its_run(folders, tmp_path):
    """From a PEFT folder, which says nothing of held-out records, and from the run on a base that is named."""
    pair = {"prompt": PROMPT, "chosen": "with water", "rejected": "no"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    records = f"--input={tmp_path / 'pairs.jsonl'}"
    run_command(score, f"--checkpoint={folders / 'scalar_rm'}", records, f"--output={tmp_path / 'expected'}")
    for adapter in ("scalar_rm", "peft/scalar_rm"):
        arguments = [f"--weights={folders / 'base'}", f"--adapter={folders / adapter}", records]
        run_command(score, *arguments, f"--output={tmp_path / 'scored'}")
        assert (tmp_path / "scored").read_text() == (tmp_path / "expected").read_text()
    out = [f"--output={tmp_path / 'scored'}", "--held_out"]
    assert "--held_out goes with a run" in refusal(lambda: run_command(score, *arguments, *out))


def test_a_stage_trains_an_adapter_on_or_merges_it(folders):
    """Its adapters where it trains such ones, else whole weights; the base is not rounded before it is merged."""
    source = ModelSource(path=str(folders / "base"), adapter=str(folders / "peft/sft"), dtype="bfloat16")
    mesh, config = build_mesh(MeshConfig()), read_model_config(str(folders / "base"))
    run = load_policy(str(folders / "sft"))
    ordered = dataclasses.replace(LORA, targets=("q_proj", "v_proj", "down_proj"))
    joined = parameters.init_params(shard_model(source, mesh, config, lora=ordered), jax.random.key(1), 0)
    assert_close(low_rank.split(joined)[0], low_rank.split(run.params)[0])
    whole = parameters.init_params(shard_model(source, mesh, config), jax.random.key(1), 0)
    assert_close(whole, low_rank.merge(run.params, LORA), 1e-5)


def test_a_stage_refuses_adapters_other_than_it_trains(folders):
    source = ModelSource(path=str(folders / "base"), adapter=str(folders / "peft/sft"))
    parameters.check_adapters(source, dataclasses.replace(LORA, targets=LORA.targets[::-1]))
    parameters.check_adapters(source, LoRAConfig())
    with pytest.raises(UserError, match=r"^config.lora is LoRA of rank 4, .* has LoRA of rank 3, .* --merge "):
        parameters.check_adapters(source, dataclasses.replace(LORA, rank=4))


def test_an_adapter_stands_on_a_run_too(folders, tmp_path, capsys):
    """The tokenizer and template are then the adapter's, or without one the run's; another name of the base is said."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(folders / "peft/sft" / name, bare / name)
    policy = load_policy(str(folders / "whole"), adapter=str(bare))
    assert policy.template == load_policy(str(folders / "whole")).template
    assert_close(policy.params, load_policy(str(folders / "sft")).params)
    assert f"{bare} says that its base is {folders / 'base'}; here it stands on " in capsys.readouterr().out


def test_what_does_not_go_together_is_one_line(folders, tmp_path):
    base, peft, whole, run = (str(folders / name) for name in ("base", "peft/sft", "whole", "sft"))
    out = f"--output={tmp_path / 'out'}"

    def line(*arguments):
        return refusal(lambda: run_command(export, *arguments, out))

    assert line(f"--checkpoint={whole}", "--merge").startswith(f"--merge adds adapters to their weights, and {whole}")
    assert line(f"--weights={base}", "--merge").startswith("--merge adds adapters to their weights")
    assert "a PEFT folder already; write the whole model with --merge" in line(f"--weights={base}", f"--adapter={peft}")
    assert "--adapter goes with --weights, not with --checkpoint" in line(f"--checkpoint={run}", f"--adapter={peft}")
    assert f"an adapter; give the weights that it stands on as well, --weights={base} --adapter={peft}" in line(
        f"--weights={peft}"
    )
    assert "a run whose weights were all trained" in line(f"--weights={base}", f"--adapter={whole}", "--merge")
    assert "a run whose weights were all trained" in refusal(lambda: load_policy(base, adapter=whole))
    scalar = str(folders / "peft/scalar_rm")
    assert "of a scalar reward model (SEQ_CLS)" in refusal(lambda: load_policy(base, adapter=scalar))
    assert "which has adapters already; merge those first" in refusal(lambda: load_policy(run, adapter=peft))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("algorithm", ["sft", "seq2seq_rm", "scalar_rm", "dpo"])
def test_a_dry_run_reads_the_headers_of_an_adapter(folders, tmp_path, algorithm):
    """It takes the tokenizer beside it, and refuses what the adapter needs, or other adapters than are trained."""
    shutil.copytree(folders / "peft/sft", tmp_path / "adapter")
    source = ModelSource(path=str(folders / "base"), adapter=str(tmp_path / "adapter"))
    pairs = [{"prompt": f"lamp {i}", "chosen": f"with water {i}", "rejected": f"no {i}"} for i in range(200)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data = DataConfig(path=str(tmp_path / "pairs.jsonl"), max_length=96, batch_size=8)

    def check(lora):
        config = stage_config(algorithm, run_dir=str(tmp_path / "run"), model=source, data=data, lora=lora)
        assert not jaxrm.check(config).errors

    check(LORA)
    check(LoRAConfig())
    assert "has LoRA of rank 3" in refusal(lambda: check(LoRAConfig(8)))
    change_config(tmp_path / "adapter", use_dora=True)
    assert "jaxrm does not do DoRA" in refusal(lambda: check(LORA))


def test_adapters_of_a_base_by_chance_are_written_merged_alone(make_run, tmp_path):
    make_run(tmp_path / "run", lora=LORA)
    drawn = {"path": None, "preset": "tiny", "seed": 0, "sha256": "0" * 64}
    (tmp_path / "run/base.json").write_text(json.dumps(drawn))
    message = refusal(lambda: run_command(export, f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"))
    assert "weights drawn by chance, which no one else has; write the whole model, --merge" in message
