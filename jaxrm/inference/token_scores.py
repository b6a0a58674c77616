"""Responses scored token by token by a reward model, and its corrections of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms import reading, scoring
from jaxrm.data import templates
from jaxrm.data.cutting import cut_points
from jaxrm.data.tokenizer import token_texts
from jaxrm.errors import UserError, flag
from jaxrm.inference import sharded_model
from jaxrm.inference.corrections import Corrector, check_room
from jaxrm.inference.encoded_records import EncodedRecord
from jaxrm.inference.policy import Policy
from jaxrm.inference.response_batches import response_batches
from jaxrm.inference.reward_model import RewardModel
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.ops import reward_scaling
from jaxrm.ops.reward_kinds import Kind, find_kind
from jaxrm.runtime.progress import Progress
from jaxrm.sharding import partition
from jaxrm.types import ResponseBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenScores:
    """What a reward model says of one response of T tokens.

    Attributes:
      values: ``[T]`` float32 token rewards before calibration, which belongs to a run of PPO.
      tags: ``[T]`` bool, or None for a reward model that is no seq2seq one, and has none.
    """

    values: np.ndarray
    tags: np.ndarray | None


def score(
    model: RewardModel,
    records: Sequence[EncodedRecord],
    kind: str,
    *,
    batch_size: int,
    reference: Policy | None = None,
    show_progress: bool = True,
) -> list[list[TokenScores]]:
    """Token rewards of every response of every record by one kind; see `score_kinds`."""
    by_kind = score_kinds(
        model, records, [kind], batch_size=batch_size, reference=reference, show_progress=show_progress
    )
    return by_kind[kind]


def score_kinds(
    model: RewardModel,
    records: Sequence[EncodedRecord],
    kinds: Sequence[str],
    *,
    batch_size: int,
    reference: Policy | None = None,
    show_progress: bool = True,
) -> dict[str, list[list[TokenScores]]]:
    """Token rewards of every response of every record, by kind, from one reading.

    Args:
      model: the reward model.
      records: from `encode`.
      kinds: of token reward that this reward model can give; one that has a correction written is alone.
        ``scalar_length_residual`` is fitted on the responses themselves.
      batch_size: responses scored at once.
      reference: policy that ``contrast`` and ``dpo`` compare with.
      show_progress: draw a bar.

    Raises:
      UserError: where a reward is no finite number, which is the parameters' fault.
    """
    mesh = model.model.mesh
    prompts = [record.prompt_ids for record in records for _ in record.responses]
    responses = [ids for record in records for _, _, ids in record.responses]
    sources = [record.source for record in records for _ in record.responses]
    # No longer than the longest response, whatever batch a response is in.
    step = _score_step(model, kinds, max([1, *map(len, responses)]))
    plain = {kind: reward_scaling.uncalibrated() for kind in kinds}
    log_probs = None if reference is None else _reference_log_probs(reference, mesh)
    nothing = TokenScores(np.zeros(0, np.float32), None)
    scores = {kind: [nothing] * len(responses) for kind in kinds}
    V, done = model.model.config.vocab_size, 0
    with Progress("score", len(responses), unit="responses", enabled=show_progress) as progress:
        for batch, indices in response_batches(prompts, responses, batch_size, mesh, vocab_size=V):
            reference_log_probs = None if log_probs is None else log_probs(batch)
            rewards = jax.device_get(step(model.params, plain, batch, reference_log_probs))
            for kind in kinds:
                for row, i in enumerate(indices):
                    own = rewards[kind]
                    values, tags = (array[row, : len(responses[i])] for array in (own.values, own.tags))
                    _check_finite(values, model.name, sources[i])
                    scores[kind][i] = TokenScores(values, tags if model.is_seq2seq else None)
            done += len(indices)
            progress.update(done)
    for kind in kinds:
        if find_kind(kind).removes_length:
            scores[kind] = without_length(scores[kind], find_kind(kind))
    in_order = {kind: iter(values) for kind, values in scores.items()}
    return {kind: [[next(values) for _ in record.responses] for record in records] for kind, values in in_order.items()}


def _score_step(model: RewardModel, kinds: Sequence[str], correction_length: int) -> Callable[..., Any]:
    """The jitted scorer of some kinds, made once for a model."""
    by_name = {name: find_kind(name) for name in kinds}
    writes = any(kind.needs_correction for kind in by_name.values())
    key = tuple(by_name.items()), correction_length if writes else None
    if key not in model.score_steps:
        options = scorer_options(model, None)
        mesh = model.model.mesh
        model.score_steps[key] = scoring.build_score_step(
            scoring.build_joint_scorer(by_name, model.model.graphdef, **options, correction_length=correction_length),
            params_sharding=model.model.shardings,
            batch_sharding=partition.batch_sharding(mesh),
            output_sharding=NamedSharding(mesh, PartitionSpec()),
        )
    return model.score_steps[key]


def _reference_log_probs(reference: Policy, mesh: Mesh) -> Callable[[ResponseBatch], jax.Array]:
    """`policy_log_probs` of a reference policy, made once for it."""
    if mesh not in reference.log_prob_steps:
        reference.log_prob_steps[mesh] = policy_log_probs(reference.model, reference.params, mesh)
    return reference.log_prob_steps[mesh]


def _check_finite(values: np.ndarray, name: str, source: str) -> None:
    if not np.isfinite(values).all():
        raise UserError(
            f"{name} rewards a response of {source} with {values.sum()}, which is no finite number: its parameters are "
            f"spoiled; give an earlier checkpoint, e.g. {flag('path')}=RUN_DIR/checkpoints/best"
        )


def correct(
    model: RewardModel, records: Sequence[EncodedRecord], *, max_new_tokens: int, show_progress: bool = True
) -> list[list[np.ndarray]]:
    """Token ids of the greedy correction of every response of every record."""
    corrector = Corrector(model.model, model.params, model.tokenizer, model.template, model.request, max_new_tokens)
    # Scoring may have cut them for less; a correction is cut from the whole.
    whole = [
        (record.prompt, np.array(templates.encode_prompt(model.tokenizer, record.prompt, model.template), np.int32))
        for record in records
    ]
    points = cut_points(model.tokenizer, model.template, whole)
    cuts = [points[i] for i, record in enumerate(records) for _ in record.responses]
    prompts = [whole[i][1] for i, record in enumerate(records) for _ in record.responses]
    responses = [ids for record in records for _, _, ids in record.responses]
    written = iter(corrector.correct(prompts, responses, points=cuts, show_progress=show_progress))
    return [[next(written) for _ in record.responses] for record in records]


def check_corrections(model: RewardModel, records: Sequence[EncodedRecord], max_new_tokens: int) -> None:
    """Refuse corrections of up to so many tokens where the model cannot write them behind every response."""
    responses = [ids for record in records for _, _, ids in record.responses]
    sources = [record.source for record in records for _ in record.responses]
    check_room(model.model.config, model.request, max_new_tokens, responses, sources, field="max_new_tokens")


class Tokenized(Protocol):
    """A reward model, as far as its tokens are shown: its tokenizer, and the ids that end a response."""

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase": ...  # noqa: D102 - in the class's docstring

    @property
    def end_ids(self) -> tuple[int, ...]: ...  # noqa: D102 - in the class's docstring


def as_record(
    model: Tokenized,
    record: EncodedRecord,
    scores: Sequence[TokenScores],
    corrections: Sequence[np.ndarray] | None,
    kind: str,
    *,
    ended: bool | None = None,
) -> dict[str, Any]:
    """One line of the JSONL, which is also one record of `jaxrm.reports.page` and `jaxrm.reports.notebook`.

    ``ended`` says whether all the responses were finished; None where their last ids say it.
    """
    responses = []
    for i, ((side, text, ids), response_scores) in enumerate(zip(record.responses, scores, strict=True)):
        values = [float(value) for value in response_scores.values]
        wrong = None if response_scores.tags is None else np.flatnonzero(~response_scores.tags)
        responses.append(
            {
                "side": side,
                **_as_text_and_tokens(model, ids),
                **({} if ended is None else {"ended": ended}),
                "text": text,
                "tags": None if response_scores.tags is None else [bool(tag) for tag in response_scores.tags],
                "rewards": values,
                "sum": sum(values),
                "mean": sum(values) / len(values),
                "diverges_at": None if wrong is None or not len(wrong) else int(wrong[0]),
                "correction": None if corrections is None else _as_text_and_tokens(model, corrections[i]),
            }
        )
    sums = [response["sum"] for response in responses]
    is_ranked = len(sums) == 2 and sums[0] != sums[1]  # a tie is neither right nor wrong
    return {
        "source": record.source,
        "prompt": [{"role": message.role, "content": message.content} for message in record.prompt],
        "kind": kind,
        "ranked_right": sums[0] > sums[1] if is_ranked else None,
        "responses": responses,
    }


def text_of(model: Tokenized, token_ids: np.ndarray) -> str:
    """A response or correction as text, without its end token."""
    special = {*model.tokenizer.all_special_ids, *model.end_ids}
    return str(model.tokenizer.decode([int(token) for token in token_ids if int(token) not in special])).strip()


def _as_text_and_tokens(model: Tokenized, token_ids: np.ndarray) -> dict[str, Any]:
    ids = [int(token) for token in token_ids]
    return {
        "text": text_of(model, token_ids),
        "tokens": token_texts(model.tokenizer, ids),
        "token_ids": ids,
        "ended": bool(ids) and ids[-1] in model.end_ids,
    }


def scorer_options(model: RewardModel, end_ids: tuple[int, ...] | None) -> dict[str, Any]:
    """What `jaxrm.algorithms.scoring.build_joint_scorer` has to know of a reward model.

    Args:
      model: the reward model.
      end_ids: tokens that end a response; None for its own.
    """
    return {
        "request": model.request if model.is_seq2seq else (),
        "end_ids": model.end_ids if end_ids is None else end_ids,
        "pad_to_multiple_of": sharded_model.pad_to_multiple_of(model.model.mesh),
    }


def policy_log_probs(
    model: ShardedModel, params: Any, mesh: Mesh, *, whole: bool = False, temperature: float = 1.0
) -> Callable[[ResponseBatch], jax.Array]:
    """Function to the log-probs ``[B, T]`` that a policy gives to responses, 0 outside the mask.

    Args:
      model: the policy's.
      params: its parameters.
      mesh: the devices.
      whole: every device gets all rows, and not its own alone.
      temperature: divides the logits, as it does in sampling.
    """
    multiple, rows = sharded_model.pad_to_multiple_of(mesh), partition.batch_sharding(mesh)

    def log_probs(params: Any, batch: ResponseBatch) -> jax.Array:
        statistics = reading.response_statistics(
            model.graphdef, params, batch, None, pad_to_multiple_of=multiple, temperature=temperature
        )
        return jnp.where(batch.response_mask, statistics.log_probs, 0.0)

    out = NamedSharding(mesh, PartitionSpec()) if whole else rows
    jitted = jax.jit(log_probs, in_shardings=(model.shardings, rows), out_shardings=out)
    return lambda batch: jitted(params, batch)


def without_length(scored: Sequence[TokenScores], kind: Kind) -> list[TokenScores]:
    """The scores, on the last token of each response, less the linear effect of length."""
    T = max(len(response.values) for response in scored)
    values, mask = np.zeros((len(scored), T), np.float32), np.zeros((len(scored), T), bool)
    for row, response in enumerate(scored):
        values[row, : len(response.values)], mask[row, : len(response.values)] = response.values, True
    arrays = jnp.asarray(values), jnp.asarray(mask)
    fitted = reward_scaling.calibrate(kind, *arrays, scale=1.0, center="none")
    rewards = np.asarray(reward_scaling.apply(fitted, kind, *arrays))
    return [TokenScores(rewards[row][mask[row]], None) for row in range(len(scored))]
