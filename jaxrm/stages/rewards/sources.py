"""Where the rewards of PPO come from: a trained reward model, or a function of text.

Either is a `jaxrm.algorithms.rollout.RewardSource`: calibration, responses and reference log-probs to token rewards
``r_t``. Of a reward model that is one jitted step, `jaxrm.algorithms.scoring.build_scorer`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrm.algorithms import scoring
from jaxrm.algorithms.rollout import RewardSource
from jaxrm.data import tasks
from jaxrm.data.prompts import PromptExample
from jaxrm.data.responses import Response
from jaxrm.data.template_comparison import write_alike
from jaxrm.data.tokenizer import Vocabulary, unreadable_by
from jaxrm.errors import UserError, flag, naming, option
from jaxrm.inference import parameters, sharded_model
from jaxrm.inference.load import describe_reward_model, load_reward_model
from jaxrm.inference.reward_model import RewardModel
from jaxrm.inference.token_scores import build_scorer
from jaxrm.inference.weights import as_stored, find_checkpoint
from jaxrm.ops import token_rewards
from jaxrm.ops.reward_scaling import Calibration
from jaxrm.ops.token_rewards import Kind, Source, find_kind
from jaxrm.sharding import partition
from jaxrm.stage_config import PPO, REWARD_MODELS, BestOfN, Evaluate
from jaxrm.stages.inputs.prompts import check_judgeable
from jaxrm.stages.rewards.functions import check_scorer, open_scorer
from jaxrm.stages.rewards.text import TextRewards
from jaxrm.types import ResponseBatch, TokenRewards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_rewards(
    config: PPO | BestOfN | Evaluate,
    mesh: Mesh,
    policy: Vocabulary,
    examples: Sequence[PromptExample],
    text: Callable[[np.ndarray], Response],
    end_ids: tuple[int, ...],
) -> tuple[RewardSource, str]:
    """The reward model or function of ``config.reward`` as a source of token rewards, and its name for people.

    Args:
      config: the whole config.
      mesh: the devices.
      policy: what the policy's token ids mean.
      examples: every prompt whose responses it will score.
      text: a response's ids as text.
      end_ids: ids that end the policy's responses.

    Raises:
      UserError: where there is none, or it cannot score the policy's responses to these prompts.
    """
    name = check_rewards(config, mesh, policy, examples)
    kind = find_kind(config.reward.kind)
    if config.reward.model is None:
        scorer = open_scorer(config.reward, policy.tokenizer, end_ids)
        return TextRewards(scorer, kind, examples=examples, text=text, end_ids=end_ids, mesh=mesh), name
    with naming({"path": option("reward.model")}):
        run, quantize = find_checkpoint(config.reward.model, "reward.model"), None
        if run.lora.is_on and parameters.stands_on_base_of(run, config.model, config.seed) is not False:
            quantize = as_stored(config.model).quantize  # so that it is the policy's base
        model = load_reward_model(
            config.reward.model,
            mesh=mesh,
            dtype=config.model.dtype,
            attention=config.model.attention,
            quantize=quantize,
        )
        assert isinstance(model, RewardModel), model  # of a run, not a classifier
    frozen = dataclasses.replace(model, params=sharded_model.in_compute_dtype(model.params, config.model.dtype))
    return ModelRewards(frozen, kind, mesh, num_microbatches=config.num_microbatches, end_ids=end_ids), name


def check_rewards(
    config: PPO | BestOfN | Evaluate,
    mesh: Mesh,
    policy: Vocabulary,
    examples: Sequence[PromptExample],
) -> str:
    """Refuse a source of rewards that cannot score the policy's responses; no weights are read.

    Returns:
      Its name for people.

    Raises:
      UserError: as for `open_rewards`, whose arguments these are.
    """
    kind = find_kind(config.reward.kind)
    if config.reward.model is None:
        name = str(config.reward.function)
        if name.startswith(tasks.PREFIX):
            check_judgeable(examples, name, "reward.function")
        check_scorer(config.reward, examples)
        return name
    find_checkpoint(config.reward.model, "reward.model", REWARD_MODELS)  # published weights are no reward model
    with naming({"path": option("reward.model")}):
        model = describe_reward_model(
            config.reward.model, mesh=mesh, dtype=config.model.dtype, attention=config.model.attention
        )
    length, response_length = config.data.max_length, config.rollout.sampling.max_new_tokens
    check_reward_model(model, kind, policy, config.data.template, length, response_length)
    return model.name


class ModelRewards:
    """Reward source of a trained reward model of either sort.

    Args:
      model: the reward model.
      kind: of token reward.
      mesh: the devices.
      num_microbatches: shares of the rows, one after another.
      end_ids: ids that end the policy's responses; None for those of the reward model.
    """

    def __init__(
        self,
        model: RewardModel,
        kind: Kind,
        mesh: Mesh,
        *,
        num_microbatches: int = 1,
        end_ids: tuple[int, ...] | None = None,
    ) -> None:
        self._params, self._kind = model.params, kind
        rows = partition.batch_sharding(mesh)
        self._score = scoring.build_score_step(
            build_scorer(model, kind, end_ids),
            params_sharding=model.model.shardings,
            batch_sharding=rows,
            output_sharding=rows,
            num_microbatches=num_microbatches,
        )

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
    sort: Source = "seq2seq" if model.is_seq2seq else "scalar"
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
