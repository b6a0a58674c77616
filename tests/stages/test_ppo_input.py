"""What the PPO stage answers to mistakes: one line that says where, what and what to type, and nothing is written.

The mistakes are made one at a time in a config that is otherwise good: the same one comes as far as opening its folder.
"""

import ast
import dataclasses
import json
import re
import shutil

import pytest

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import CriticConfig, PPOConfig, RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.config.named_sections import NamedSections
from jaxrm.data.config import DataConfig
from jaxrm.errors import UserError
from jaxrm.evaluation.config import JudgedEvaluationConfig
from jaxrm.inference.weights import identity_of
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.sharding.mesh import MeshConfig
from jaxrm.stage_config import PPO
from jaxrm.stages import stage
from jaxrm.stages.ppo import run as ppo


def swap_two_words(tokenizer_folder):
    """Gives two words of a tokenizer each other's id."""
    file = tokenizer_folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = [word for word in vocabulary if word.isalpha()][10:12]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def place(make_run, small, task_folder, tmp_path_factory):
    """A folder with prompts, runs of a policy and of both sorts of reward model, and spoiled copies of them."""
    folder = tmp_path_factory.mktemp("ppo_input")
    for file, count in (("prompts.jsonl", 60), ("train.jsonl", 30)):
        lines = (task_folder / file).read_text().splitlines(keepends=True)
        (folder / file).write_text("".join(lines[:count]))
    (folder / "foreign.jsonl").write_text("".join(f'{{"prompt": "wash the lamp {i}"}}\n' for i in range(60)))
    for algorithm in ("sft", "seq2seq_rm", "scalar_rm", "dpo"):
        make_run(folder / algorithm, algorithm)
    began_with = {"policy": identity_of(str(folder / "sft"))}
    (folder / "dpo" / "reference_log_probs.json").write_text(json.dumps(began_with))
    make_run(folder / "other_sft", "sft", seed=1)
    record = folder / "other_sft" / "run.json"  # runs are told apart by the second that they were started in
    record.write_text(re.sub(r'"started": "\d{4}', '"started": "2001', record.read_text()))
    make_run(folder / "unsaved", "sft", ())
    make_run(folder / "short", "sft", config=dataclasses.replace(small, max_position=32))
    shutil.copytree(folder / "sft", folder / "other_words")
    swap_two_words(folder / "other_words" / "tokenizer")
    shutil.copytree(folder / "sft", folder / "endless")
    settings = folder / "endless" / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": None}))
    shutil.copytree(folder / "sft", folder / "pipe" / "sft")
    (folder / "pipe" / "pipeline.json").write_text("{}")
    return folder


class OpenedError(Exception):
    """The run's folder would have been opened: nothing is wrong with the config."""


@pytest.fixture
def launch(place, monkeypatch):
    """Launches the stage up to where it opens its folder, with sections or fields of a good config replaced."""

    def opened(*_, **__):
        raise OpenedError

    monkeypatch.chdir(place)
    monkeypatch.setattr(stage, "open_run", opened)

    def run(**changes):
        config = PPO(
            run_dir="new",
            num_steps=1,
            model=ModelSource(path="sft"),
            reward=RewardConfig(model="seq2seq_rm"),
            data=DataConfig(path="prompts.jsonl", max_length=64, batch_size=8, eval_share=0.2),
            rollout=RolloutConfig(sampling=SamplingConfig(max_new_tokens=24)),
            evaluation=JudgedEvaluationConfig(sampling=SamplingConfig(max_new_tokens=24)),
            mesh=MeshConfig(data=4, fsdp=2),
            logging=LoggingConfig(progress=False, tensorboard=False),
        )
        for name, change in changes.items():
            old = getattr(config, name)
            config = dataclasses.replace(
                config, **{name: dataclasses.replace(old, **change) if isinstance(change, dict) else change}
            )
        ppo.run(config)

    return run


