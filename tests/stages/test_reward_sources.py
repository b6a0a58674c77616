"""Rewards of several sources that add up: their config, the sum, what is logged of each, and PPO with it."""

import dataclasses
import json
import re
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.chat_server import ChatServer, Reply, closed_url, serving
from support.same_run import differences

from jaxrm import score
from jaxrm.algorithms import scoring
from jaxrm.algorithms.best_of_n import BestOfNConfig
from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig, naming_source, sources_of
from jaxrm.algorithms.summed_rewards import source_metrics, sum_rewards
from jaxrm.config import command_line, dicts
from jaxrm.data.config import DataConfig
from jaxrm.data.prompts import PromptExample
from jaxrm.errors import UserError, option
from jaxrm.evaluation.config import EvaluateConfig, JudgedEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.ops import reward_scaling
from jaxrm.ops.reward_kinds import KINDS
from jaxrm.pipeline.config import resolve
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.runtime.metrics import WALL_CLOCK, LoggingConfig
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import PPO, BestOfN, Evaluate, read_stage
from jaxrm.stages.best_of_n import run as best_of_n
from jaxrm.stages.evaluate import run as evaluate
from jaxrm.stages.ppo import run as ppo
from jaxrm.stages.ppo.critic import Critic
from jaxrm.stages.rewards import sources
from jaxrm.stages.rewards.calibration import calibration_of
from jaxrm.stages.rewards.summed import SummedRewards
from jaxrm.types import ResponseBatch

NO_MODEL = "--config.reward.model=None"
END = 9


# --- config


def parse(*arguments, config="ppo_tiny"):
    """The config of a command line."""
    received = []
    argv = ["x", f"--config={config}", *arguments]
    status = command_line.run(lambda config, flags: received.append(config), object, argv=argv)
    assert status == 0
    return received[0]


