"""Where the rewards of PPO come from: a reward model of a run or the hub, a function, a judge, or a sum of several.

Each is a `jaxrm.algorithms.rollout.RewardSource`: calibration, responses and reference log-probs to token rewards
``r_t``. Of a reward model that is one jitted step, `jaxrm.algorithms.scoring.build_scorer`. What a section of the
config says is found by `origin_of`, at the end of this file.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrm.algorithms import scoring
from jaxrm.algorithms.reward_config import RewardConfig, has_rewards, naming_source, sources_of
from jaxrm.algorithms.rollout import RewardSource
from jaxrm.data import tasks
from jaxrm.data.prompts import PromptExample
from jaxrm.data.responses import Response
from jaxrm.data.template_comparison import write_alike
from jaxrm.data.tokenizer import Vocabulary, unreadable_by
from jaxrm.errors import UserError, flag, naming, option
from jaxrm.inference import parameters, sharded_model
from jaxrm.inference.endpoint_scorer import EndpointScorer
from jaxrm.inference.load import describe_reward_model, load_reward_model
from jaxrm.inference.reward_model import RewardModel
from jaxrm.inference.token_scores import build_scorer
from jaxrm.inference.weights import RunCheckpoint, as_stored, find_checkpoint, identity_of
from jaxrm.models.build import ModelSource
from jaxrm.models.hub import ClassifierParams
from jaxrm.ops import token_rewards
from jaxrm.ops.reward_scaling import Calibration
from jaxrm.ops.token_rewards import Kind, find_kind
from jaxrm.sharding import partition
from jaxrm.stage_config import PPO, REWARD_MODELS, BestOfN, Evaluate
from jaxrm.stages.inputs.prompts import check_judgeable
from jaxrm.stages.rewards import classifier
from jaxrm.stages.rewards.dpo import check_began_with_reference
from jaxrm.stages.rewards.function_call import open_function
from jaxrm.stages.rewards.functions import check_scorer, open_scorer
from jaxrm.stages.rewards.summed import SummedRewards
from jaxrm.stages.rewards.text import TextRewards, check_fields_agree
from jaxrm.types import ResponseBatch, TokenRewards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Scored:
    """What a source is to score.

    Attributes:
      config: of the stage.
      mesh: the devices.
      policy: what the policy's token ids mean.
      examples: every prompt whose responses it will score.
    """

    config: PPO | BestOfN | Evaluate
    mesh: Mesh
    policy: Vocabulary
    examples: Sequence[PromptExample]


@dataclass(frozen=True)
class Responses(Scored):
    """The same, with what reads a response.

    Attributes:
      text: a response's ids as text.
      end_ids: ids that end the policy's responses.
      models: reward models that are open, by path: two sources of one model share its weights.
      classifiers: weights of classifiers that are open, by how they are computed, likewise.
    """

    text: Callable[[np.ndarray], Response]
    end_ids: tuple[int, ...]
    models: dict[str, RewardModel]
    classifiers: dict[ModelSource, ClassifierParams]


class Origin(NamedTuple):
    """What a source of rewards is: a row of the table at the end of this file.

    Each function takes the source's section, whose fields messages call ``reward.…`` (see `naming_source`).

    Attributes:
      check_config: refuses what the section alone shows to be wrong.
      check: refuses a source that cannot score the policy's responses, before weights are read; its name for people.
      open: the source.
    """

    check_config: Callable[[RewardConfig], None]
    check: Callable[[RewardConfig, Scored], str]
    open: Callable[[RewardConfig, Responses], RewardSource]


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
    return identity_of(str(source.model or source.function)) if source.endpoint is None else _judge(source).identity


def are_terminal(config: PPO) -> bool:
    """Whether every source that adds to the sum rewards a response as a whole, on its last token."""
    added = (source for source in sources_of(config).values() if source.weight != 0)
    return all(find_kind(source.kind).reads == "response" for source in added)


def first_scalar_run(config: PPO) -> RunCheckpoint | None:
    """The run of a scalar reward model that is the first source with a weight, in the order of their names."""
    for name, source in sorted(sources_of(config).items()):
        if source.weight == 0 or origin_of(source) is not MODEL_RUN:
            continue
        with naming_source(config, name):
            run = find_checkpoint(str(source.model), "reward.model", REWARD_MODELS)
        if run.config.algorithm == "scalar_rm":
            return run
    return None


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
    check_scorer(source, scored.examples)
    return name


def open_function_rewards(source: RewardConfig, responses: Responses) -> RewardSource:
    """Rewards of a function of text."""
    return TextRewards(
        open_scorer(source, responses.policy.tokenizer, responses.end_ids),
        find_kind(source.kind),
        examples=responses.examples,
        text=responses.text,
        end_ids=responses.end_ids,
        mesh=responses.mesh,
    )


def check_run(source: RewardConfig, scored: Scored) -> str:
    """Refuse a reward model's run that cannot read the policy's tokens, or not as the kind; its name."""
    config, path = scored.config, str(source.model)
    find_checkpoint(path, "reward.model", REWARD_MODELS)  # published weights are no reward model
    with naming({"path": option("reward.model")}):
        model = describe_reward_model(
            path, mesh=scored.mesh, dtype=config.model.dtype, attention=config.model.attention
        )
    length, response_length = config.data.max_length, config.rollout.sampling.max_new_tokens
    kind = find_kind(source.kind)
    check_reward_model(model, kind, scored.policy, config.data.template, length, response_length)
    if kind.needs == "dpo":
        check_began_with_reference(find_checkpoint(path, "reward.model"), config)
    return model.name


def open_judge(source: RewardConfig, responses: Responses) -> RewardSource:
    """Rewards of a judge behind an endpoint."""
    return TextRewards(
        _judge(source),
        find_kind(source.kind),
        examples=responses.examples,
        text=responses.text,
        end_ids=responses.end_ids,
        mesh=responses.mesh,
    )


def check_endpoint(source: RewardConfig, scored: Scored) -> str:
    """Refuse prompts without the reference that the judge's rubric wants; the name of the judge, which is not asked."""
    judge = _judge(source)
    judge.check_references(scored.examples)
    if judge.reference_column is not None:
        check_fields_agree(option("reward.endpoint"), scored.examples, judge.reference_column)
    return judge.name


