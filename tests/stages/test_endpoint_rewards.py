"""A judge behind an endpoint as a source of rewards: runs that it judges, what it costs, and what is refused."""

import collections
import dataclasses
import json
import re

import jax
import pytest
from support.chat_server import ChatServer, Reply, closed_url, serving
from support.same_run import differences

from jaxrm.algorithms.best_of_n import BestOfNConfig
from jaxrm.algorithms.endpoint_config import EndpointConfig
from jaxrm.algorithms.ppo_config import RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.config import dicts
from jaxrm.data.config import DataConfig
from jaxrm.errors import UserError
from jaxrm.evaluation.config import EvaluateConfig, JudgedEvaluationConfig
from jaxrm.inference.chat_endpoint import EndpointCost
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.runtime.metrics import JUDGE_COST, LoggingConfig, is_wall_clock
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import PPO, BestOfN, Evaluate
from jaxrm.stages.best_of_n import run as best_of_n
from jaxrm.stages.evaluate import run as evaluate
from jaxrm.stages.ppo import run as ppo
from jaxrm.stages.rewards import sources

RULE = "Judge this.\n{response}\n{scale}"


def mark(number, question):
    """The judge of these tests: one point a letter, so that responses differ."""
    response = question.partition(">>>\n")[2].rpartition("\n<<<")[0]
    return Reply(f"Score: {sum(map(str.isalpha, response)) % 10}")


@pytest.fixture(scope="module")
def place(make_run, tmp_path_factory):
    """A folder with a policy and a rubric."""
    folder = tmp_path_factory.mktemp("endpoint")
    make_run(folder / "sft")
    (folder / "rubric.txt").write_text(RULE)
    return folder


@pytest.fixture
def server():
    with serving(ChatServer(reply=mark, key="sk-secret")) as running:
        yield running


@pytest.fixture
def endpoint(server, tmp_path, monkeypatch):
    """The section of that judge, with some of its fields changed."""
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")

    def section(**changes):
        config = EndpointConfig(
            url=server.url,
            model="judge",
            rubric="rubric.txt",
            answer="0..9",
            api_key_variable="JUDGE_KEY",
            retries=1,
            retry_seconds=0.01,
            cache=str(tmp_path / "cache"),
        )
        return dataclasses.replace(config, **changes)

    return section


@pytest.fixture
def config(place, monkeypatch):
    """A short run of PPO, on one device, since that compiles sooner; the rewards are still to be given."""
    monkeypatch.chdir(place)
    for stage in (ppo, best_of_n, evaluate):
        monkeypatch.setattr(stage, "build_mesh", lambda config: build_mesh(config, jax.devices()[:1]))
    sampling = SamplingConfig(max_new_tokens=6)

    def make(run_dir, **fields):
        data = fields.pop("data", DataConfig(path="task:safety", max_length=64, batch_size=8, max_eval_records=8))
        return PPO(
            run_dir=str(run_dir),
            num_steps=2,
            model=ModelSource(path="sft"),
            data=data,
            rollout=RolloutConfig(sampling=sampling),
            checkpoint=CheckpointConfig(every=1),
            evaluation=JudgedEvaluationConfig(every=2, samples=2, sampling=sampling),
            mesh=MeshConfig(1, 1, 1),
            logging=LoggingConfig(every=1, tensorboard=False, progress=False),
            **fields,
        )

    return make


def judged(section, **fields):
    return RewardConfig(kind="scalar", endpoint=section, calibration_responses=8, **fields)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- runs