@pytest.fixture
def refuse(capsys):
    """The one line that a mistaken command line is answered with."""

    def run(*arguments, config="ppo_tiny"):
        argv = ["x", f"--config={config}", *arguments]
        assert command_line.run(lambda config, flags: 0, object, argv=argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("jaxrm: error: ") and err.count("\n") == 1
        return err.removeprefix("jaxrm: error: ").rstrip()

    return run


def test_flags_name_sources_and_change_them():
    two = parse(
        NO_MODEL,
        "--config.rewards.helpful.model=runs/rm",
        "--config.rewards.length.function=my:rule",
        "--config.rewards.length.kind=scalar",
        "--config.rewards.length.weight",
        "-0.5",
    )
    assert two.rewards == {
        "helpful": RewardConfig(model="runs/rm"),
        "length": RewardConfig(kind="scalar", function="my:rule", weight=-0.5),
    }
    assert sources_of(two) == two.rewards and list(two.rewards) == ["helpful", "length"]
    one = dicts.with_changes(two, {"rewards.length": None, "rewards.helpful.scale": 2})
    assert one.rewards == {"helpful": RewardConfig(model="runs/rm", scale=2.0)}
    assert sources_of(parse()) == {"reward": parse().reward}


def test_sources_survive_a_record_and_can_be_hashed():
    config = parse(NO_MODEL, "--config.rewards.a.model=x", "--config.rewards.b.model=y")
    recorded = json.loads(json.dumps(dicts.to_dict(config), allow_nan=False))
    assert recorded["rewards"]["b"]["model"] == "y"
    again = read_stage(recorded)
    assert again == config and hash(again) == hash(config) and list(again.rewards) == ["a", "b"]
    other = dicts.with_changes(config, {"rewards.b.weight": 2})
    assert dicts.differences(config, other) == [("rewards.b.weight", 1.0, 2.0)]
    before = {name: value for name, value in dicts.to_dict(parse()).items() if name != "rewards"}
    before["reward"] = {name: value for name, value in before["reward"].items() if name != "weight"}
    assert read_stage(before) == parse()


def test_a_config_file_and_every_stage_of_it_name_sources(tmp_path, capsys):
    """``config.*`` reaches the sources that a stage has; ``stage:NAME`` in one is that stage's run."""
    file = tmp_path / "sum.py"
    file.write_text(
        "from jaxrm.stage_config import PPO, ScalarRM\nfrom jaxrm.algorithms.reward_config import RewardConfig as R\n"
        "from jaxrm.pipeline.config import pipeline\n"
        "def get_config():\n"
        "    sum = {'human': R(kind='scalar', model='stage:rm'), 'rule': R(kind='scalar', function='a:b')}\n"
        "    return pipeline('runs/x', rm=ScalarRM(), ppo=PPO(rewards=sum), more=PPO())\n"
    )
    config = parse("--config.*.rewards.rule.weight=0.25", "--config.more.reward.model=y", config=str(file))
    assert config.ppo.rewards["rule"].weight == 0.25 and not config.more.rewards
    stages = resolve(config)
    assert stages["ppo"].experiment.rewards["human"].model == "runs/x/rm"
    assert stages["ppo"].needs == {"config.ppo.rewards.human.model": "rm"}
    assert command_line.run(lambda config, flags: 0, object, argv=["x", f"--config={file}", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--config.ppo.rewards.rule.weight=1.0  (float)" in printed
    assert "--config.more.rewards.NAME.kind=…  (sections RewardConfig by name)" in printed


def test_every_stage_gets_a_new_source_of_all_stages(tmp_path):
    """Also where one stage has more to say of it by its own name."""
    file = tmp_path / "two.py"
    file.write_text(
        "from jaxrm.stage_config import PPO\nfrom jaxrm.pipeline.config import pipeline\n"
        "from jaxrm.algorithms.reward_config import RewardConfig as R\n"
        "def get_config():\n"
        "    ppo = PPO(rewards={'old': R(kind='scalar', function='a:b')})\n"
        "    return pipeline('runs/x', ppo=ppo, more=ppo)\n"
    )
    config = parse("--config.*.rewards.new.model=x", "--config.ppo.rewards.new.weight=2", config=str(file))
    assert config.ppo.rewards["new"] == RewardConfig(model="x", weight=2.0)
    assert config.more.rewards["new"] == RewardConfig(model="x") and "old" in config.more.rewards


def test_the_critic_starts_from_the_first_weighted_name(monkeypatch):
    """Not from the first in the config, whose order means nothing, nor from a source that adds nothing."""
    run = types.SimpleNamespace(config=types.SimpleNamespace(algorithm="scalar_rm"))
    monkeypatch.setattr(sources, "find_checkpoint", lambda path, *_: types.SimpleNamespace(**vars(run), path=path))
    monkeypatch.setattr(sources, "origin_of", lambda source: sources.MODEL_RUN)
    each = {
        name: RewardConfig(kind="scalar", model=name, weight=weight)
        for name, weight in zip("cba", (1, 1, 0), strict=True)
    }
    for named in (each, dict(reversed(each.items()))):
        assert [run.path for run in sources.scalar_runs(PPO(rewards=named)).values()] == ["b", "c"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "reward.model=y rewards.a.model=x",
            r"reward is given beside config.rewards, .* give --config.reward.model=None$",
        ),
        (
            "reward.kind=scalar reward.model=x ppo.early_end_penalty=1",
            r"ppo.early_end_penalty is 1, .* of the rewards is scalar; give --config.ppo.early_end_penalty=0.0$",
        ),
        ("reward.scale=2 rewards.a.model=x", r"reward is given .*, which has a; .* give --config.reward.scale=unit$"),
        ("rewards.a.weight=inf rewards.a.model=x", r"rewards.a.weight is inf; it must be finite"),
        ("rewards.a.weight=nan rewards.a.model=x", r"rewards.a.weight is nan, not a number; required float"),
        ("rewards.a.weight=0 rewards.a.model=x", r"rewards has weight 0 for .* e.g. --config.rewards.a.weight=1.0$"),
        ("rewards.a.function=a:b rewards.a.model=x", r"rewards.a has both .* two sources are two names of config.rew"),
        ("rewards.a.scale=1", r"rewards.a has no model, function or endpoint, .* --config.rewards.a.model=runs"),
        ("rewards.kind=scalar", r"rewards.kind is no field; config.rewards holds sections .*\.NAME.kind="),
        ("rewards.weight.model=x", r"rewards.weight.model is no field; .* none of their fields kind, "),
        ("rewards.9th.model=x", r"rewards.9th.model is no field; .* an identifier "),
        ("rewards=x", r"rewards is no field; config.rewards holds sections RewardConfig by name"),
        ("rewards.a=x", r"rewards.a is a section, but is given 'x'; .* --config.rewards.a.kind="),
        ("rewards.a.wieght=1", r"rewards.a.wieght is no field .* mean --config.rewards.a.weight\?$"),
        ("rewards.a.kind=word rewards.a.model=x", r"rewards.a.kind is 'word'; it must be one of literal, "),
        ("reward.weight=2", r"reward.weight is 2, but a weight is for one of several sources"),
    ],
)
def test_a_mistaken_source_gets_one_line(refuse, flags, message):
    flags = flags if "reward.model" in flags else f"reward.model=None {flags}"
    assert re.match(f"config.{message}", refuse(*(f"--config.{flag}" for flag in flags.split())))


def test_a_stage_without_rewards_says_who_has_them(refuse):
    assert refuse("--config.rewards.a.weight=1", config="sft_tiny").startswith(
        "config.rewards.a.weight is a field of ppo, best_of_n, evaluate; this is a run of sft"
    )


def test_two_sources_of_one_name_in_a_file_are_refused(refuse, tmp_path):
    """Python would keep the last of them and say nothing."""
    file = tmp_path / "twice.py"
    start = (
        "from jaxrm.stage_config import PPO\nfrom jaxrm.algorithms.reward_config import RewardConfig as R\n"
        "def get_config():\n    "
    )
    for body in (
        "return PPO(rewards={'a': R(model='x'),\n        'a': R(model='y')})\n",
        "rewards = {'a': R(model='x'),\n        'a': R(model='y')}\n    return PPO(rewards=rewards)\n",
    ):
        file.write_text(start + body)
        assert "line 5: a dict has 'a' twice, of which Python keeps the last" in refuse(config=str(file))


@pytest.mark.parametrize("stage", [PPO, BestOfN, Evaluate])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rewards": {"weight": RewardConfig(model="x")}}, r"^a name in \w+.rewards is 'weight'; .* e.g. my_weight$"),
        ({"rewards": {"a-b": RewardConfig(model="x")}}, r"^a name in \w+.rewards is 'a-b'; it must be an identifier"),
        ({"rewards": [RewardConfig(model="x")]}, r"^\w+.rewards is list; it must be sections RewardConfig by name"),
        ({"rewards": {"a": "x"}}, r"^\w+.rewards.a is str; it must be a RewardConfig$"),
        ({"rewards": {"a": RewardConfig()}}, r"^\w+.rewards.a has no model, function or endpoint"),
        ({"rewards": {"a": RewardConfig(model="x", weight=0)}}, r"^\w+.rewards has weight 0 for every source"),
        ({"rewards": {"a": RewardConfig(model="x")}, "reward": RewardConfig(model="y")}, r" beside .* leave it out$"),
        ({"reward": RewardConfig(model="x", weight=0.5)}, r"^\w+.reward.weight is 0.5"),
    ],
)
def test_a_mistaken_source_in_python_is_named(stage, fields, message):
    with pytest.raises(UserError, match=message):
        stage(**fields)