@pytest.fixture
def refuse(launch, place):
    def run(**changes):
        before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
        with pytest.raises(UserError) as caught:
            launch(**changes)
        assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
        message = str(caught.value)
        assert "\n" not in message
        return message

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reward": RewardConfig(kind="scalar", model="scalar_rm")},
        {"reward": RewardConfig(kind="scalar", function="task:safety")},
        {"ppo": {"shared_trunk": True}},
        {"rollout": {"responses_per_prompt": 5}, "data": {"batch_size": 40}},
        {"critic": {"path": "scalar_rm"}},
        {"critic": {"path": "sft/checkpoints/best"}},
        {"reward": RewardConfig(kind="scalar", model="scalar_rm"), "critic": {"head": "reward_model"}},
        {"evaluation": {"judge": "task:safety"}},
        {"ptx": DataConfig(path="train.jsonl", max_length=64, batch_size=8)},
    ],
    ids=[
        "seq2seq",
        "scalar",
        "function",
        "shared trunk",
        "responses",
        "critic of RM",
        "critic of SFT",
        "critic's head",
        "judge",
        "ptx",
    ],
)
def test_the_good_configs_come_as_far_as_opening_their_folder(launch, changes):
    with pytest.raises(OpenedError):
        launch(**changes)


# --- rewards


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "seq2seq_rm"}, "config.rewards.score.kind is 'scalar', but config.rewards.score.model"),
        ({"model": "nowhere"}, "config.rewards.score.model is 'nowhere', but nowhere has"),
        ({"function": "a:b"}, "config.rewards.score.function is 'a:b', but importing a"),
        ({"function": "task:math"}, "config.rewards.score.function is 'task:math'; embedded"),
    ],
)
def test_a_mistaken_source_of_a_sum_is_named(refuse, fields, message):
    """The first source is a good one."""
    rewards = {"words": RewardConfig(model="seq2seq_rm"), "score": RewardConfig(kind="scalar", **fields)}
    assert refuse(reward=RewardConfig(), rewards=NamedSections(rewards)).startswith(message)


def test_a_head_speaks_for_one_scalar_source_of_a_sum(launch, refuse):
    score = RewardConfig(kind="scalar", model="scalar_rm")
    rewards = {"score": score, "words": RewardConfig(model="seq2seq_rm"), "idle": dataclasses.replace(score, weight=0)}
    changes = {"reward": RewardConfig(), "critic": {"head": "reward_model"}}
    with pytest.raises(OpenedError):
        launch(**changes, rewards=NamedSections(rewards))
    message = refuse(**changes, rewards=NamedSections(rewards | {"more": score}))
    assert message.startswith("config.critic.head is 'reward_model', but more and score are scalar reward models, of ")
    assert message.endswith("e.g. --config.critic.head=zero")
    rewards["score"] = dataclasses.replace(score, kind="value_difference")
    message = refuse(**changes, rewards=NamedSections(rewards))
    assert "but config.rewards.score.kind is value_difference; required is one scalar reward model" in message


def test_no_reward_at_all_is_refused(refuse):
    message = refuse(reward=RewardConfig(kind="scalar"))
    assert (
        message.startswith("config.reward has no model, function or endpoint") and "--config.reward.model=" in message
    )