def _check_judge_config(source: RewardConfig) -> None:
    _judge(source)


def _judge(source: RewardConfig) -> EndpointScorer:
    assert source.endpoint is not None
    return EndpointScorer(source.endpoint, "reward.endpoint")


def open_run(source: RewardConfig, responses: Responses) -> RewardSource:
    """Rewards of a reward model's run."""
    config, mesh, path = responses.config, responses.mesh, str(source.model)
    if path not in responses.models:
        with naming({"path": option("reward.model")}):
            run, quantize = find_checkpoint(path, "reward.model"), None
            if run.lora.is_on and parameters.stands_on_base_of(run, config.model, config.seed) is not False:
                quantize = as_stored(config.model).quantize  # so that it is the policy's base
            model = load_reward_model(
                path, mesh=mesh, dtype=config.model.dtype, attention=config.model.attention, quantize=quantize
            )
        assert isinstance(model, RewardModel), model  # of a run, not a classifier
        params = sharded_model.in_compute_dtype(model.params, config.model.dtype)
        responses.models[path] = dataclasses.replace(model, params=params)
    return ModelRewards(
        responses.models[path],
        find_kind(source.kind),
        mesh,
        num_microbatches=config.num_microbatches,
        end_ids=responses.end_ids,
        temperature=config.rollout.sampling.temperature or 1.0,
    )