def test_messages_name_the_source_that_they_are_about():
    config = PPO(rewards={"rule": RewardConfig(kind="scalar", function="a:b")})
    with naming_source(config, "rule"):
        assert option("reward.function") == "config.rewards.rule.function"
    with naming_source(PPO(), "reward"):
        assert option("reward.function") == "config.reward.function"


# --- the sum


def scored(values, batch, kind="scalar"):
    """Token rewards of values ``[B, T]`` as they are."""
    values = jnp.where(batch.response_mask, jnp.asarray(values, jnp.float32), 0.0)
    tags = batch.response_mask & (values >= 0)
    return scoring.as_token_rewards(reward_scaling.uncalibrated(), KINDS[kind], values, tags, batch, (END,))


@pytest.fixture(scope="module")
def parts():
    """Responses of 3, 5, 1 and no tokens, and the rewards of three sources."""
    lengths = np.array([3, 5, 1, 0])
    mask = jnp.asarray(np.arange(5) < lengths[:, None])
    prompts = jnp.ones((4, 2), jnp.int32)
    responses = jnp.where(mask, 5, 0).at[0, 2].set(END)
    batch = ResponseBatch(prompts, jnp.ones((4, 2), bool), responses, mask)
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(4, 5)) for name in ("b", "a", "c")}
    return batch, {name: scored(x, batch) for name, x in values.items()}