def test_a_kind_that_omits_whether_it_is_centered_is_refused(refuse, tmp_path, monkeypatch):
    """In one line that shows the line to type."""
    (tmp_path / "plain_kinds.py").write_text(
        "def doubt(statistics, responses, mask):\n    return statistics.log_probs\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    message = refuse(reward={"kind": "plain_kinds:doubt"})
    assert message.startswith("config.reward.kind is 'plain_kinds:doubt', a function that does not say")
    assert "@jaxrm.reward_kind(is_centered=True)" in message


def test_both_a_reward_model_and_a_function_are_refused():
    with pytest.raises(UserError, match=r"has both model 'rm' and function 'task:safety'; .*function=None"):
        RewardConfig(kind="scalar", model="rm", function="task:safety")


@pytest.mark.parametrize(
    ("reward", "starts", "ends"),
    [
        (
            {"model": "sft"},
            "config.reward.model is 'sft', a run of sft; required a model of seq2seq_rm or scalar_rm or dpo; ",
            "--config.reward.model=runs/quickstart/rm_seq2seq",
        ),
        (
            {"model": "nowhere"},
            "config.reward.model is 'nowhere', but nowhere has no run.json; give the folder of a run, ",
            "",
        ),
        (
            {"model": "seq2seq_rm/checkpoints/7"},
            "config.reward.model is 'seq2seq_rm/checkpoints/7', but the checkpoints of that run are 4, ",
            "and best",
        ),
        (
            {"model": "pipe"},
            "config.reward.model is 'pipe', the folder of a pipeline; give one of its stages: ",
            "--config.reward.model=pipe/STAGE, with STAGE one of sft",
        ),
        (
            {"kind": "scalar"},
            "config.reward.kind is 'scalar', but config.reward.model, seq2seq_rm, step 4, is a seq2seq reward model, ",
            "--config.reward.kind=literal",
        ),
        (
            {"kind": "scalar", "model": None, "function": "task:math"},
            "config.reward.function is 'task:math'; embedded tasks with a judge are ",
            "task:safety, task:summarize, task:dialogue",
        ),
        (
            {"kind": "scalar", "model": None, "function": "no_such_module_here:f"},
            "config.reward.function is 'no_such_module_here:f', but importing no_such_module_here raised ModuleNot",
            "or task:safety",
        ),
    ],
    ids=["SFT run", "nowhere", "no such step", "pipeline", "other sort", "no such task", "no such module"],
)
def test_missing_rewards_or_rewards_of_another_sort_are_refused(refuse, reward, starts, ends):
    message = refuse(reward=reward)
    assert message.startswith(starts) and message.endswith(ends), message


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        (
            "config.reward.function",
            {"reward": RewardConfig(kind="scalar", function="task:safety")},
        ),
        ("config.evaluation.judge", {"evaluation": {"judge": "task:safety"}}),
    ],
)
def test_a_judge_of_other_prompts_is_refused_before_it_is_asked(refuse, field, changes):
    message = refuse(data={"path": "foreign.jsonl"}, **changes)
    assert message.startswith(f"{field} is 'task:safety', but foreign.jsonl:")
    assert message.endswith(
        f"has no prompt of that task; give the task's data, e.g. --config.data.path=task:safety, or --{field}=None"
    )


def test_rows_that_the_reward_model_cannot_read_are_refused(refuse):
    message = refuse(data={"max_length": 250})
    assert message.startswith("config.data.max_length is 250 and responses have up to 24 tokens, for which the reward ")
    assert "but it reads 256; e.g. --config.data.max_length=" in message


# --- policy


@pytest.mark.parametrize(
    ("path", "starts", "has"),
    [
        (
            "seq2seq_rm",
            "config.model.path is 'seq2seq_rm', a run of seq2seq_rm; required a model of sft or ppo or dpo; ",
            "--config.model.path=runs/quickstart/sft",
        ),
        (
            "scalar_rm",
            "config.model.path is 'scalar_rm', a run of scalar_rm; required a model of sft or ppo or dpo; ",
            "--config",
        ),
        (
            "sft/checkpoints/7",
            "config.model.path is 'sft/checkpoints/7', but the checkpoints of that run are 4, ",
            "best",
        ),
        ("unsaved", "config.model.path is 'unsaved', which has no checkpoint yet; wait for one, ", "give another run"),
        (
            "pipe",
            "config.model.path is 'pipe', the folder of a pipeline; give one of its stages: ",
            "--config.model.path=pipe/STAGE, with STAGE one of sft",
        ),
        ("no/where/to/be", "config.model.path is 'no/where/to/be', but there is no model at that place; ", "--config."),
    ],
)
def test_a_policy_that_is_none_or_not_there_is_refused(refuse, path, starts, has):
    message = refuse(model={"path": path})
    assert message.startswith(starts) and has in message, message