class ModelRewards:
    """Reward source of a trained reward model of any sort.

    Args:
      model: the reward model.
      kind: of token reward.
      mesh: the devices.
      num_microbatches: shares of the rows, one after another.
      end_ids: ids that end the policy's responses; None for those of the reward model.
      temperature: of sampling, see `jaxrm.algorithms.scoring.build_scorer`.
    """

    def __init__(
        self,
        model: RewardModel,
        kind: Kind,
        mesh: Mesh,
        *,
        num_microbatches: int = 1,
        end_ids: tuple[int, ...] | None = None,
        temperature: float = 1.0,
    ) -> None:
        self._params, self._kind = model.params, kind
        rows = partition.batch_sharding(mesh)
        self._score = scoring.build_score_step(
            build_scorer(model, kind, end_ids, temperature=temperature),
            params_sharding=model.model.shardings,
            batch_sharding=rows,
            output_sharding=rows,
            num_microbatches=num_microbatches,
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the kind does."""
        return self._kind.needs_reference

    def __call__(
        self, calibration: Calibration, batch: ResponseBatch, reference_log_probs: jax.Array | None
    ) -> TokenRewards:
        """Score responses."""
        # Log-probs that the kind does not read would be an argument more, and so another program.
        reference = reference_log_probs if self._kind.needs_reference else None
        return self._score(self._params, calibration, batch, reference)


def check_reward_model(
    model: RewardModel,
    kind: Kind,
    policy: Vocabulary,
    template: str,
    length: int,
    response_length: int,
) -> None:
    """Refuse a reward model that cannot read the policy's tokens, or not as this kind.

    Args:
      model: the reward model.
      kind: of token reward.
      policy: what the policy's token ids mean.
      template: of the policy.
      length: most tokens of a prompt and its response.
      response_length: most tokens of the response.

    Raises:
      UserError: another vocabulary, another chat template, a kind of the other sort, or too few positions.
    """
    sort = model.sort
    if kind.needs != sort:
        kinds = token_rewards.names_for(sort)
        raise UserError(
            f"{option('reward.kind')} is {kind.name!r}, but {option('reward.model')}, {model.name}, is a {sort} reward "
            f"model, whose "
            f"kinds are {', '.join(kinds)}; e.g. {flag('reward.kind')}={kinds[0]}"
        )
    _check_vocabulary(model, policy)
    _check_template(model, policy.tokenizer, template)
    _check_length(model, length, response_length)


def _check_vocabulary(model: RewardModel, policy: Vocabulary) -> None:
    conflict = unreadable_by(model.vocabulary._replace(name="the reward model"), policy)
    if conflict is not None:
        raise UserError(
            f"{option('reward.model')} is {model.name}, whose vocabulary is not that of the policy: {conflict}; token "
            f"rewards need one vocabulary, so train the reward model from the policy, {flag('model.path')}=POLICY_RUN"
        )


def _check_template(model: RewardModel, tokenizer: "PreTrainedTokenizerBase", template: str) -> None:
    if not write_alike((tokenizer, template), (model.tokenizer, model.template)):
        remedy = f"e.g. {flag('data.template')}={model.template}"
        if template == model.template:  # the tokenizers' own, which are not the same
            remedy = f"train the reward model from the policy, {flag('model.path')}=POLICY_RUN"
        raise UserError(
            f"{option('data.template')} is {template!r}, but the reward model {model.name} was trained with "
            f"{model.template!r}, which writes a prompt differently; {remedy}"
        )


def _check_length(model: RewardModel, length: int, response_length: int) -> None:
    positions, extra = model.model.config.max_position, 0
    if model.is_seq2seq:  # it reads a request, and the response once more
        extra = len(model.request) + response_length
    if positions < length + extra:
        fitting = {"data.max_length": positions - extra}
        if positions - extra <= response_length:  # no prompt would be left
            free = positions - extra + (response_length if model.is_seq2seq else 0)
            fitting = {"rollout.sampling.max_new_tokens": max(free // 4, 1), "data.max_length": max(free // 2, 2)}
        example = " and ".join(f"{flag(field)}={most}" for field, most in fitting.items())
        raise UserError(
            f"{option('data.max_length')} is {length} and responses have up to {response_length} tokens, for which the "
            f"reward model {model.name} has to read {length + extra} tokens, but it reads {positions}; e.g. {example}"
        )


# --- what a source is


FUNCTION = Origin(_check_named_function, check_function, open_function_rewards)
JUDGE = Origin(_check_judge_config, check_endpoint, open_judge)
MODEL_RUN = Origin(lambda source: None, check_run, open_run)
CLASSIFIER = Origin(lambda source: None, classifier.check_classifier, classifier.open_classifier_rewards)


def origin_of(source: RewardConfig) -> Origin:
    """What a source of rewards is, by what its section gives."""
    if source.function is not None:
        return FUNCTION
    if source.endpoint is not None:
        return JUDGE
    return CLASSIFIER if classifier.names_classifier(str(source.model)) else MODEL_RUN
