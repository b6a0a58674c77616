"""The best-of-n stage: winners of a known reward, read by SFT; stopped and continued; what it refuses."""

import dataclasses
import hashlib
import json
import os
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from jaxrm.algorithms.best_of_n import BestOfNConfig
from jaxrm.algorithms.ppo_config import RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data import tasks
from jaxrm.data.config import DataConfig
from jaxrm.data.readers import read_records
from jaxrm.data.records import DemonstrationRecord, Message
from jaxrm.data.tasks.prompts import prompt_field
from jaxrm.errors import UserError
from jaxrm.evaluation.config import EvaluationConfig, JudgeConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.runtime.preemption import EXIT_PREEMPTED
from jaxrm.sharding.mesh import MeshConfig
from jaxrm.stage_config import SFT, BestOfN
from jaxrm.stages import sft
from jaxrm.stages.best_of_n import run as best_of_n
from jaxrm.stages.best_of_n.candidates import save_start

COUNT, N = 20, 3


@pytest.fixture(scope="module")
def place(make_run, task_folder, tmp_path_factory):
    """A folder with prompts and runs of a policy and of a reward model."""
    folder = tmp_path_factory.mktemp("best_of_n")
    lines = (task_folder / "prompts.jsonl").read_text().splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(lines[:COUNT]))
    (folder / "heldout.jsonl").write_text("".join(lines[COUNT : COUNT + 4]))
    for algorithm in ("sft", "seq2seq_rm", "scalar_rm"):
        make_run(folder / algorithm, algorithm)
    return folder


@pytest.fixture(autouse=True)
def reward(monkeypatch):
    """A module with a function that pays for distinct words; what it was asked is in ``asked``."""
    module = types.ModuleType("rewards_of_this_test")
    module.asked = []

    def variety(prompts, responses):
        module.asked.append(list(responses))
        return [float(len(set(response.split()))) for response in responses]

    module.variety = variety
    monkeypatch.setitem(sys.modules, "rewards_of_this_test", module)
    return module