def test_a_tokenizer_without_an_end_token_is_refused(refuse):
    message = refuse(model={"path": "endless"}, data={"template": "hh"})
    assert message.startswith("the tokenizer has no end-of-sequence token, so a response could not end; give one that ")
    assert "--config.data.tokenizer=org/name" in message and "--config.data.template=chatml" in message


def test_a_tokenizer_that_is_not_the_policys_is_refused(refuse):
    message = refuse(data={"tokenizer": "other_words/tokenizer"})
    assert message.startswith("the tokenizer other_words/tokenizer is not that of the weights sft: token id ")
    assert message.endswith("--config.data.tokenizer=sft/tokenizer")


def test_a_policy_of_another_vocabulary_is_refused(refuse):
    """It needs the vocabulary of its reward model."""
    message = refuse(model={"path": "other_words"})
    assert message.startswith("config.reward.model is seq2seq_rm, step 4, whose vocabulary is not that of the policy: ")
    assert message.endswith("--config.model.path=POLICY_RUN")


# --- rollouts


@pytest.mark.parametrize(
    ("sampling", "field", "found"),
    [({"temperature": 0.0}, "temperature", "0.0"), ({"top_k": 5}, "top_k", "5"), ({"top_p": 0.9}, "top_p", "0.9")],
)
def test_sampling_from_another_distribution_is_refused(refuse, sampling, field, found):
    """PPO needs samples of the policy's own distribution."""
    message = refuse(rollout=RolloutConfig(sampling=SamplingConfig(max_new_tokens=24, **sampling)))
    assert message.startswith(f"config.rollout.sampling.{field} is {found}, with which tokens are not drawn from the ")
    assert f"--config.rollout.sampling.{field}=" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": {"batch_size": 12}},
            "config.data.batch_size is 12, but the data and fsdp axes of config.mesh have 8 devices; use a multiple of "
            "8, e.g. --config.data.batch_size=16, or give each row to several devices, e.g. --config.mesh.tensor=2",
        ),
        (
            {"ppo": {"num_minibatches": 2}},
            "config.data.batch_size is 8, which does not divide into 2 minibatches of 1 microbatches on 8 devices; use "
            "a multiple of 16, e.g. --config.data.batch_size=16",
        ),
        (
            {"num_microbatches": 2, "data": {"batch_size": 16}, "ppo": {"num_minibatches": 3}},
            "config.data.batch_size is 16, which does not divide into 3 minibatches of 2 microbatches on 8 devices; "
            "use a multiple of 48, e.g. --config.data.batch_size=48",
        ),
        (
            {"rollout": RolloutConfig(sampling=SamplingConfig(max_new_tokens=24), num_microbatches=3)},
            "config.rollout.num_microbatches is 3, which does not divide the rows of a device (config.data.batch_size "
            "8 over 8: 1); use --config.rollout.num_microbatches=1, or a multiple of 24, e.g. "
            "--config.data.batch_size=24",
        ),
        (
            {"rollout": {"responses_per_prompt": 3}},
            "config.data.batch_size is 8, no multiple of config.rollout.responses_per_prompt 3, but prompts lie on the "
            "8 devices of the data and fsdp axes of config.mesh; use a multiple of 24, e.g. "
            "--config.data.batch_size=24",
        ),
        (
            {"rollout": {"responses_per_prompt": 4}, "data": {"batch_size": 16}},
            "config.data.batch_size is 16, config.rollout.responses_per_prompt 4 to each of 4 prompts, but prompts lie "
            "on the 8 devices of the data and fsdp axes of config.mesh; use a multiple of 32, e.g. "
            "--config.data.batch_size=32, or --config.rollout.responses_per_prompt=2",
        ),
        (
            {
                "rollout": {"responses_per_prompt": 2, "num_microbatches": 2, "mesh": MeshConfig()},
                "data": {"batch_size": 16},
            },
            "config.data.batch_size is 16, config.rollout.responses_per_prompt 2 to each of 8 prompts, but prompts lie "
            "on the 8 devices of the data and fsdp axes of config.rollout.mesh x 2 microbatches; use a multiple of 32, "
            "e.g. --config.data.batch_size=32",
        ),
        (
            {"rollout": {"slots": 12, "mesh": MeshConfig()}, "data": {"batch_size": 16}},
            "config.rollout.slots is 12, but slots lie on the 8 devices of the data and fsdp axes of "
            "config.rollout.mesh; use a multiple of 8, e.g. --config.rollout.slots=16",
        ),
        (
            {"rollout": {"slots": 8, "responses_per_prompt": 2, "mesh": MeshConfig()}, "data": {"batch_size": 16}},
            "config.rollout.slots is 8, but slots lie in groups of config.rollout.responses_per_prompt 2 on the 8 "
            "devices of the data and fsdp axes of config.rollout.mesh; use a multiple of 16, e.g. "
            "--config.rollout.slots=16",
        ),
        (
            {"rollout": {"slots": 16}},
            "config.rollout.slots is 16, but a batch has 8 responses (config.data.batch_size); use "
            "--config.rollout.slots=None to write all of them at once",
        ),
        (
            {"rollout": {"slots": 8, "num_microbatches": 2}, "data": {"batch_size": 16}},
            "config.rollout.slots is 8 and config.rollout.num_microbatches is 2, but both say how many responses are "
            "written at once; use --config.rollout.num_microbatches=1, or --config.rollout.slots=None",
        ),
        (
            {"rollout": {"responses_per_prompt": 2}, "data": {"batch_size": 128}},
            "config.data.batch_size is 128, config.rollout.responses_per_prompt 2 to each of 64 prompts, but "
            "'prompts.jsonl' has only 45; give more data, or a smaller --config.data.batch_size",
        ),
        (
            {"data": {"max_length": 24}},
            "config.rollout.sampling.max_new_tokens is 24, but config.data.max_length, prompt and response together, "
            "is 24; e.g. --config.data.max_length=48",
        ),
        (
            {"data": {"max_length": 300}},
            "config.data.max_length is 300, but the model reads at most 256 tokens; e.g. --config.data.max_length=256",
        ),
        (
            {"evaluation": {"sampling": SamplingConfig(max_new_tokens=25)}},
            "config.evaluation.sampling.max_new_tokens is 25, but rows have room for responses of "
            "config.rollout.sampling.max_new_tokens 24; e.g. --config.evaluation.sampling.max_new_tokens=24",
        ),
        (
            {"ptx": DataConfig(path="train.jsonl", max_length=64, batch_size=12)},
            "config.ptx.batch_size is 12, but the data and fsdp axes of config.mesh have 8 devices; use a multiple of "
            "8, e.g. --config.ptx.batch_size=16, or give each row to several devices, e.g. --config.mesh.tensor=2",
        ),
        (
            {"ptx": DataConfig(path="train.jsonl", max_length=300, batch_size=8)},
            "config.ptx.max_length is 300, but the model reads at most 256 tokens; e.g. --config.ptx.max_length=256",
        ),
    ],
    ids=[
        "mesh",
        "minibatches",
        "microbatches",
        "parts of a rollout",
        "no multiple",
        "prompts",
        "parts of prompts",
        "slots on devices",
        "slots in groups",
        "more slots than rows",
        "slots and parts",
        "few prompts",
        "no room",
        "positions",
        "evaluation",
        "ptx batch",
        "ptx length",
    ],
)
def test_sizes_that_do_not_fit_are_answered_with_one_that_does(refuse, changes, message):
    assert refuse(**changes) == message


