"""Classifiers of the hub as sources of PPO's rewards: another tokenizer than the policy's, alone and in a sum."""

import json
import re

import jax
import numpy as np
import pytest
from support.classifiers import classifier_tokenizer, write_classifier

import jaxrm
from jaxrm import export
from jaxrm.algorithms.ppo_config import RolloutConfig
from jaxrm.algorithms.reward_config import ClassifierConfig, RewardConfig
from jaxrm.config import command_line
from jaxrm.data.config import DataConfig
from jaxrm.dry_run.run import check
from jaxrm.errors import UserError
from jaxrm.evaluation.config import JudgedEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.planning.programs import stage_programs
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import PPO
from jaxrm.stages.ppo import run as ppo
from jaxrm.stages.rewards import scored, sources
from jaxrm.stages.rewards.classifier import names_classifier

BFLOAT16 = ClassifierConfig(dtype="bfloat16")
SAMPLING = SamplingConfig(max_new_tokens=6)


@pytest.fixture(scope="module")
def place(make_run, tmp_path_factory):
    """A folder with the run of a policy, and classifiers."""
    folder = tmp_path_factory.mktemp("rewards")
    make_run(folder / "sft")
    write_classifier(folder / "rm", "qwen2", max_position_embeddings=512, tokenizer_fields={"model_max_length": 512})
    return folder