@pytest.mark.slow
def test_ppo_is_judged_and_its_cost_is_counted(config, endpoint, server, tmp_path, capsys):
    """A second run of the same config asks nothing, and is the same."""
    assert ppo.run(config(tmp_path / "one", reward=judged(endpoint()))) == 0
    rows, printed = rows_of(tmp_path / "one"), capsys.readouterr().out
    assert f"from judge at {server.url}" in printed
    last = rows[-1]
    assert last["judge_calls"] == len(server.questions) == len(set(server.questions)) > 8
    assert last["judge_prompt_tokens"] == 11 * last["judge_calls"]
    assert [row["judge_questions"] for row in rows] == sorted(row["judge_questions"] for row in rows)
    cost = {line[:17].strip(): line[17:].strip() for line in printed[printed.index("The judge's cost") :].splitlines()}
    assert cost["calls"] == f"{len(server.questions)}" and cost["prompt tokens"] == f"{11 * len(server.questions)}"
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"sk-secret" not in file.read_bytes(), file

    asked = len(server.questions)
    assert ppo.run(config(tmp_path / "two", reward=judged(endpoint()))) == 0
    assert len(server.questions) == asked
    assert rows_of(tmp_path / "two")[-1]["judge_calls"] == 0
    assert not differences(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_judge_that_fails_stops_a_run_that_goes_on(config, endpoint, server, tmp_path):
    """As one of two sources. No answer is paid for twice, and the cost goes on where it was."""
    other = RewardConfig(kind="scalar", function="task:safety", calibration_responses=8)
    made = config(tmp_path / "run", rewards={"rule": other, "helpful": judged(endpoint())})
    server.reply = lambda number, question: mark(number, question) if number < 20 else Reply(status=500)
    with pytest.raises(UserError, match=r"^config\.rewards\.helpful\.endpoint: judge at .*response \d of the batch, '"):
        ppo.run(made)
    server.reply = mark
    changed = {"rewards.helpful.endpoint.retries": 2, "rewards.helpful.endpoint.concurrency": 2}
    assert ppo.run(dicts.with_changes(made, changed)) == 0
    counts = collections.Counter(server.questions[:20]) + collections.Counter(server.questions[20:])
    paid = collections.Counter(server.questions[:20])
    assert all(counts[question] == 1 for question in paid)
    assert rows_of(tmp_path / "run")[-1]["judge_questions/helpful"] >= 16
    with pytest.raises(UserError, match=r"another config: config\.rewards\.helpful\.endpoint\.answer was '0\.\.9'"):
        ppo.run(dicts.with_changes(made, {"rewards.helpful.endpoint.answer": "0..10"}))


@pytest.mark.slow
def test_the_other_stages_with_rewards_are_judged(config, endpoint, server, tmp_path, capsys):
    """Best-of-n and an evaluation; the cost is printed, and answers that are there need no judge."""
    ppo_config = config(tmp_path / "unused", reward=judged(endpoint()))
    shared = {name: getattr(ppo_config, name) for name in ("model", "data", "rollout", "reward", "mesh", "logging")}
    best = BestOfN(
        run_dir=str(tmp_path / "best"), num_steps=1, best_of_n=BestOfNConfig(n=2, keep_truncated=True), **shared
    )
    assert best_of_n.run(best) == 0
    assert "The judge's cost" in capsys.readouterr().out and len(server.questions) > 8
    answered = EvaluateConfig(splits=("heldout",), decodings=("greedy",))
    evaluated = Evaluate(run_dir=str(tmp_path / "evaluated"), evaluate=answered, **shared)
    assert evaluate.run(evaluated) == 0
    assert "The judge's cost" in capsys.readouterr().out
    asked = len(server.questions)
    moved = {"reward.endpoint.url": "http://127.0.0.1:9/v1"}
    for stage, made in ((evaluate, evaluated), (best_of_n, best)):
        assert stage.run(dicts.with_changes(made, moved)) == 0
    assert len(server.questions) == asked


# --- what is refused, before weights are read or a folder is made


@pytest.fixture
def refuse(config, place, tmp_path):
    def run(reward, **fields):
        before = sorted(place.rglob("*"))
        with pytest.raises(UserError) as caught:
            ppo.run(config(tmp_path / "new", reward=reward, **fields))
        assert not (tmp_path / "new").exists() and sorted(place.rglob("*")) == before
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


def test_an_endpoint_that_is_not_there_is_refused(refuse, endpoint):
    with closed_url() as url:
        message = refuse(judged(endpoint(url=url)))
    assert message.startswith(f"config.reward.endpoint.url is '{url}', which cannot be reached: ")
    assert message.endswith("or give another --config.reward.endpoint.url")


def test_a_key_that_the_environment_lacks_is_refused(refuse, endpoint, monkeypatch):
    section = endpoint()
    monkeypatch.delenv("JUDGE_KEY")
    assert refuse(judged(section)).startswith(
        "config.reward.endpoint.api_key_variable is JUDGE_KEY, but the environment"
    )


def test_a_key_that_the_endpoint_refuses_is_refused(refuse, endpoint, monkeypatch):
    section = endpoint()
    monkeypatch.setenv("JUDGE_KEY", "sk-other")
    assert "which refuses the key: status 401, wrong key Bearer ***" in refuse(judged(section))


def test_a_rubric_that_cannot_be_used_is_refused_by_a_run(refuse, endpoint):
    assert refuse(judged(endpoint(rubric="none.txt"))).startswith("config.reward.endpoint.rubric is 'none.txt', which")


def test_prompts_without_the_reference_are_refused(refuse, endpoint, tmp_path):
    (tmp_path / "own.txt").write_text("{response} {reference}")
    message = refuse(judged(endpoint(rubric=str(tmp_path / "own.txt"))))
    assert message.startswith("config.reward.endpoint.reference is 'reference', which the rubric wants, but ")


@pytest.mark.slow
def test_each_response_is_judged_by_its_own_record(config, endpoint, server, tmp_path):
    """Two records of one prompt have other references; there are two responses to each."""
    (tmp_path / "own.txt").write_text("{response} {reference}")
    records = [{"prompt": "how are you ?", "reference": text, "id": text} for text in ("4", "5")]
    file = tmp_path / "two.jsonl"
    file.write_text("".join(f"{json.dumps(record)}\n" for record in 8 * records))
    server.reply = lambda number, question: Reply(f"Score: {references(question)[0]}")
    data = DataConfig(path=str(file), eval_path=str(file), max_length=64, batch_size=8, max_eval_records=2)
    made = config(tmp_path / "run", reward=judged(endpoint(rubric=str(tmp_path / "own.txt")), scale=1.0), data=data)
    made = dicts.with_changes(made, {"rollout.responses_per_prompt": 2})
    assert ppo.run(made) == 0
    assert {text for question in server.questions for text in references(question)} == {"4", "5"}
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [sample["reward"] for sample in samples] == [4, 5] * (len(samples) // 2)
    rewards = [row["reward"] for row in rows_of(tmp_path / "run") if "policy_loss" in row]
    assert len(rewards) == 2 and all(4 <= reward <= 5 for reward in rewards)


def references(question):
    return re.findall(r"<<<BEGIN REFERENCE \w+>>>\n(.*?)\n<<<END", question)


def test_a_rubric_without_a_reference_reads_no_fields(config, endpoint, tmp_path):
    """So records are not numbered, and an edit of another column is no other data."""
    assert not sources.reads_fields(config(tmp_path / "run", reward=judged(endpoint())))
    (tmp_path / "own.txt").write_text("{response} {reference}")
    assert sources.reads_fields(config(tmp_path / "run", reward=judged(endpoint(rubric=str(tmp_path / "own.txt")))))


def test_a_dry_run_does_not_call_the_endpoint(config, endpoint, server, tmp_path):
    with closed_url() as url:
        facts = ppo.inspect(config(tmp_path / "new", reward=judged(endpoint(url=url)))).facts
    assert facts["rewards"] == f"scalar from judge at {url}"
    assert "not called in a dry run" in facts["judge"]
    ppo.inspect(config(tmp_path / "new", reward=judged(endpoint())))
    assert not server.questions


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "rm"}, r"has both model 'rm' and endpoint 'http://judge/v1'; .*endpoint=None; two sources"),
        ({"function": "task:safety"}, r"has both function 'task:safety' and endpoint"),
        ({"kind": "literal"}, r"kind is 'literal'; it must be one of scalar, .*, since \w+\.endpoint reads text"),
        ({"kind": "spans"}, r"kind is 'spans'; it must be one of scalar, .*, since \w+\.endpoint reads text"),
    ],
)
def test_a_section_with_an_endpoint_and_more_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        RewardConfig(**{"kind": "scalar", "endpoint": EndpointConfig(url="http://judge/v1", model="judge"), **fields})


def test_flags_make_the_section():
    config = dicts.with_changes(
        PPO(),
        {"reward.kind": "scalar", "reward.endpoint.url": "http://judge/v1", "reward.endpoint.model": "judge"},
    )
    assert config.reward.endpoint == EndpointConfig(url="http://judge/v1", model="judge")
    assert dicts.from_dict(PPO, json.loads(json.dumps(dicts.to_dict(config)))) == config
    with pytest.raises(UserError, match=r"config\.reward\.endpoint\.model is missing"):
        dicts.with_changes(PPO(), {"reward.kind": "scalar", "reward.endpoint.url": "http://judge/v1"})


def test_a_judge_costs_what_the_moment_says():
    assert is_wall_clock("judge_calls") and is_wall_clock("judge_calls/helpful")
    assert not is_wall_clock("reward/helpful")


def test_rows_have_all_that_is_counted():
    assert tuple(field.name for field in dataclasses.fields(EndpointCost)) == JUDGE_COST