def test_prompts_that_are_all_too_long_are_refused(refuse):
    message = refuse(data={"max_length": 26})
    assert " prompts are longer than 2 tokens and none is left (first at prompts.jsonl:" in message
    longest = int(re.fullmatch(r".*; e\.g\. --config\.data\.max_length=(\d+)", message)[1])
    assert longest > 26 and " prompts are longer than " not in refuse(data={"max_length": longest, "batch_size": 999})


def test_fewer_prompts_than_a_batch_are_refused(refuse):
    message = refuse(data={"batch_size": 64})
    assert message.startswith("config.data.batch_size is 64, but the ") and "e.g. --config.data.batch_size=" in message


@pytest.mark.parametrize("path", ["absent.jsonl", ""])
def test_data_that_are_not_there_are_named_by_their_own_field(refuse, path):
    assert refuse(data={"path": path}).startswith("config.data.path is ")
    message = refuse(ptx=DataConfig(path=path, max_length=64, batch_size=8))
    assert message.startswith("config.ptx.path is ") and "--config.ptx.path=" in message
    assert "config.data" not in message


# --- a policy of DPO as a source


def test_a_policy_of_dpo_is_a_source_beside_its_reference(launch):
    """Its run knows the policy that it began with, whatever its folder is called here."""
    with pytest.raises(OpenedError):
        launch(reward=RewardConfig(kind="dpo", model="dpo"))


