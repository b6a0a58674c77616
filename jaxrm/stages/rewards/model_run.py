"""Rewards of a reward model's run: whether it can read the policy's tokens, and its jitted scoring step."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from jaxrm.algorithms import scoring
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.algorithms.rollout import RewardSource
from jaxrm.data.template_comparison import write_alike
from jaxrm.data.tokenizer import Vocabulary, unreadable_by
from jaxrm.errors import UserError, flag, naming, option
from jaxrm.inference import parameters, sharded_model
from jaxrm.inference.load import describe_reward_model, load_reward_model
from jaxrm.inference.reward_model import RewardModel
from jaxrm.inference.run_checkpoint import find_checkpoint
from jaxrm.inference.token_scores import scorer_options
from jaxrm.inference.weights import as_stored
from jaxrm.ops import reward_kinds
from jaxrm.ops.reward_kinds import Kind, find_kind
from jaxrm.ops.reward_scaling import Calibration
from jaxrm.sharding import partition
from jaxrm.stage_config import REWARD_MODELS
from jaxrm.stages.rewards.dpo import check_began_with_reference
from jaxrm.stages.rewards.scored import Responses, Scored
from jaxrm.types import ResponseBatch, TokenRewards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Calibrations by name of the source, responses and reference log-probs to token rewards by name.
Scores = Callable[[Mapping[str, Calibration], ResponseBatch, jax.Array | None], dict[str, TokenRewards]]


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
        self.model, self.kind = model, kind
        self._mesh, self._num_microbatches = mesh, num_microbatches
        self._end_ids, self._temperature = end_ids, temperature
        self._scores = self.scores_of({"": kind})

    @property
    def needs_reference(self) -> bool:
        """Whether the kind does."""
        return self.kind.needs_reference

    def __call__(
        self, calibration: Calibration, batch: ResponseBatch, reference_log_probs: jax.Array | None
    ) -> TokenRewards:
        """Score responses."""
        return self._scores({"": calibration}, batch, reference_log_probs)[""]

    def scores_of(self, kinds: Mapping[str, Kind]) -> Scores:
        """Token rewards of several kinds from one reading of the model, which is that of them all."""
        rows = partition.batch_sharding(self._mesh)
        options = scorer_options(self.model, self._end_ids)
        step = scoring.build_score_step(
            scoring.build_joint_scorer(kinds, self.model.model.graphdef, **options, temperature=self._temperature),
            params_sharding=self.model.model.shardings,
            batch_sharding=rows,
            output_sharding=rows,
            num_microbatches=self._num_microbatches,
        )
        reads_reference = any(kind.needs_reference for kind in kinds.values())

        def score(calibrations: Mapping[str, Calibration], batch: ResponseBatch, reference: Any) -> Any:
            # Log-probs that no kind reads would be an argument more, and so another program.
            own = {name: calibrations[name] for name in kinds}
            return step(self.model.params, own, batch, reference if reads_reference else None)

        return score


def shared_readings(sources: Mapping[str, RewardSource]) -> list[Scores]:
    """Token rewards of sources that have a model in common, of which one reading serves all.

    A kind that has the model write a correction reads other rows, so it is none of them.
    """
    by_model: dict[int, dict[str, ModelRewards]] = {}
    for name, source in sources.items():
        if isinstance(source, ModelRewards) and not source.kind.needs_correction:
            by_model.setdefault(id(source.model), {})[name] = source
    return [
        next(iter(same.values())).scores_of({name: source.kind for name, source in same.items()})
        for same in by_model.values()
        if len(same) > 1
    ]


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
        kinds = reward_kinds.names_for(sort)
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
