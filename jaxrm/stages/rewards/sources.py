"""Where the rewards of PPO come from: a trained reward model, or a function of text.

A function is for rewards that a program can verify. It takes a batch, prompts and responses in the same order, and
returns one number for each response, which stands on the response's last token:

    def ends_with_thanks(prompts: list[list[Message]], responses: list[str]) -> list[float]:
        return [1.0 if response.endswith("thanks .") else 0.0 for response in responses]

    python -m jaxrm.train --config=configs/ppo_tiny.py --config.reward.model=None \\
        --config.reward.function=my_rewards:ends_with_thanks --config.reward.kind=scalar

A prompt is its messages (`jaxrm.data.records.Message`); the last one's ``content`` is what was asked. The same
responses must always get the same rewards: several processes each call it, and a resumed run calls it again.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms import scoring
from jaxrm.algorithms.rollout import RewardSource
from jaxrm.data import tasks, templates
from jaxrm.data.pairs import correction_request
from jaxrm.data.records import Message
from jaxrm.data.tokenizer import vocabulary_conflict
from jaxrm.errors import UserError, flag, option
from jaxrm.inference.load import TrainedRewardModel
from jaxrm.inference.token_scores import build_scorer
from jaxrm.ops import reward_scaling, token_rewards
from jaxrm.ops.reward_scaling import Calibration
from jaxrm.ops.token_rewards import Kind, Source
from jaxrm.sharding import partition
from jaxrm.types import ResponseBatch, TokenRewards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RewardFunction = Callable[[list[Sequence[Message]], list[str]], Sequence[float]]
_SHOWN = 60  # characters of a response or a value that a message quotes


def check_reward_model(
    model: TrainedRewardModel,
    kind: Kind,
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    length: int,
    response_length: int,
) -> None:
    """Refuse a reward model that cannot read the policy's tokens, or not as this kind.

    Args:
      model: the reward model.
      kind: of token reward.
      tokenizer: of the policy.
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
    conflict = vocabulary_conflict(model.tokenizer, tokenizer)
    if conflict is None and len(tokenizer) > model.model.config.vocab_size:
        conflict = f"the policy has {len(tokenizer)} tokens and the reward model {model.model.config.vocab_size}"
    if conflict is not None:
        raise UserError(
            f"{option('reward.model')} is {model.name}, whose vocabulary is not that of the policy: {conflict}; token "
            f"rewards need one vocabulary, so train the reward model from the policy, {flag('model.path')}=POLICY_RUN"
        )
    probe = [Message("user", "a")]
    written = [
        templates.encode_prompt(tokenizer, probe, name)
        for tokenizer, name in ((tokenizer, template), (model.tokenizer, model.template))
    ]
    if written[0] != written[1]:
        mended = f"e.g. {flag('data.template')}={model.template}"
        if template == model.template:  # the tokenizers' own, which are not the same
            mended = f"train the reward model from the policy, {flag('model.path')}=POLICY_RUN"
        raise UserError(
            f"{option('data.template')} is {template!r}, but the reward model {model.name} was trained with "
            f"{model.template!r}, which writes a prompt differently; {mended}"
        )
    positions, again = model.model.config.max_position, 0
    if model.is_seq2seq:  # which reads the response twice
        again = len(correction_request(model.tokenizer, model.template, model.config.mapping.instruction))
        again += response_length
    if positions < length + again:
        fits = {"data.max_length": positions - again}
        if positions - again <= response_length:  # no prompt would be left
            free = positions - again + (response_length if model.is_seq2seq else 0)
            fits = {"rollout.sampling.max_new_tokens": max(free // 4, 1), "data.max_length": max(free // 2, 2)}
        typed = " and ".join(f"{flag(field)}={most}" for field, most in fits.items())
        raise UserError(
            f"{option('data.max_length')} is {length} and responses have up to {response_length} tokens, for which the "
            f"reward model {model.name} has to read {length + again} tokens, but it reads {positions}; e.g. {typed}"
        )


def model_source(model: TrainedRewardModel, kind: Kind, mesh: Mesh, *, num_microbatches: int = 1) -> RewardSource:
    """Reward source of a trained reward model of either sort."""
    rows = partition.batch_sharding(mesh)
    step = scoring.build_score_step(
        build_scorer(model, kind, mesh),
        params_sharding=model.model.shardings,
        batch_sharding=rows,
        output_sharding=rows,
        num_microbatches=num_microbatches,
    )

    def source(calibration: Calibration, batch: ResponseBatch, reference_log_probs: jax.Array) -> TokenRewards:
        return step(model.params, calibration, batch, reference_log_probs if kind.needs_reference else None)

    return source


def open_function(name: str) -> RewardFunction:
    """The function that ``config.reward.function`` names.

    Raises:
      UserError: where there is no such module or function.
    """
    if name.startswith(tasks.PREFIX):
        task = name.removeprefix(tasks.PREFIX)
        if task not in tasks.TASKS:
            known = ", ".join(tasks.PREFIX + known for known in tasks.TASKS)
            raise UserError(f"{option('reward.function')} is {name!r}; embedded tasks with a judge are {known}")
        return lambda prompts, responses: [
            tasks.judge(task, prompt, response) for prompt, response in zip(prompts, responses, strict=True)
        ]
    module_name, _, function_name = name.partition(":")
    form = f"required package.module:function, e.g. {flag('reward.function')}=my_rewards:score, or task:safety"
    if not module_name or module_name.startswith(".") or not function_name:
        raise UserError(f"{option('reward.function')} is {name!r}; {form}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise UserError(
            f"{option('reward.function')} is {name!r}, but importing {module_name} raised {type(error).__name__}: "
            f"{error}; "
            f"{form}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(
            f"{option('reward.function')} is {name!r}, but {module_name} has no function {function_name!r}; {form}"
        )
    return function


def function_source(
    name: str,
    function: RewardFunction,
    kind: Kind,
    *,
    messages: Mapping[bytes, Sequence[Message]],
    text: Callable[[np.ndarray], str],
    end_ids: tuple[int, ...],
    mesh: Mesh,
) -> RewardSource:
    """Reward source of a function of text.

    Args:
      name: of the function, for messages.
      function: prompts and responses to one number each.
      kind: ``scalar`` or ``scalar_length_residual``.
      messages: of each prompt, by the bytes of its int32 token ids.
      text: a response's ids as text.
      end_ids: ids that end a response.
      mesh: the devices.

    Returns:
      The source. It raises `UserError` where the function raises, or returns what is not one finite number a response.
    """
    rows = partition.batch_sharding(mesh)
    whole = jax.jit(lambda batch: batch, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def as_rewards(calibration: Calibration, batch: ResponseBatch, scores: jax.Array) -> TokenRewards:
        values = token_rewards.scalar(scores, batch.response_mask)
        return scoring.as_token_rewards(calibration, kind, values, batch.response_mask, batch, end_ids)

    jitted = jax.jit(as_rewards, in_shardings=(None, rows, rows), out_shardings=rows)

    def source(calibration: Calibration, batch: ResponseBatch, reference_log_probs: jax.Array) -> TokenRewards:
        del reference_log_probs
        host = jax.device_get(whole(batch))
        prompts = [
            messages[ids[mask].astype(np.int32).tobytes()]
            for ids, mask in zip(host.prompts, host.prompt_mask, strict=True)
        ]
        responses = [text(ids[mask]) for ids, mask in zip(host.responses, host.response_mask, strict=True)]
        scores = np.asarray(_scores(name, function, prompts, responses), np.float32)
        placed = jax.make_array_from_callback(scores.shape, rows, scores.__getitem__)
        return jitted(calibration, batch, placed)

    return source


def _scores(name: str, function: RewardFunction, prompts: list[Sequence[Message]], responses: list[str]) -> list[float]:
    required = "required one finite number for each response"
    try:
        returned = function(prompts, responses)
        found = list(returned) if isinstance(returned, Iterable) else None
    except Exception as error:  # whatever the user's function raises
        at = _first_failure(function, prompts, responses)
        where = "on the whole batch" if at is None else f"on response {at} of the batch, {responses[at][:_SHOWN]!r}"
        raise UserError(
            f"{option('reward.function')} {name} raised {type(error).__name__}: {error}, {where}; {required}"
        ) from error
    if found is None:
        raise UserError(
            f"{option('reward.function')} {name} returned {_shown(returned)} for {len(responses)} responses; {required}"
        )
    if len(found) != len(responses):
        raise UserError(
            f"{option('reward.function')} {name} returned {len(found)} rewards for {len(responses)} responses; "
            f"{required}"
        )
    for i, score in enumerate(found):
        if not _is_finite(score):
            raise UserError(
                f"{option('reward.function')} {name} returned {_shown(score)} for response {i} of the batch, "
                f"{responses[i][:_SHOWN]!r}; {required}"
            )
    return [float(score) for score in found]


def _is_finite(score: Any) -> bool:
    """Whether it is a number, of Python or an array of no axes, that float32 can hold."""
    if getattr(score, "ndim", 0):
        return False
    try:
        return abs(float(score + 0)) <= float(np.finfo(np.float32).max)  # what is text cannot be added to
    except (TypeError, ValueError, OverflowError):
        return False


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())[:_SHOWN]


def _first_failure(function: RewardFunction, prompts: list[Sequence[Message]], responses: list[str]) -> int | None:
    """Index of the first response that the function cannot take alone; None where it takes each."""
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        try:
            function([prompt], [response])
        except Exception:  # the same one again
            return i
    return None


def calibrate(kind: Kind, rewards: Sequence[TokenRewards], *, scale: Any, center: Any, mesh: Mesh) -> Calibration:
    """Calibration from batches of responses of the SFT policy; the same on every device."""
    copied = NamedSharding(mesh, PartitionSpec())
    whole = jax.jit(
        lambda batches: tuple(jnp.concatenate(x) for x in zip(*batches, strict=True)), out_shardings=(copied, copied)
    )
    values, mask = whole([(batch.values, batch.mask) for batch in rewards])
    fit = jax.jit(
        lambda values, mask: reward_scaling.calibrate(kind, values, mask, scale=scale, center=center),
        out_shardings=copied,
    )
    return fit(values, mask)