def test_a_policy_of_dpo_from_another_reference_is_refused(refuse, place):
    message = refuse(reward=RewardConfig(kind="dpo", model="dpo"), model={"path": "other_sft"})
    assert message.startswith(
        f"config.reward.model is dpo, step 4, a policy that DPO trained from {place}/sft, step 4, of "
    )
    assert "its log-probs are compared with those of config.model.path, other_sft, step 4, of " in message
    assert message.endswith(f"required is the same; e.g. --config.model.path={place}/sft")


@pytest.mark.parametrize(
    ("reward", "starts"),
    [
        (
            RewardConfig(kind="dpo", model="scalar_rm"),
            "config.reward.kind is 'dpo', but config.reward.model, scalar_rm, step 4, is a scalar reward model, ",
        ),
        (
            RewardConfig(kind="literal", model="dpo"),
            "config.reward.kind is 'literal', but config.reward.model, dpo, step 4, is a dpo reward model, whose kinds "
            "are dpo; e.g. --config.reward.kind=dpo",
        ),
    ],
)
def test_a_kind_is_one_that_the_run_can_give(refuse, reward, starts):
    assert refuse(reward=reward).startswith(starts)


# --- critic


@pytest.mark.parametrize(
    ("path", "starts", "has"),
    [
        (
            "seq2seq_rm",
            "config.critic.path is 'seq2seq_rm', a run of seq2seq_rm; required a model of scalar_rm or sft or ppo or ",
            "--config.critic.path=runs/quickstart/rm_scalar",
        ),
        ("nowhere", "config.critic.path is 'nowhere', but nowhere has no run.json; ", "--config.critic.path=runs/"),
        ("pipe", "config.critic.path is 'pipe', the folder of a pipeline; ", "--config.critic.path=pipe/STAGE"),
        ("sft/checkpoints/7", "config.critic.path is 'sft/checkpoints/7', but the checkpoints of that run are 4", ""),
        (
            "other_words",
            "config.critic.path is other_words, step 4, whose vocabulary is not that of the policy: token id ",
            "--config.critic.path=None",
        ),
        (
            "short",
            "config.data.max_length is 64, but the critic's model, short, step 4, reads at most 32 tokens; ",
            "--config.data.max_length=32",
        ),
    ],
)
def test_a_critic_that_cannot_read_the_responses_is_refused(refuse, path, starts, has):
    message = refuse(critic={"path": path})
    assert message.startswith(starts) and has in message, message