@pytest.fixture
def config(place, monkeypatch):
    """A short run of PPO; the rewards are still to be given."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(ppo, "build_mesh", lambda config: build_mesh(config, jax.devices()[:1]))  # compiles sooner

    data = DataConfig(path="task:safety", max_length=64, batch_size=4, max_eval_records=4)

    def make(run_dir="new", **fields):
        return PPO(
            run_dir=str(run_dir),
            num_steps=fields.pop("num_steps", 2),
            model=ModelSource(path="sft"),
            rollout=RolloutConfig(sampling=SAMPLING),
            evaluation=JudgedEvaluationConfig(every=2, samples=4, judge="task:safety", sampling=SAMPLING),
            logging=LoggingConfig(every=1, tensorboard=False, progress=False),
            **{"data": data, "mesh": MeshConfig(1, 1, 1)} | fields,
        )

    return make


def rewards(**fields):
    return RewardConfig(**{"kind": "scalar", "model": "rm", "calibration_responses": 8, "scale": 1.0} | fields)


def rows_of(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.slow
def test_ppo_learns_from_a_classifier(config, tmp_path, capsys):
    """Samples have the score that `load_reward_model` gives to their text; the critic starts from the policy."""
    assert ppo.run(config(tmp_path / "ppo", reward=rewards())) == 0
    printed = capsys.readouterr().out
    assert "rewards: scalar from the classifier rm" in printed
    assert "critic from the policy" in printed
    steps = [row for row in rows_of(tmp_path / "ppo") if "policy_loss" in row]
    assert len(steps) == 2 and all(
        np.isfinite(row["reward"]) and row["texts_cut"] == row["texts_changed"] == 0 for row in steps
    )
    samples = rows_of(tmp_path / "ppo", "samples.jsonl")
    scores = jaxrm.load_reward_model("rm").score(
        [sample["prompt"] for sample in samples], [sample["response"] for sample in samples]
    )
    np.testing.assert_allclose([sample["reward"] for sample in samples], scores.sum, atol=1e-4)


@pytest.mark.slow
def test_a_classifier_adds_up_with_a_rule(config, tmp_path):
    """Two classifiers of unlike tokenizers and a rule; what each gives is logged."""
    write_classifier(tmp_path / "other", "gemma")
    named = {
        "one": rewards(),
        "other": rewards(model=str(tmp_path / "other"), classifier=ClassifierConfig(max_length=16), weight=0.5),
        "rule": RewardConfig(kind="scalar", function="task:safety", calibration_responses=8),
    }
    assert ppo.run(config(tmp_path / "ppo", rewards=named, num_steps=1)) == 0
    row = next(row for row in rows_of(tmp_path / "ppo") if "policy_loss" in row)
    assert all(np.isfinite(row[f"reward/{name}"]) for name in named)
    assert (row["texts_cut/one"], row["texts_cut/other"]) == (0, 1) and "texts_cut/rule" not in row


def test_a_classifier_is_not_exported_again(place, tmp_path, capsys):
    argv = ["x", f"--weights={place / 'rm'}", f"--output={tmp_path / 'again'}"]
    assert command_line.run(export.main, define_flags=export.define_flags, argv=argv) == 2
    error = capsys.readouterr().err
    assert "a sequence classifier, which is what an export makes" in error and error.count("\n") == 1


def test_two_sources_of_a_classifier_share_its_weights(config):
    """Also where they cut texts at unlike lengths; not in another dtype."""
    sections = [rewards(), rewards(classifier=ClassifierConfig(max_length=9)), rewards(classifier=BFLOAT16)]
    mesh = build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    responses = scored.Responses(config(), mesh, None, [], None, (0,), {}, {})
    opened = [sources.origin_of(section).open(section, responses).scorer for section in sections]
    assert opened[0].weights is opened[1].weights and opened[0].weights is not opened[2].weights
    assert [classifier.max_length for classifier in opened] == [512, 9, 512]


def test_a_dry_run_counts_the_weights_of_a_classifier(config):
    data = DataConfig(path="task:safety", max_length=64, batch_size=8, max_eval_records=8)
    result = check(config(reward=rewards(), data=data, mesh=MeshConfig()))
    assert not result.errors
    (stage,) = result.stages.values()
    facts = stage.inspection.facts
    assert facts["rewards"] == "scalar from the classifier rm"
    assert facts["critic"] == "the policy"
    assert re.search(r"reward model \d", facts["memory"])


def test_a_plan_has_the_shapes_of_a_classifier(config):
    mesh = build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    for options, dtype in ((BFLOAT16, "bfloat16"), (ClassifierConfig(), "float32")):
        planned = stage_programs(config(reward=rewards(classifier=options)), mesh)
        decoder = planned.residents["reward model"]["decoder"]
        assert decoder["embedder"]["embedding"].shape == (352, 16)
        assert decoder["embedder"]["embedding"].dtype == dtype
        assert decoder["final_norm"]["scale"].dtype == "float32"
        assert "scoring" in [program.name for program in planned.programs]


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ({"kind": "literal"}, "config.reward.kind is 'literal', but rm is a classifier"),
        (
            {"kind": "value_difference"},
            "its kinds are scalar, scalar_length_residual, e.g. --config.reward.kind=scalar",
        ),
        ({"classifier": ClassifierConfig(max_length=5000)}, "config.reward.classifier.max_length is 5000"),
        ({"classifier": ClassifierConfig(template="x")}, "config.reward.classifier.template is 'x'"),
        ({"model": "nowhere"}, "config.reward.model is 'nowhere', but nowhere has no run.json"),
        ({"model": "runs/rm"}, "config.reward.model is 'runs/rm', but runs/rm has no run.json"),
        ({"model": "sft"}, "config.reward.model is 'sft', a run of sft"),
        ({"model": "two"}, "two/config.json says that the classifier has 2 labels"),
        ({"model": "headless"}, "lacks score.weight, the head of LlamaForSequenceClassification"),
        ({"model": "silent"}, "config.reward.classifier.template is 'auto', but the tokenizer has no chat template"),
        (
            {"model": None, "function": "task:safety", "classifier": ClassifierConfig(max_length=5)},
            "config.reward.classifier.max_length is 5, but config.reward has no classifier of the hub",
        ),
    ],
)
def test_a_classifier_that_does_not_fit_is_refused(reward, words, config, place):
    """In one line that has the name of the source, where it has one."""
    model = reward.get("model")
    if model in ("two", "headless", "silent") and not (place / model).exists():
        fields = {"two": {"num_labels": 2}, "headless": {"extra": {"score.weight": None}}}
        write_classifier(place / model, **fields.get(model, {"tokenizer": without_template()}))
    message = refusal(check_sources, config(reward=rewards(**reward)))
    assert words in message
    named = {"helpful": rewards(**reward), "rule": RewardConfig(kind="scalar", function="task:safety")}
    assert refusal(check_sources, config(rewards=named)) == message.replace("config.reward", "config.rewards.helpful")


def check_sources(config):
    """What a stage checks of its sources before weights are read."""
    sources.check_origins(config)
    sources.check_rewards(config, build_mesh(config.mesh, jax.devices()[:1]), None, [])


def without_template():
    tokenizer = classifier_tokenizer("llama")
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("rm", True),
        ("sft", False),
        ("nowhere", False),
        ("org/name", True),
        ("runs/name", False),
        ("rm/nothing", False),
        ("a/b/c", False),
    ],
)
def test_published_weights_are_told_from_runs(path, expected, place, monkeypatch):
    monkeypatch.chdir(place)
    assert names_classifier(path) == expected