@pytest.fixture
def config(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    return BestOfN(
        run_dir=str(tmp_path / "run"),
        model=ModelSource(path="sft"),
        reward=RewardConfig(kind="scalar", function="rewards_of_this_test:variety", calibration_responses=8),
        data=DataConfig(path="prompts.jsonl", eval_path="heldout.jsonl", max_length=48, batch_size=8 * N),
        best_of_n=BestOfNConfig(n=N, keep_truncated=True),
        rollout=RolloutConfig(sampling=SamplingConfig(max_new_tokens=6)),
        evaluation=JudgeConfig(judge="task:safety"),
        mesh=MeshConfig(data=-1),
        logging=LoggingConfig(progress=False, tensorboard=False),
    )


def rows_of(config, name="winners.jsonl"):
    return [json.loads(line) for line in (Path(config.run_dir) / name).read_text().splitlines()]


def test_winners_have_the_highest_reward_and_train_sft(config, reward, tmp_path, capsys):
    """The reward counts distinct words; SFT reads the winners as demonstrations."""
    assert best_of_n.run(config) == 0
    printed = capsys.readouterr().out
    rows, winners = rows_of(config, "candidates.jsonl"), rows_of(config)
    calibration, *draws = reward.asked
    assert len(draws) == 3 and len(rows) == len(winners) == COUNT
    scale = 1 / np.std([len(set(text.split())) for text in calibration])  # unit standard deviation
    for i, (row, winner) in enumerate(zip(rows, winners, strict=True)):
        batch, place_in_batch = divmod(i, 8)
        texts = draws[batch][place_in_batch * N : (place_in_batch + 1) * N]
        words = [len(set(text.split())) for text in texts]
        assert winner["response"] == texts[int(np.argmax(words))] == row["winner"]["response"]
        np.testing.assert_allclose(row["rewards"], np.array(words) * scale, rtol=1e-5)
        assert winner["reward"] == pytest.approx(max(words) * scale, rel=1e-5)
        prompt = (Message("user", winner["prompt"]),)
        assert winner["judge"] == tasks.judge("safety", prompt, winner["response"])
        assert winner["rewards_of_candidates"]["mean"] == pytest.approx(np.mean(words) * scale, rel=1e-5)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["candidate"]["reward"] == pytest.approx(np.mean([row["rewards"] for row in rows]))
    assert found["winner"]["reward"] > found["candidate"]["reward"]
    assert "Best of 3 by scalar rewards, 20 prompts" in printed and "at most log n - (n - 1)/n = 0.432" in printed

    path = str(tmp_path / "run" / "winners.jsonl")
    records, report = read_records(DataConfig(path=path, eval_path=path))
    assert report.used == report.total == COUNT and all(isinstance(one, DemonstrationRecord) for one in records)
    assert [record.response for record in records] == [winner["response"] for winner in winners]
    learnt = SFT(
        run_dir=str(tmp_path / "rft"),
        num_steps=1,
        model=config.model,
        logging=config.logging,
        data=DataConfig(path=path, max_length=64, batch_size=8, packing=False, eval_share=0.2),
        evaluation=EvaluationConfig(samples=0, sampling=SamplingConfig(max_new_tokens=4)),
    )
    assert sft.run(learnt) == 0


def test_a_stopped_run_ends_with_the_same_bytes(config, reward, tmp_path, capsys):
    other = dataclasses.replace(config, run_dir=str(tmp_path / "unbroken"))
    assert best_of_n.run(other) == 0
    asked, variety, calls = len(reward.asked), reward.variety, []

    def interrupted(prompts, responses):
        calls.append(1)
        if len(calls) == 1 + 1 + 1:  # after the calibration and the first batch
            os.kill(os.getpid(), signal.SIGTERM)
        return variety(prompts, responses)

    reward.variety = interrupted
    assert best_of_n.run(config) == EXIT_PREEMPTED
    assert len(calls) == 1 + 1 + 1 and len(rows_of(config, "candidates.jsonl")) == 8
    assert not (tmp_path / "run" / "winners.jsonl").exists()
    assert "the same command continues" in capsys.readouterr().out
    with (tmp_path / "run" / "candidates.jsonl").open("a") as file:
        file.write('{"step": 1, "prompt": "x"}\n{"step": 1, "pro')  # as a kill leaves it
    reward.variety, before = variety, len(reward.asked)
    assert best_of_n.run(config) == 0
    assert len(reward.asked) - before == 2 == asked - 1 - 1  # neither the calibration nor the first batch again
    for name in ("winners.jsonl", "candidates.jsonl", "evaluation.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name
    told = capsys.readouterr().out.split("Best of")[1]
    before = len(reward.asked)
    assert best_of_n.run(config) == 0 and len(reward.asked) == before
    assert capsys.readouterr().out.split("Best of")[1] == told


def test_steps_bound_the_batches_and_a_reward_model_scores_them(config, tmp_path):
    paid = dataclasses.replace(
        config,
        num_steps=1,
        reward=RewardConfig(kind="contrast", model="seq2seq_rm", calibration_responses=8),
        data=dataclasses.replace(config.data, max_length=40, batch_size=8),  # each draw reads its prompts
        best_of_n=BestOfNConfig(n=2, keep_truncated=True),
    )
    assert best_of_n.run(paid) == 0
    rows = rows_of(paid, "candidates.jsonl")
    assert len(rows) == 8 and len({row["winner"]["reward"] for row in rows}) > 1
    assert all(row["winner"]["reward"] == max(row["rewards"]) for row in rows)


def test_winners_that_were_cut_off_are_no_demonstrations(config):
    cut = dataclasses.replace(config, best_of_n=BestOfNConfig(n=1))
    rollout = RolloutConfig(sampling=SamplingConfig(max_new_tokens=2))
    cut = dataclasses.replace(cut, num_steps=1, rollout=rollout, data=dataclasses.replace(config.data, batch_size=8))
    try:
        assert best_of_n.run(cut) == 0
        kept = len(rows_of(cut))
    except UserError as error:
        kept = 0
        assert "none of the 8 winners has an end token within 2 tokens" in str(error)
    rows = rows_of(cut, "candidates.jsonl")
    assert kept == sum(row["winner"]["ended"] and bool(row["winner"]["response"]) for row in rows) < len(rows)


def test_conversations_are_written_as_messages_questions_as_text():
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert prompt_field(turns[:1]) == "a"
    assert prompt_field(turns)[1] == {"role": "assistant", "content": "b"} and len(prompt_field(turns)) == 3
    assert prompt_field((Message("system", "be kind"),)) == [{"role": "system", "content": "be kind"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelSource(preset="tiny")}, r"config.model.path is None; best-of-n draws from a policy"),
        ({"model": ModelSource(path="scalar_rm")}, r"config.model.path is 'scalar_rm', a run of scalar_rm; required"),
        (
            {"reward": RewardConfig(kind="scalar")},
            r"config.reward has no model, function or endpoint.*--config.reward.mod",
        ),
        (
            {"rollout": RolloutConfig(sampling=SamplingConfig(max_new_tokens=6, temperature=0.0))},
            r"config.rollout.sampling.temperature is 0.0, with which all 3 .*temperature=1.0, or --config.best_",
        ),
        (
            {"rollout": RolloutConfig(responses_per_prompt=4)},
            r"config.rollout.responses_per_prompt is 4, which is for PPO alone; here use --config.best_of_n.n=4 with",
        ),
        ({"reward": RewardConfig(kind="soft", model="scalar_rm")}, r"config.reward.kind is 'soft', but config.reward."),
        ({"evaluation": JudgeConfig(judge="task:safty")}, r"safty"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_writing(config, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        best_of_n.run(dataclasses.replace(config, **changes))
    assert not (tmp_path / "run").exists()


def test_another_policy_in_the_folder_does_not_continue_the_run(config, reward, monkeypatch):
    def die(prompts, responses):
        raise KeyboardInterrupt

    variety = reward.variety
    reward.variety = lambda p, r: variety(p, r) if len(reward.asked) < 1 + 1 else die(p, r)
    with pytest.raises(KeyboardInterrupt):
        best_of_n.run(config)
    reward.variety = variety
    monkeypatch.setattr(best_of_n.weights, "identity_of", lambda path: "a new run")
    with pytest.raises(
        UserError, match=r"prompts, policy, reward model or function are no longer those.*on_existing=restart"
    ):
        best_of_n.run(config)


def test_an_edited_function_does_not_continue_the_run(config, tmp_path, monkeypatch):
    """Nor do candidates of versions that wrote down its name alone stop at it."""
    name = f"edited_{tmp_path.name.replace('-', '_')}"
    file, body = tmp_path / f"{name}.py", "def f(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
    file.write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    config = dataclasses.replace(config, reward=dataclasses.replace(config.reward, function=f"{name}:f"))
    with monkeypatch.context() as patch:
        patch.setattr(best_of_n, "save_start", lambda *args: (save_start(*args), stop()))
        with pytest.raises(KeyboardInterrupt):
            best_of_n.run(config)
    file.write_text(body.replace("len(r)", "-len(r)"))
    with pytest.raises(UserError, match=rf"{name}:f \(file sha256 \w+\), now .*on_existing=restart"):
        best_of_n.run(config)

    start = tmp_path / "run" / "best_of_n.json"
    recorded = json.loads(start.read_text())
    recorded["identity"] = recorded["identity"].partition(f" (file sha256 {source_digest_of(body)}")[0]
    assert recorded["identity"].endswith(f"{name}:f")
    start.write_text(json.dumps(recorded))
    assert best_of_n.run(config) == 0


def stop():
    raise KeyboardInterrupt


def source_digest_of(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]