def test_a_critic_of_its_own_beside_a_shared_trunk_is_refused(refuse):
    message = refuse(critic=CriticConfig(path="sft"), ppo={"shared_trunk": True})
    assert message == (
        "config.critic.path is 'sft', but config.ppo.shared_trunk gives the critic the policy's trunk; use "
        "--config.critic.path=None or --config.ppo.shared_trunk=False"
    )


@pytest.mark.parametrize(
    ("changes", "has"),
    [
        (
            {},
            "but the critic starts from the policy, which has no such head; required is one scalar reward model ",
        ),
        ({"ppo": {"shared_trunk": True}}, "but config.ppo.shared_trunk gives the critic the policy's trunk; use "),
        ({"critic": {"path": "sft"}}, "but the critic starts from sft, step 4, a run of sft, which has no head; "),
        (
            {"critic": {"path": "scalar_rm"}},
            "but no source of the rewards is the run of a scalar reward model; required ",
        ),
        (
            {"critic": {"path": "scalar_rm"}, "reward": RewardConfig(kind="scalar", function="task:safety")},
            "but no source of the rewards is the run of a scalar reward model; required ",
        ),
        (
            {"critic": {"path": "scalar_copy"}, "reward": RewardConfig(kind="scalar", model="scalar_rm")},
            "but rewards come from scalar_rm, step 4 and the critic from scalar_copy, step 4; required ",
        ),
    ],
    ids=["no run", "shared", "policy", "kind", "function", "another run"],
)
def test_a_head_that_is_not_that_of_the_rewards_is_refused(refuse, place, changes, has):
    if not (place / "scalar_copy").exists():
        shutil.copytree(place / "scalar_rm", place / "scalar_copy")
    critic = {"path": None, **changes.get("critic", {}), "head": "reward_model"}
    message = refuse(**{**changes, "critic": critic})
    assert message.startswith("config.critic.head is 'reward_model', " + has[:20]) and has in message
    assert "--config.critic.head=zero" in message


# --- advantages


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_a_group_of_one_is_refused(refuse, advantage):
    assert refuse(ppo={"advantage": advantage}, critic=CriticConfig()) == (
        f"config.rollout.responses_per_prompt is 1, but config.ppo.advantage={advantage} compares the responses to a "
        "prompt with each other; give at least 2, e.g. --config.rollout.responses_per_prompt=4"
    )


def test_options_of_a_critic_are_refused_where_there_is_none(refuse):
    critic = CriticConfig(path="sft", optimizer=OptimizerConfig(lr=1e-3))
    assert refuse(ppo={"advantage": "reinforce++"}, critic=critic) == (
        "config.critic.path is 'sft', config.critic.optimizer.lr is 0.001, but config.ppo.advantage=reinforce++ has no "
        "critic; use --config.critic.path=None --config.critic.optimizer.lr=5e-06"
    )


