"""What the evaluation of a policy refuses; tests/test_study.py runs it."""

import dataclasses
import json

import jax
import pytest

from jaxrm.algorithms.ppo_config import RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.errors import UserError
from jaxrm.evaluation.config import EvaluateConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import Evaluate
from jaxrm.stages.evaluate import run as evaluate
from jaxrm.stages.evaluate.generation import AnswerGenerator
from jaxrm.stages.stage import task_files


@pytest.fixture
def config(tmp_path):
    return Evaluate(
        run_dir=str(tmp_path / "run"),
        model=ModelSource(path=str(tmp_path / "nothing")),
        data=DataConfig(path="task:safety", max_length=60, batch_size=8),
        rollout=RolloutConfig(sampling=SamplingConfig(max_new_tokens=28)),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": ModelSource()}, ("config.model.path is None", "--config.model.path=runs/quickstart/sft")),
        ({"evaluate": EvaluateConfig(splits=("tset",))}, ("config.evaluate.splits has 'tset'", "test_ood")),
        ({"evaluate": EvaluateConfig(best_of=4)}, ("config.evaluate.best_of is 4", "--config.reward.model=")),
        (
            {"rollout": RolloutConfig(responses_per_prompt=4)},
            ("config.rollout.responses_per_prompt is 4", "--config.evaluate.best_of=4"),
        ),
        (
            {"evaluate": EvaluateConfig(evaluate_checkpoints=True)},
            ("evaluate_checkpoints is True", "--config.evaluate.reference="),
        ),
        (
            {"evaluate": EvaluateConfig(evaluate_checkpoints=True, reference="sft")},
            ("evaluate_checkpoints is True", "is no run"),
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_writing(config, tmp_path, changes, words):
    with pytest.raises(UserError) as error:
        evaluate.run(dataclasses.replace(config, **changes))
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [("splits", (), "at least one"), ("decodings", ("beam",), "sampled, greedy"), ("best_of", 0, "at least 1")],
)
def test_answers_are_checked_by_field(field, value, word):
    with pytest.raises(UserError, match=f"EvaluateConfig.{field}") as error:
        EvaluateConfig(**{field: value})
    assert word in str(error.value)


def test_a_split_that_a_task_has_not_is_named(config):

    data = dataclasses.replace(config.data, eval_split="validation")
    has = r"config.data.eval_split is 'validation'; task:safety has train, heldout"
    with pytest.raises(UserError, match=has), task_files(data, 0, records="prompts"):
        pass


@pytest.mark.slow
def test_a_stopped_evaluation_asks_only_for_what_is_left(config, make_run, tmp_path, monkeypatch):
    make_run(tmp_path / "sft")
    config = dataclasses.replace(
        config,
        model=ModelSource(path=str(tmp_path / "sft")),
        data=dataclasses.replace(config.data, max_eval_records=8),
        mesh=MeshConfig(1, 1, 1),
        logging=LoggingConfig(progress=False),
    )
    monkeypatch.setattr(evaluate, "build_mesh", lambda given: build_mesh(given, jax.devices()[:1]))
    asked, rows = [], AnswerGenerator.rows

    def stopped_after(number):
        def answer(self, params, split, examples, decoding):
            if len(asked) == number:
                raise KeyboardInterrupt
            asked.append(decoding)
            return rows(self, params, split, examples, decoding)

        monkeypatch.setattr(AnswerGenerator, "rows", answer)

    stopped_after(None)
    assert evaluate.run(config) == 0
    assert asked == ["sampled", "greedy"]
    unbroken, stopped = tmp_path / "run", tmp_path / "stopped"
    asked.clear()
    stopped_after(1)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(dataclasses.replace(config, run_dir=str(stopped)))
    assert not (stopped / "answers.jsonl").exists()
    stopped_after(None)
    assert evaluate.run(dataclasses.replace(config, run_dir=str(stopped))) == 0
    assert asked == ["sampled", "greedy"]
    for name in ("answers.jsonl", "evaluation.json"):
        assert (stopped / name).read_text() == (unbroken / name).read_text()
    assert not (unbroken / "parts").exists() and not (stopped / "parts").exists()


def test_answers_of_an_edited_function_are_not_taken_on(config, make_run, tmp_path, monkeypatch):
    """Answers of versions that wrote down no function are."""
    make_run(tmp_path / "sft")
    name = f"edited_{tmp_path.name.replace('-', '_')}"
    file, body = tmp_path / f"{name}.py", "def f(prompts, responses):\n    return [1.0 for _ in responses]\n"
    file.write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    reward = RewardConfig(kind="scalar", function=f"{name}:f", model=None)
    config = dataclasses.replace(config, model=ModelSource(path=str(tmp_path / "sft")), reward=reward)
    asked = tmp_path / "run" / "asked.json"
    evaluate._check_same_models(asked, config, has_answers=False)
    evaluate._check_same_models(asked, config, has_answers=True)
    file.write_text(body.replace("1.0", "2.0"))
    words = rf"for config.reward.function as it was, {name}:f \(file sha256 .*--config.on_existing=restart"
    with pytest.raises(UserError, match=words):
        evaluate._check_same_models(asked, config, has_answers=True)
    recorded = json.loads(asked.read_text())
    asked.write_text(json.dumps({"model.path": recorded["model.path"]}))
    evaluate._check_same_models(asked, config, has_answers=True)
