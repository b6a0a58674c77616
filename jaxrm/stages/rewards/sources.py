"""Where the rewards of PPO come from: a reward model of a run or the hub, a function, a judge, or a sum of several.

Each is a `jaxrm.algorithms.rollout.RewardSource`: calibration, responses and reference log-probs to token rewards
``r_t``. Of a reward model that is one jitted step, `jaxrm.algorithms.scoring.build_scorer`. What a section of the
config says is found by `origin_of`, at the end of this file.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from jaxrm.algorithms.reward_config import RewardConfig, has_rewards, naming_source, sources_of
from jaxrm.algorithms.rollout import RewardSource
from jaxrm.data import tasks
from jaxrm.data.prompts import PromptExample
from jaxrm.data.responses import Response
from jaxrm.data.tokenizer import Vocabulary
from jaxrm.errors import UserError, flag, option
from jaxrm.inference.endpoint_scorer import EndpointScorer
from jaxrm.inference.run_checkpoint import RunCheckpoint, find_checkpoint
from jaxrm.inference.weights import identity_of
from jaxrm.ops.reward_kinds import find_kind
from jaxrm.stage_config import PPO, REWARD_MODELS, BestOfN, Evaluate
from jaxrm.stages.judge import check_judgeable
from jaxrm.stages.rewards import classifier
from jaxrm.stages.rewards.function_call import identity_of_function, open_function, takes_fields
from jaxrm.stages.rewards.functions import open_scorer
from jaxrm.stages.rewards.model_run import check_run, open_run
from jaxrm.stages.rewards.scored import Origin, Responses, Scored
from jaxrm.stages.rewards.summed import SummedRewards
from jaxrm.stages.rewards.text import open_text_rewards


def check_has_rewards(config: PPO | BestOfN | Evaluate, consequence: str) -> None:
    """Refuse a config without a source of rewards.

    Args:
      config: of the stage.
      consequence: of having none, for the message.

    Raises:
      UserError: where there is no source.
    """
    if not has_rewards(config):
        raise UserError(
            f"{option('reward')} has no model, function or endpoint, so {consequence}; give the run of a reward model, "
            f"e.g. {flag('reward.model')}=runs/quickstart/rm_seq2seq"
        )


def check_origins(config: PPO | BestOfN | Evaluate) -> None:
    """Refuse what the sections of the sources alone show to be wrong.

    Raises:
      UserError: naming the option.
    """
    for name, source in sources_of(config).items():
        with naming_source(config, name):
            origin = origin_of(source)
            if origin is not CLASSIFIER:
                classifier.refuse_options(source)
            origin.check_config(source)


def open_rewards(
    config: PPO | BestOfN | Evaluate,
    mesh: Mesh,
    policy: Vocabulary,
    examples: Sequence[PromptExample],
    text: Callable[[np.ndarray], Response],
    end_ids: tuple[int, ...],
) -> tuple[RewardSource, str]:
    """The source of token rewards that a config names, or the sum of several, and its name for people.

    Args:
      config: of the stage.
      mesh: the devices.
      policy: what the policy's token ids mean.
      examples: every prompt whose responses it will score.
      text: a response's ids as text.
      end_ids: ids that end the policy's responses.

    Raises:
      UserError: where there is none, or it cannot score the policy's responses to these prompts.
    """
    in_words = check_rewards(config, mesh, policy, examples)
    responses = Responses(config, mesh, policy, examples, text, end_ids, {}, {})
    opened, weights = {}, {}
    for name, source in sources_of(config).items():
        with naming_source(config, name):
            opened[name], weights[name] = origin_of(source).open(source, responses), source.weight
    if not config.rewards:
        return next(iter(opened.values())), in_words
    return SummedRewards(opened, weights, end_ids=end_ids, mesh=mesh), in_words


def identities_of(config: PPO | BestOfN | Evaluate) -> list[str]:
    """Which sources of rewards exactly, in the order of their names; see `jaxrm.inference.weights.identity_of`."""
    identities = [(name, identity_of_rewards(source)) for name, source in sorted(sources_of(config).items())]
    return [f"{name} {identity}" if config.rewards else identity for name, identity in identities]


def identity_of_rewards(source: RewardConfig) -> str:
    """Which model, function or judge exactly."""
    return origin_of(source).identity(source)


def reads_fields(config: PPO | BestOfN | Evaluate) -> bool:
    """Whether the rewards of a stage look at the columns of a prompt's record."""
    is_read = False
    for name, source in sources_of(config).items():
        with naming_source(config, name):
            is_read |= source.is_given and origin_of(source).reads_fields(source)
    return is_read