@pytest.mark.parametrize(
    ("advantage", "options", "message"),
    [
        (
            "rloo",
            {"gae_lambda": 0.9},
            "PPOConfig.gae_lambda is 0.9, but PPOConfig.advantage=rloo has no critic; use gae_lambda=0.95 or "
            "advantage='gae'",
        ),
        (
            "reinforce++",
            {"shared_trunk": True},
            "PPOConfig.shared_trunk is True, but PPOConfig.advantage=reinforce++ has no critic; use "
            "shared_trunk=False or advantage='gae'",
        ),
        (
            "rloo",
            {"discount": 0.9},
            "PPOConfig.discount is 0.9, but PPOConfig.advantage=rloo sums rewards without a discount; use "
            "discount=1.0 or advantage='gae'",
        ),
        (
            "grpo",
            {"kl_loss_coef": 0.04},
            "PPOConfig.kl_loss_coef is 0.04, but PPOConfig.advantage=grpo has its KL in the loss, weighed by "
            "PPOConfig.kl_coef, and it would count twice; use kl_loss_coef=0.0 or advantage='gae'",
        ),
        (
            "grpo",
            {"kl_estimator": "k3"},
            "PPOConfig.kl_estimator is 'k3', but PPOConfig.advantage=grpo has its KL in the loss, see "
            "PPOConfig.kl_loss_estimator; use kl_estimator='k1' or advantage='gae'",
        ),
        (
            "grpo",
            {"kl_target": 6.0},
            "PPOConfig.kl_target is 6.0, but PPOConfig.advantage=grpo has its KL in the loss, which no controller "
            "moves; use kl_target=None or advantage='gae'",
        ),
        (
            "gae",
            {"kl_loss_estimator": "k3"},
            "PPOConfig.kl_loss_estimator is 'k3', but the loss has no KL; use kl_loss_coef=0.02 or "
            "kl_loss_estimator=None",
        ),
    ],
)
def test_options_that_an_advantage_lacks_are_refused(advantage, options, message):
    with pytest.raises(UserError) as caught:
        PPOConfig(advantage=advantage, **options)
    assert str(caught.value) == message


# --- fields


@pytest.mark.parametrize(
    ("section", "field", "bad"),
    [
        (PPOConfig, "num_epochs", 0),
        (PPOConfig, "num_minibatches", 0),
        *((PPOConfig, "clip", bad) for bad in (0.0, 1.0, float("nan"))),
        (PPOConfig, "value_clip", 0.0),
        (PPOConfig, "reward_clip", -1.0),
        *((PPOConfig, "discount", bad) for bad in (0.0, 1.1)),
        *((PPOConfig, "gae_lambda", bad) for bad in (-0.1, 1.1, float("nan"))),
        *((PPOConfig, "kl_coef", bad) for bad in (-1.0, float("inf"), float("nan"))),
        (PPOConfig, "kl_estimator", "k4"),
        *((PPOConfig, "kl_target", bad) for bad in (0.0, float("inf"))),
        (PPOConfig, "kl_horizon", 0),
        (PPOConfig, "kl_loss_coef", -0.1),
        (PPOConfig, "advantage", "ppo"),
        (PPOConfig, "loss_aggregation", "mean"),
        *((PPOConfig, "clip_high", bad) for bad in (0.0, 0.1, float("inf"))),
        *((PPOConfig, "missing_end_penalty", bad) for bad in (-1.0, float("inf"))),
        *((PPOConfig, "early_end_penalty", bad) for bad in (-1.0, float("inf"))),
        (PPOConfig, "ptx_coef", float("nan")),
        (PPOConfig, "value_coef", 0.0),
        (RewardConfig, "kind", "liter"),
        *((RewardConfig, "scale", bad) for bad in (0.0, -1.0, float("inf"), float("nan"))),
        (RewardConfig, "center", "moving"),
        *((RewardConfig, "center_momentum", bad) for bad in (-0.1, 1.0)),
        (RewardConfig, "calibration_responses", 1),
    ],
)
def test_a_field_out_of_range_is_named_with_a_value_in_range(section, field, bad):
    with pytest.raises(UserError) as caught:
        section(**{field: bad})
    message = str(caught.value)
    assert message.startswith((f"{section.__name__}.{field} is {bad!r}; ", f"{section.__name__}.{field} is {bad}; "))
    section(**{field: ast.literal_eval(message.rpartition(f", e.g. {field}=")[2])})


def test_fields_that_contradict_each_other_are_refused():
    with pytest.raises(
        UserError, match=r"^PPOConfig.kl_coef is 0.*; it must be above 0, since the controller of .*kl_coef=0.02$"
    ):
        PPOConfig(kl_coef=0.0, kl_target=6.0)
    with pytest.raises(
        UserError, match=r"^RewardConfig.kind is 'literal'; it must be one of scalar, .*spans, .*kind='scalar'$"
    ):
        RewardConfig(function="task:safety")
