"""Rewards from a function of text, for those that a program can verify.

It takes a batch, prompts and responses in the same order, and returns one number for each response:

    def ends_with_thanks(prompts: list[list[Message]], responses: list[str]) -> list[float]:
        return [1.0 if response.endswith("thanks .") else 0.0 for response in responses]

    python -m jaxrm.train --config=configs/ppo_tiny.py --config.reward.model=None \\
        --config.reward.function=my_rewards:ends_with_thanks --config.reward.kind=scalar

A prompt is its messages (`jaxrm.data.records.Message`); the last one's ``content`` is the question. A response is text
without special tokens and without white space around it. What was drawn is there too: ``response.raw`` is the text with
them, so that a format of special tokens such as ``<answer>`` can be rewarded; ``response.ended`` says whether the end
was reached, and ``response.token_ids`` are its ids (`jaxrm.inference.sampler.Response`).

    def has_answer(prompts: list[list[Message]], responses: list[Response]) -> list[float]:
        return [1.0 if "<answer>" in response.raw else 0.0 for response in responses]

The same responses must always get the same rewards: several processes each call it, and a resumed run calls it again.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms import scoring
from jaxrm.data import tasks
from jaxrm.data.records import Message
from jaxrm.errors import UserError, flag, option
from jaxrm.ops.reward_scaling import Calibration
from jaxrm.ops.token_rewards import Kind
from jaxrm.sharding import partition
from jaxrm.types import ResponseBatch, TokenRewards

RewardFunction = Callable[[list[Sequence[Message]], list[str]], Sequence[float]]
_SHOWN = 60  # characters of a response or a value that a message quotes


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


class FunctionRewards:
    """Reward source of a function of text. Its number for a response becomes the reward of the last token.

    A call raises `UserError` where the function raises, or returns anything but one finite number a response.

    Args:
      name: of the function, for messages.
      function: prompts and responses to one number each.
      kind: that a function can give: ``scalar`` or ``scalar_length_residual``.
      messages: of each prompt, by the bytes of its int32 token ids.
      text: a response's ids as text, a `jaxrm.inference.sampler.Response`.
      end_ids: ids that end a response.
      mesh: the devices.
    """

    def __init__(
        self,
        name: str,
        function: RewardFunction,
        kind: Kind,
        *,
        messages: Mapping[bytes, Sequence[Message]],
        text: Callable[[np.ndarray], str],
        end_ids: tuple[int, ...],
        mesh: Mesh,
    ) -> None:
        self._name, self._function, self._messages, self._text = name, function, messages, text
        self._rows = partition.batch_sharding(mesh)
        self._replicate = jax.jit(lambda batch: batch, out_shardings=NamedSharding(mesh, PartitionSpec()))

        def as_rewards(calibration: Calibration, batch: ResponseBatch, scores: jax.Array) -> TokenRewards:
            values = kind.values(scores, batch.responses, batch.response_mask, None)
            return scoring.as_token_rewards(calibration, kind, values, batch.response_mask, batch, end_ids)

        self._as_rewards = jax.jit(as_rewards, in_shardings=(None, self._rows, self._rows), out_shardings=self._rows)

    def __call__(
        self, calibration: Calibration, batch: ResponseBatch, reference_log_probs: jax.Array | None
    ) -> TokenRewards:
        """Score responses; the reference's log-probs are not read."""
        del reference_log_probs
        host = jax.device_get(self._replicate(batch))
        prompts = [
            self._messages[ids[mask].astype(np.int32).tobytes()]
            for ids, mask in zip(host.prompts, host.prompt_mask, strict=True)
        ]
        responses = [self._text(ids[mask]) for ids, mask in zip(host.responses, host.response_mask, strict=True)]
        scores = np.asarray(_scores(self._name, self._function, prompts, responses), np.float32)
        on_devices = jax.make_array_from_callback(scores.shape, self._rows, scores.__getitem__)
        return self._as_rewards(calibration, batch, on_devices)


def _scores(name: str, function: RewardFunction, prompts: list[Sequence[Message]], responses: list[str]) -> list[float]:
    required = "required one finite number for each response"
    try:
        returned = function(prompts, responses)
        scores = list(returned) if isinstance(returned, Iterable) else None
    except Exception as error:  # whatever the user's function raises
        at = _first_failure(function, prompts, responses)
        where = "on the whole batch" if at is None else f"on response {at} of the batch, {responses[at][:_SHOWN]!r}"
        raise UserError(
            f"{option('reward.function')} {name} raised {type(error).__name__}: {error}, {where}; {required}"
        ) from error
    if scores is None:
        raise UserError(
            f"{option('reward.function')} {name} returned {_shown(returned)} for {len(responses)} responses; {required}"
        )
    if len(scores) != len(responses):
        raise UserError(
            f"{option('reward.function')} {name} returned {len(scores)} rewards for {len(responses)} responses; "
            f"{required}"
        )
    for i, score in enumerate(scores):
        if not _is_finite(score):
            raise UserError(
                f"{option('reward.function')} {name} returned {_shown(score)} for response {i} of the batch, "
                f"{responses[i][:_SHOWN]!r}; {required}"
            )
    return [float(score) for score in scores]


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
