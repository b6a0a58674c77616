"""Rewards from a function of text, for those that a program can verify.

It takes a batch, prompts and responses in the same order, and returns one number for each response:

    def ends_with_thanks(prompts: list[list[Message]], responses: list[str]) -> list[float]:
        return [1.0 if response.endswith("thanks .") else 0.0 for response in responses]

    python -m jaxrm.train --config=configs/ppo_tiny.py --config.reward.model=None \\
        --config.reward.function=my_rewards:ends_with_thanks --config.reward.kind=scalar

A prompt is its messages (`jaxrm.data.records.Message`); the last one's ``content`` is the question. A response is text
without special tokens and without white space around it. What was drawn is there too: ``response.raw`` is the text with
them, so that a format of special tokens such as ``<answer>`` can be rewarded; ``response.ended`` says whether the end
was reached, and ``response.token_ids`` are its ids (`jaxrm.data.responses.Response`).

    def has_answer(prompts: list[list[Message]], responses: list[Response]) -> list[float]:
        return [1.0 if "<answer>" in response.raw else 0.0 for response in responses]

The same responses must always get the same rewards, since a resumed run calls it again. In a job of several processes,
process 0 calls it for all of them.
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxrm.data import tasks
from jaxrm.data.records import Message
from jaxrm.data.responses import Response
from jaxrm.errors import UserError, flag, option
from jaxrm.inference.text_scorer import TextSample

RewardFunction = Callable[[list[Sequence[Message]], list[Response]], Sequence[float]]
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


class FunctionScorer:
    """A function of text as a `jaxrm.inference.text_scorer.TextScorer`.

    Args:
      name: of the function, for messages.
      function: prompts and responses to one number each.
    """

    is_collective = False

    def __init__(self, name: str, function: RewardFunction) -> None:
        self.name, self._function = name, function
        self._option = option("reward.function")  # as it is named where the source is opened

    def __call__(self, samples: Sequence[TextSample]) -> np.ndarray:
        """One finite number a response, ``[B]`` float32.

        Raises:
          UserError: where the function raises, or returns anything else.
        """
        prompts, responses = [sample.prompt for sample in samples], [sample.response for sample in samples]
        return np.asarray(_scores(f"{self._option} {self.name}", self._function, prompts, responses), np.float32)


def _scores(
    where: str, function: RewardFunction, prompts: list[Sequence[Message]], responses: list[Response]
) -> list[float]:
    required = "required one finite number for each response"
    try:
        returned = function(prompts, responses)
        scores = list(returned) if isinstance(returned, Iterable) else None
    except Exception as error:  # whatever the user's function raises
        at = _first_failure(function, prompts, responses)
        on = "on the whole batch" if at is None else f"on response {at} of the batch, {responses[at][:_SHOWN]!r}"
        raise UserError(f"{where} raised {type(error).__name__}: {error}, {on}; {required}") from error
    if scores is None:
        raise UserError(f"{where} returned {_shown(returned)} for {len(responses)} responses; {required}")
    if len(scores) != len(responses):
        raise UserError(f"{where} returned {len(scores)} rewards for {len(responses)} responses; {required}")
    for i, score in enumerate(scores):
        if not _is_finite(score):
            raise UserError(
                f"{where} returned {_shown(score)} for response {i} of the batch, {responses[i][:_SHOWN]!r}; {required}"
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


def _first_failure(function: RewardFunction, prompts: list[Sequence[Message]], responses: list[Response]) -> int | None:
    """Index of the first response that the function cannot take alone; None where it takes each."""
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        try:
            function([prompt], [response])
        except Exception:  # the same one again
            return i
    return None