def test_a_sum_is_that_of_a_plain_loop(parts):
    batch, each = parts
    weights = {"a": 0.5, "b": -2.0, "c": 1.0}
    summed = sum_rewards(each, batch, weights=weights, end_ids=(END,))
    expected, tags = np.zeros((4, 5)), np.array(batch.response_mask)
    for name, weight in weights.items():
        expected += weight * np.asarray(each[name].rewards)
        tags &= np.asarray(each[name].tags)
    np.testing.assert_allclose(summed.rewards, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(summed.diagnostics["sum"], expected.sum(axis=1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(summed.tags, tags)
    np.testing.assert_array_equal(summed.diagnostics["ended"], [1, 0, 0, 0])
    assert list(summed.parts) == ["b", "a", "c"]


def test_a_source_of_weight_0_adds_nothing_not_even_nan(parts):
    batch, each = parts
    spoiled = scored(np.full((4, 5), np.nan), batch)
    summed = sum_rewards({"a": each["a"], "b": spoiled}, batch, weights={"a": 1.0, "b": 0.0}, end_ids=(END,))
    for name in ("rewards", "values", "tags", "mask"):
        np.testing.assert_array_equal(getattr(summed, name), getattr(each["a"], name))
    for name, x in each["a"].diagnostics.items():
        np.testing.assert_array_equal(summed.diagnostics[name], x)


def test_what_each_source_gives_is_that_of_numpy(parts):
    """The response of no token is not counted."""
    batch, each = parts
    weights = {"a": 0.5, "b": -2.0, "c": 0.0}
    metrics = source_metrics(each, batch.response_mask, weights)
    sums = {name: np.asarray(x.rewards).sum(axis=1)[:3].astype(np.float64) for name, x in each.items()}
    spread = {name: abs(weights[name]) * sums[name].std() for name in sums}
    for name, x in sums.items():
        assert metrics[f"reward/{name}"] == pytest.approx(x.mean(), rel=1e-5)
        assert metrics[f"reward_share/{name}"] == pytest.approx(spread[name] / sum(spread.values()), rel=1e-5)
        by_length = np.corrcoef(x, [3, 5, 1])[0, 1]
        assert metrics[f"reward_length_correlation/{name}"] == pytest.approx(by_length, rel=1e-4)
    for a, b in (("a", "b"), ("a", "c"), ("b", "c")):
        assert metrics[f"reward_correlation/{a}/{b}"] == pytest.approx(np.corrcoef(sums[a], sums[b])[0, 1], rel=1e-4)
    assert metrics["reward_share/c"] == 0 and len(metrics) == 12


def test_equal_rewards_have_no_share_and_no_correlation(parts):
    batch, _ = parts
    last = np.zeros((4, 5))
    last[[0, 1, 2], [2, 4, 0]] = 0.1
    metrics = source_metrics(
        {"a": scored(last, batch), "b": scored(last, batch)}, batch.response_mask, {"a": 1, "b": 1}
    )
    assert metrics["reward/a"] == pytest.approx(0.1)
    assert {float(x) for name, x in metrics.items() if not name.startswith("reward/")} == {0.0}


def test_a_source_of_weight_0_that_gives_nan_is_named(parts):
    """It adds nothing, but what is logged of it would say nothing: the run ends in a line, before its first step."""
    batch, each = parts
    rewards = {"fine": RewardConfig(kind="scalar", model="x"), "idle": RewardConfig(kind="scalar", model="y", weight=0)}
    given = {"fine": each["a"], "idle": scored(np.full((4, 5), np.nan), batch)}
    summed = sum_rewards(given, batch, weights={"fine": 1.0, "idle": 0.0}, end_ids=(END,))
    config = PPO(rewards=rewards, data=DataConfig(path="task:safety", batch_size=4))
    prompts, drawn = [PromptExample(np.ones(2, np.int32), (), "a record")], types.SimpleNamespace(responses=batch)
    mesh = build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with pytest.raises(UserError) as caught:
        calibration_of(config, mesh, prompts, 2, lambda *_: drawn, lambda *_: summed, jax.random.key(0), False)
    assert str(caught.value).startswith("config.rewards.idle gives the responses that rewards are calibrated on a ")
    assert str(caught.value).endswith("e.g. --config.rewards.idle.model=RUN_DIR/checkpoints/best")


def test_a_critics_head_is_in_the_units_of_its_part_of_the_sum():
    @dataclasses.dataclass(frozen=True)
    class State:
        params: dict

    state = State({"scalar_head": {"kernel": jnp.array([1.0, 2.0])}})
    unit, double = (dataclasses.replace(reward_scaling.uncalibrated(), scale=jnp.float32(x)) for x in (1, 2))
    critic = Critic(None, "rm", head_of="score")
    for calibration, weights, factor in (
        (double, {}, 2.0),
        ({"words": unit, "score": double}, {"words": 1.0, "score": -0.25}, -0.5),
    ):
        head = critic.calibrated(state, calibration, weights).params["scalar_head"]
        np.testing.assert_allclose(head["kernel"], factor * np.array([1.0, 2.0]))
    assert Critic(None, "the policy").calibrated(state, double, {}) is state


def test_a_failure_at_work_names_its_source(parts):
    """As a function does that fails in the middle of a run."""
    batch, each = parts

    class Failing:
        needs_reference = True

        def __call__(self, calibration, batch, reference):
            raise UserError(f"{option('reward.function')} raised")

    class Working:
        needs_reference = False

        def __call__(self, calibration, batch, reference):
            return each["a"]

    mesh = build_mesh(MeshConfig(), jax.devices())
    sources = {"fine": Working(), "rule": Failing()}
    summed = SummedRewards(sources, dict.fromkeys(sources, 1.0), end_ids=(END,), mesh=mesh)
    assert summed.needs_reference
    with pytest.raises(UserError, match=r"^config.rewards.rule.function raised$"):
        summed(dict.fromkeys(sources), batch, None)


# --- PPO with a sum


@pytest.fixture(scope="module")
def place(make_run, tmp_path_factory):
    """A folder with runs of a policy and of both sorts of reward model."""
    folder = tmp_path_factory.mktemp("sources")
    for algorithm in ("sft", "seq2seq_rm", "scalar_rm", "dpo"):
        make_run(folder / algorithm, algorithm)
    make_run(folder / "other_dpo", "dpo", seed=1)
    return folder


@pytest.fixture
def config(place, monkeypatch):
    """A short run of PPO; the rewards are still to be given."""
    module = types.ModuleType("rules_of_this_test")
    module.brief = lambda prompts, responses: [-float(len(response.split())) for response in responses]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(place)
    monkeypatch.setattr(ppo, "build_mesh", lambda config: build_mesh(config, jax.devices()[:1]))  # compiles sooner
    sampling = SamplingConfig(max_new_tokens=6)

    def make(run_dir, **fields):
        return PPO(
            run_dir=str(run_dir),
            num_steps=3,
            model=ModelSource(path="sft"),
            data=DataConfig(path="task:safety", max_length=64, batch_size=8, max_eval_records=8),
            rollout=RolloutConfig(sampling=sampling),
            optimizer=OptimizerConfig(lr=3e-2),
            checkpoint=CheckpointConfig(every=2),
            evaluation=JudgedEvaluationConfig(every=2, samples=2, judge="task:safety", sampling=sampling),
            mesh=MeshConfig(1, 1, 1),
            logging=LoggingConfig(every=1, tensorboard=False, progress=False),
            **fields,
        )

    return make


LITERAL = RewardConfig(kind="literal", model="seq2seq_rm", calibration_responses=8)
SCALAR = RewardConfig(kind="scalar", model="scalar_rm", calibration_responses=16)
BRIEF = RewardConfig(kind="scalar", function="rules_of_this_test:brief", calibration_responses=8, weight=0.25)


def rows_of(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.slow
def test_weights_1_and_0_give_the_bits_of_one_source(config, tmp_path):
    """Of every parameter and moment, and of all that is said of the sum."""
    assert ppo.run(config(tmp_path / "one", reward=LITERAL)) == 0
    rewards = {"words": LITERAL, "brief": dataclasses.replace(BRIEF, weight=0.0)}
    assert ppo.run(config(tmp_path / "two", rewards=rewards)) == 0
    unlike = differences(tmp_path / "one", tmp_path / "two")
    arrays = [line for line in unlike if "['" in line.split(":")[1] and "feedback" not in line]
    assert unlike and not arrays
    for one, two in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        for name in set(one) & set(two) - WALL_CLOCK:
            assert one[name] == two[name], name


@pytest.mark.slow
def test_a_sum_of_three_sources_runs_and_resumes(config, tmp_path, capsys):
    """A seq2seq reward model, a scalar one and a rule; the critic starts from the scalar one."""
    made = config(tmp_path / "sum", rewards={"words": LITERAL, "score": SCALAR, "brief": BRIEF})
    assert ppo.run(made) == 0
    printed = capsys.readouterr().out
    assert "critic from scalar_rm" in printed and "rewards: 1 * words, literal from seq2seq_rm" in printed
    row = next(row for row in rows_of(tmp_path / "sum") if "policy_loss" in row)
    parts = [weight * row[f"reward/{name}"] for name, weight in (("words", 1), ("score", 1), ("brief", 0.25))]
    assert row["reward"] == pytest.approx(sum(parts), rel=1e-4, abs=1e-5)
    assert sum(row[f"reward_share/{name}"] for name in made.rewards) == pytest.approx(1, rel=1e-5)
    sample = rows_of(tmp_path / "sum", "samples.jsonl")[-1]
    assert list(sample["sources"]) == ["words", "score", "brief"]
    summed = sum(each["weight"] * np.array(each["rewards"]) for each in sample["sources"].values())
    np.testing.assert_allclose(summed, sample["rewards"], rtol=1e-4, atol=1e-5)
    assert "Sources of the reward, held-out data" in printed and " = 1 * words " in printed
    assert {"center/words", "reward_correlation/brief/score", "reward_length_correlation/score"} <= set(row)

    shutil.copytree(tmp_path / "sum", tmp_path / "stopped" / "sum", ignore=shutil.ignore_patterns(".lock"))
    shutil.rmtree(tmp_path / "stopped" / "sum" / "checkpoints" / "3")
    again = dicts.with_changes(made, {"run_dir": str(tmp_path / "stopped" / "sum")})
    assert ppo.run(again) == 0
    assert not differences(tmp_path / "sum", tmp_path / "stopped" / "sum")


# --- choosing and evaluating by a sum


TWO = {
    "brief": BRIEF,
    "varied": RewardConfig(kind="scalar", function="rules_of_this_test:varied", calibration_responses=8),
}


@pytest.fixture
def answers(place, tmp_path, monkeypatch):
    """Makes the config of a stage that answers prompts and rewards the answers by two rules."""
    module = types.ModuleType("rules_of_this_test")
    module.brief = lambda prompts, responses: [-2.0 * len(response.split()) for response in responses]
    module.varied = lambda prompts, responses: [float(len(set(response.split()))) for response in responses]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(place)
    for stage in (best_of_n, evaluate):
        monkeypatch.setattr(stage, "build_mesh", lambda config: build_mesh(config, jax.devices()[:1]))

    def make(stage, **fields):
        return stage(
            run_dir=str(tmp_path / "run"),
            model=ModelSource(path="sft"),
            rewards=TWO,
            data=DataConfig(path="task:safety", max_length=64, batch_size=8, max_eval_records=8),
            rollout=RolloutConfig(sampling=SamplingConfig(max_new_tokens=6)),
            mesh=MeshConfig(1, 1, 1),
            logging=LoggingConfig(progress=False, tensorboard=False),
            **fields,
        )

    return make


def test_the_best_of_n_has_the_highest_sum(answers, tmp_path, capsys):
    """It resumes with the calibration of both sources, and says what each gave."""
    config = answers(BestOfN, num_steps=2, best_of_n=BestOfNConfig(n=3, keep_truncated=True))
    assert best_of_n.run(config) == 0
    rows = rows_of(tmp_path / "run", "candidates.jsonl")
    for row in rows:
        winner = row["winner"]
        summed = sum(source["weight"] * source["reward"] for source in winner["sources"].values())
        assert winner["reward"] == max(row["rewards"]) == pytest.approx(summed, rel=1e-4, abs=1e-5)
    printed = capsys.readouterr().out
    assert "Best of 3 by 0.25 * brief (scalar) + varied (scalar) rewards" in printed and "reward/varied" in printed
    summary = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    brief = [row["winner"]["sources"]["brief"]["reward"] for row in rows]
    assert summary["winner"]["reward/brief"] == pytest.approx(np.mean(brief), rel=1e-4)
    calibration = json.loads((tmp_path / "run" / "best_of_n.json").read_text())["calibration"]
    assert set(calibration) == set(TWO) and calibration["brief"]["scale"] != calibration["varied"]["scale"]

    for name in ("winners.jsonl", "evaluation.json"):
        (tmp_path / "run" / name).unlink()
    file = tmp_path / "run" / "candidates.jsonl"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:8]))
    assert best_of_n.run(config) == 0
    assert rows_of(tmp_path / "run", "candidates.jsonl") == rows


def test_answers_are_evaluated_by_each_source(answers, tmp_path):
    config = answers(Evaluate, evaluate=EvaluateConfig(decodings=("sampled",), best_of=2, token_rewards=1))
    assert evaluate.run(config) == 0
    rows = rows_of(tmp_path / "run", "answers.jsonl")
    for number, row in enumerate(rows):
        summed = sum(source["weight"] * source["reward"] for source in row["sources"].values())
        assert row["reward"] == pytest.approx(summed, rel=1e-4, abs=1e-5)
        assert ("rewards" in row["sources"]["brief"]) == (number == 0)
    (means,) = json.loads((tmp_path / "run" / "evaluation.json").read_text()).values()
    assert means["reward_share/brief"] + means["reward_share/varied"] == pytest.approx(1, rel=1e-5)
    assert -1 <= means["reward_correlation/brief/varied"] <= 1


# --- scoring a file by a sum

SUM = """
from jaxrm.algorithms.ppo_config import RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.stage_config import PPO


def get_config():
    return PPO(
        model=ModelSource(path="sft"),
        data=DataConfig(path="task:safety", max_length=128),
        rollout=RolloutConfig(sampling=SamplingConfig(max_new_tokens=64)),
        rewards={
            "words": RewardConfig(kind="literal", model="seq2seq_rm"),
            "brief": RewardConfig(kind="scalar", function="rules_of_this_test:brief", weight=-0.5),
        },
    )
"""


JUDGED = """
from jaxrm.algorithms.endpoint_config import EndpointConfig
from jaxrm.algorithms.ppo_config import RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.stage_config import PPO


def get_config():
    judge = EndpointConfig(url="{url}", model="judge", cache="{cache}", retries=0)
    return PPO(
        model=ModelSource(path="sft"),
        data=DataConfig(path="task:safety", max_length=128),
        rollout=RolloutConfig(sampling=SamplingConfig(max_new_tokens=64, temperature=0.5)),
        rewards={{
            "judge": RewardConfig(kind="scalar", endpoint=judge),
            "tokens": RewardConfig(kind="dpo", model="dpo"),
        }},
    )
"""


def run_score(*arguments, config="sum.py", output="scored.jsonl"):
    argv = ["score", f"--config={config}", "--input=pairs.jsonl", f"--output={output}", *arguments]
    return command_line.run(
        score.main,
        score.CONFIG_CLASSES,
        define_flags=score.define_flags,
        config_required=False,
        flag_of_field=score.FLAG_OF_FIELD,
        argv=argv,
    )


@pytest.fixture
def pairs(config, place, task_folder, tmp_path, monkeypatch):
    """A folder with a config of two sources, the runs that it names, and some pairs."""
    for run in place.iterdir():
        (tmp_path / run.name).symlink_to(run)
    (tmp_path / "sum.py").write_text(SUM)
    lines = (task_folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(lines[:6]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_flags_of_one_model_do_not_go_with_a_sum(pairs, capsys):
    assert run_score("--checkpoint=seq2seq_rm") == 2
    assert (
        "--checkpoint is for scoring with one reward model, but config.rewards has words, brief"
        in capsys.readouterr().err
    )
    assert run_score("--config.model.path=None") == 2
    assert "config.model.path is None, but sources are added on the tokens of a policy" in capsys.readouterr().err
    assert not (pairs / "scored.jsonl").exists()


def test_a_file_is_scored_by_the_sum_of_sources(pairs, capsys):
    """Each calibrated on the file's responses, and shown on the page."""
    assert run_score("--html=scored.html", "--batch_size=8") == 0
    rows = rows_of(pairs, "scored.jsonl")
    responses = [response for row in rows for response in row["responses"]]
    assert len(responses) == 12
    for response in responses:
        sources = response["sources"]
        summed = np.array(sources["words"]["rewards"]) - 0.5 * np.array(sources["brief"]["rewards"])
        np.testing.assert_allclose(response["rewards"], summed, rtol=1e-5, atol=1e-5)
    brief = np.array([response["sources"]["brief"]["reward"] for response in responses])
    words = np.array([-len(response["text"].split()) for response in responses])
    np.testing.assert_allclose(brief, words / words.std(), rtol=1e-5)
    printed = capsys.readouterr().out
    assert "By source" in printed and "sum of words (literal) + -0.5 * brief (scalar)" in printed
    page = (pairs / "scored.html").read_text()
    (content,) = re.findall(r'<script type="application/json" id="records">(.*?)</script>', page, re.DOTALL)
    shown = json.loads(content)["records"][0]["responses"][0]["sources"]
    assert set(shown) == {"words", "brief"} and len(shown["brief"]["rewards"]) == len(responses[0]["rewards"])


def test_a_judge_is_asked_for_a_file_and_its_cost_is_told(pairs, capsys):
    """Beside a policy of DPO that has learned nothing: it differs from its reference at no temperature of sampling."""
    with serving(ChatServer(reply=lambda number, question: Reply(f"Score: {1 + len(question) % 9}"))) as server:
        (pairs / "judged.py").write_text(JUDGED.format(url=server.url, cache=pairs / "cache"))
        assert run_score(config="judged.py") == 0
        printed, asked = capsys.readouterr().out, len(set(server.questions))
    assert re.search(rf"calls +{asked}\n", printed[printed.index("The judge's cost") :]) and asked > 1
    responses = [response for row in rows_of(pairs, "scored.jsonl") for response in row["responses"]]
    assert max(abs(x) for response in responses for x in response["sources"]["tokens"]["rewards"]) < 1e-5
    assert len({response["sources"]["judge"]["reward"] for response in responses}) > 1

    with closed_url() as url:
        (pairs / "judged.py").write_text(JUDGED.format(url=url, cache=pairs / "other_cache"))
        assert run_score(config="judged.py", output="new.jsonl") == 2
    error = capsys.readouterr().err
    assert f"config.rewards.judge.endpoint.url is '{url}', which cannot be reached" in error
    assert not (pairs / "new.jsonl").exists()


def run_one_model(output, *arguments):
    argv = ["score", "--input=pairs.jsonl", f"--output={output}", "--batch_size=16", *arguments]
    flags = {"define_flags": score.define_flags, "flag_of_field": score.FLAG_OF_FIELD}
    assert command_line.run(score.main, score.CONFIG_CLASSES, config_required=False, argv=argv, **flags) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return [response for row in rows for response in row["responses"]]


def test_a_policy_of_dpo_scores_a_file_by_its_reference(pairs):
    """Each token by the difference of their log-probs, within 1 nat: none where both are the same policy."""
    for run, most in (("dpo", 0.0), ("other_dpo", 1.0)):
        responses = run_one_model(pairs / "out.jsonl", f"--checkpoint={run}", "--reference=sft")
        largest = max(abs(x) for response in responses for x in response["rewards"])
        assert largest == pytest.approx(most, abs=1e-5)


@pytest.mark.slow
def test_edit_aligned_scores_a_file_by_its_own_corrections(pairs):
    """A token of the longest common subsequence of response and correction earns 1, another loses 1."""
    longest = max(len(one["token_ids"]) for one in run_one_model(pairs / "one.jsonl", "--checkpoint=scalar_rm"))
    flags = ("--checkpoint=seq2seq_rm", "--kind=edit_aligned", f"--max_new_tokens={longest}")
    for response in run_one_model(pairs / "out.jsonl", *flags):
        assert set(response["rewards"]) <= {-1.0, 1.0}
        common = common_length(response["token_ids"], response["correction"]["token_ids"])
        assert response["rewards"].count(1.0) == common


def common_length(one, other):
    """Length of the longest common subsequence, by the plain recurrence."""
    best = np.zeros((len(one) + 1, len(other) + 1), int)
    for i, j in np.ndindex(len(one), len(other)):
        best[i + 1, j + 1] = best[i, j] + 1 if one[i] == other[j] else max(best[i, j + 1], best[i + 1, j])
    return best[-1, -1]
