"""Rewards from a function of text, for those that a program can verify.

It takes a batch, prompts and responses in the same order, and returns one number for each response:

    def ends_with_thanks(prompts: list[list[Message]], responses: list[str]) -> list[float]:
        return [1.0 if response.endswith("thanks .") else 0.0 for response in responses]

    python -m jaxrm.train --config=configs/ppo_tiny.py --config.reward.model=None \\
        --config.reward.function=my_rewards:ends_with_thanks --config.reward.kind=scalar

**Texts.** A prompt is its messages (`jaxrm.data.records.Message`); the last one's ``content`` is the question. A
response is text without special tokens and without white space around it. What was drawn is there too:
``response.raw`` is the text with them, so that a format of special tokens such as ``<answer>`` can be rewarded;
``response.ended`` says whether the end was reached, and ``response.token_ids`` are its ids
(`jaxrm.data.responses.Response`).

    def has_answer(prompts: list[list[Message]], responses: list[Response]) -> list[float]:
        return [1.0 if "<answer>" in response.raw else 0.0 for response in responses]

**Fields.** A third argument, named ``fields``, has for each prompt all columns of its record (JSONL, Parquet, hub):

    def is_right(prompts, responses, fields: list[dict]) -> list[float]:
        return [float(row["answer"] in response) for response, row in zip(responses, fields)]

**Spans.** With ``kind=spans`` it returns for each response a list of ``(start, end, number)``:

    def politeness(prompts, responses) -> list[list[tuple[int, int, float]]]:
        return [[(m.start(), m.end(), 1.0) for m in re.finditer("please|thanks", r)] for r in responses]

Places are characters of the response as it is given, as ``re.finditer(pattern, response)`` counts them, and not of
``response.raw``. A number is the reward of its whole span, and stands on the last token that writes a character of it.
Numbers on one token add; other tokens get 0. The empty span at the end, ``(len(response), len(response), number)``, is
the response as a whole: its number stands on the last token, which is the end token where that was reached.

**Edits.** A run writes down the hash of the function's file, but not of what that imports. Where the file was edited
since, PPO says so and goes on, since a function that stopped it had to be mended. Best-of-n and evaluations refuse it:
rewards of two functions are not to be compared.

**Processes.** In a job of several processes, process 0 calls the function for all of them. The same responses must
always get the same rewards, since a resumed run calls it again. ``config.reward.function_workers=4`` calls it in four
processes, each with a part of the batch, so it must not compare the responses of a batch. They start no JAX, import
its module by themselves, and end with the run. ``config.reward.function_timeout=10`` is the seconds that one call may
take, for which it must be in a process that can be stopped. Where one takes longer, raises, or its process dies, it is
tried again with one response at a time; a response that fails then too stops the run, and the state before is saved.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.responses import Response
from jaxrm.data.token_spans import Span, lay_on_tokens
from jaxrm.errors import UserError, option
from jaxrm.inference.text_scorer import TextSample
from jaxrm.ops.reward_kinds import find_kind
from jaxrm.stages.rewards.function_call import (
    SHOWN,
    FunctionFault,
    RewardFunction,
    call,
    open_function,
)
from jaxrm.stages.rewards.function_processes import FunctionProcesses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# response and its spans -> [T], a number for each of its tokens
SpanLayout = Callable[[Response, Iterable[Span]], np.ndarray]


def open_scorer(
    source: RewardConfig, tokenizer: "PreTrainedTokenizerBase", end_ids: tuple[int, ...]
) -> "FunctionScorer":
    """The function of a source of rewards, ready to score.

    Args:
      source: the section, with a function.
      tokenizer: of the policy.
      end_ids: ids that end its responses.

    Raises:
      UserError: as `jaxrm.stages.rewards.function_call.open_function`.
    """
    name = str(source.function)
    layout = functools.partial(lay_on_tokens, tokenizer, end_ids) if find_kind(source.kind).reads == "spans" else None
    return FunctionScorer(
        name, open_function(name), layout, workers=source.function_workers, timeout=source.function_timeout
    )


class FunctionScorer:
    """A function of text as a `jaxrm.inference.text_scorer.TextScorer`.

    Args:
      name: of the function, for messages.
      function: prompts and responses to one number each, or to spans.
      layout: lays spans onto tokens; None where the function returns numbers.
      workers: processes that call it; 0 for this one.
      timeout: seconds that a call in one of them may take; None for any.
    """

    is_collective = False

    def __init__(
        self,
        name: str,
        function: RewardFunction,
        layout: SpanLayout | None = None,
        *,
        workers: int = 0,
        timeout: float | None = None,
    ) -> None:
        self.name, self._function, self._layout = name, function, layout
        self._where = f"{option('reward.function')} {name}"  # as it is named where the source is opened
        what = "one finite number" if layout is None else "a list of (start, end, finite number)"
        self._required = f"required {what} for each response"
        if layout is not None:
            self._required += ", 0 <= start < end <= len(response)"
        if timeout is not None:
            self._required += f", within {timeout:g} s ({option('reward.function_timeout')})"
        self._processes = FunctionProcesses(name, workers, timeout, is_spans=layout is not None) if workers else None

    def __call__(self, samples: Sequence[TextSample]) -> np.ndarray | list[np.ndarray]:
        """One finite number a response, ``[B]`` float32; or of each response one a token, ``[T_i]``.

        Raises:
          UserError: where the function raises, takes too long, or returns anything else.
        """
        try:
            if self._processes is not None:
                results = self._processes(samples)
            else:
                results = call(self._function, samples, is_spans=self._layout is not None)
        except FunctionFault as fault:
            which = ""
            if fault.index is not None:
                which = f" response {fault.index} of the batch, {samples[fault.index].response[:SHOWN]!r}"
            raise UserError(f"{self._where} {fault.problem}{which}; {self._required}") from fault.__cause__ or fault
        if self._layout is None:
            return np.asarray(results, np.float32)
        return [self._layout(sample.response, spans) for sample, spans in zip(samples, results, strict=True)]

    def close(self) -> None:
        """End its processes, if any."""
        if self._processes is not None:
            self._processes.close()