def are_terminal(config: PPO) -> bool:
    """Whether every source that adds to the sum rewards a response as a whole, on its last token."""
    added = (source for source in sources_of(config).values() if source.weight != 0)
    return all(find_kind(source.kind).reads == "response" for source in added)


def scalar_runs(config: PPO) -> dict[str, RunCheckpoint]:
    """The sources that are runs of scalar reward models and have a weight, in the order of their names."""
    runs = {}
    for name, source in sorted(sources_of(config).items()):
        if source.weight == 0 or origin_of(source) is not MODEL_RUN:
            continue
        with naming_source(config, name):
            run = find_checkpoint(str(source.model), "reward.model", REWARD_MODELS)
        if run.config.algorithm == "scalar_rm":
            runs[name] = run
    return runs


def check_rewards(
    config: PPO | BestOfN | Evaluate,
    mesh: Mesh,
    policy: Vocabulary,
    examples: Sequence[PromptExample],
) -> str:
    """Refuse sources of rewards that cannot score the policy's responses; no weights are read.

    Returns:
      Kinds and sources for people, ``literal from runs/rm``.

    Raises:
      UserError: as for `open_rewards`, whose arguments these are.
    """
    scored, names = Scored(config, mesh, policy, examples), []
    for name, source in sources_of(config).items():
        with naming_source(config, name):
            find_kind(source.kind)
            rewards = f"{source.kind} from {origin_of(source).check(source, scored)}"
            names.append(f"{source.weight:g} * {name}, {rewards}" if config.rewards else rewards)
    return "; ".join(names)


def _check_named_function(source: RewardConfig) -> None:
    open_function(str(source.function))


def check_function(source: RewardConfig, scored: Scored) -> str:
    """Refuse an embedded task's judge that cannot judge the prompts; the name of the function."""
    name = str(source.function)
    if name.startswith(tasks.PREFIX):
        check_judgeable(scored.examples, name, "reward.function")
    return name


def open_function_rewards(source: RewardConfig, responses: Responses) -> RewardSource:
    """Rewards of a function of text."""
    return open_text_rewards(open_scorer(source, responses.policy.tokenizer, responses.end_ids), source, responses)


def open_judge(source: RewardConfig, responses: Responses) -> RewardSource:
    """Rewards of a judge behind an endpoint."""
    return open_text_rewards(_judge(source), source, responses)


def check_endpoint(source: RewardConfig, scored: Scored) -> str:
    """Refuse prompts without the reference that the judge's rubric wants; the name of the judge, which is not asked."""
    judge = _judge(source)
    judge.check_references(scored.examples)
    return judge.name


def _check_judge_config(source: RewardConfig) -> None:
    _judge(source)


def _judge(source: RewardConfig) -> EndpointScorer:
    assert source.endpoint is not None
    return EndpointScorer(source.endpoint, "reward.endpoint")


# --- what a source is


FUNCTION = Origin(
    check_config=_check_named_function,
    check=check_function,
    open=open_function_rewards,
    identity=lambda source: identity_of_function(str(source.function)),
    reads_fields=lambda source: takes_fields(open_function(str(source.function))),
)
JUDGE = Origin(
    check_config=_check_judge_config,
    check=check_endpoint,
    open=open_judge,
    identity=lambda source: _judge(source).identity,
    reads_fields=lambda source: _judge(source).reference_column is not None,
)
MODEL_RUN = Origin(
    check_config=lambda source: None,
    check=check_run,
    open=open_run,
    identity=lambda source: identity_of(str(source.model)),
    reads_fields=lambda source: False,
)
CLASSIFIER = MODEL_RUN._replace(check=classifier.check_classifier, open=classifier.open_classifier_rewards)


def origin_of(source: RewardConfig) -> Origin:
    """What a source of rewards is, by what its section gives."""
    if source.function is not None:
        return FUNCTION
    if source.endpoint is not None:
        return JUDGE
    return CLASSIFIER if classifier.names_classifier(str(source.model)) else MODEL_RUN
