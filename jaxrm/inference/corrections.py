"""Greedy corrections of responses by a seq2seq reward model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxrm.data.cutting import CutPoints, cut_prompt
from jaxrm.data.pairs import TokenPair
from jaxrm.data.templates import bos_id
from jaxrm.errors import UserError, flag, option
from jaxrm.inference.sampler import Sampler
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.models.config import ModelConfig
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS = 32  # corrections written at once


@dataclass(frozen=True)
class Corrector:
    """A seq2seq reward model that can be asked for corrections.

    Attributes:
      model: the decoder.
      params: its parameters.
      tokenizer: of the model.
      template: chat template, as in ``config.data.template``.
      request: ids that ask for the correction.
      max_new_tokens: longest correction.
    """

    model: ShardedModel
    params: Any
    tokenizer: "PreTrainedTokenizerBase"
    template: str
    request: tuple[int, ...]
    max_new_tokens: int

    def correct(
        self,
        prompts: Sequence[np.ndarray],
        responses: Sequence[np.ndarray],
        *,
        points: Sequence[CutPoints | None],
        show_progress: bool,
    ) -> list[np.ndarray]:
        """Token ids of the greedy correction of each response.

        Args:
          prompts: token ids of each prompt; they are cut where they must be.
          responses: token ids of the response to each.
          points: where each prompt may be cut.
          show_progress: draw a bar.

        Raises:
          UserError: where the model cannot read a response and the longest correction.
        """
        sources = [f"responses[{i}]" for i in range(len(responses))]
        check_room(self.model.config, self.request, self.max_new_tokens, responses, sources, field="max_new_tokens")
        sampling = SamplingConfig(max_new_tokens=self.max_new_tokens, temperature=0.0)
        responder = Sampler(self.model, self.params, self.tokenizer, self.template, sampling)
        first_id = bos_id(self.tokenizer, self.template)
        rows = []
        for prompt, response, cuts in zip(prompts, responses, points, strict=True):
            rest = len(response) + len(self.request) + self.max_new_tokens
            room = self.model.config.max_position - rest
            rows.append([*cut_prompt(prompt, room, first_id, cuts), *response, *self.request])
        written: list[np.ndarray] = [np.zeros(0, np.int32)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        with Progress("correct", len(rows), unit="responses", enabled=show_progress) as progress:
            for start in range(0, len(order), _ROWS):
                indices = order[start : start + _ROWS]
                corrections = responder.continue_ids([rows[i] for i in indices], jax.random.key(0))
                for i, correction in zip(indices, corrections, strict=True):
                    written[i] = correction
                progress.update(start + len(indices))
        return written

    def correct_pairs(self, pairs: Sequence[TokenPair], *, show_progress: bool) -> dict[str, list[np.ndarray]]:
        """Greedy corrections of both responses of pairs, ``{"chosen": ..., "rejected": ...}``; errors as `correct`."""
        prompts = [pair.prompt for pair in pairs]
        responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        points = [pair.points for pair in pairs] * 2
        written = self.correct(prompts * 2, responses, points=points, show_progress=show_progress)
        return {"chosen": written[: len(pairs)], "rejected": written[len(pairs) :]}

    def text(self, tokens: np.ndarray) -> str:
        """A response or correction as text."""
        ends = self.tokenizer.all_special_ids
        return str(self.tokenizer.decode([int(t) for t in tokens if int(t) not in ends])).strip()


def check_room(
    model: ModelConfig,
    request: Sequence[int],
    max_new_tokens: int,
    responses: Sequence[np.ndarray],
    sources: Sequence[str],
    *,
    field: str,
) -> None:
    """Refuse corrections that the model cannot write behind a response, the request and a token of the prompt.

    Args:
      model: whose positions they share.
      request: ids that ask for the correction.
      max_new_tokens: longest correction.
      responses: token ids of what is corrected; each can be read by itself.
      sources: where each response is from, for the message.
      field: that says ``max_new_tokens``, for the message.
    """
    longest = max(range(len(responses)), key=lambda i: len(responses[i]), default=None)
    if longest is None:
        return
    most = model.max_position - 1 - len(request) - len(responses[longest])
    if max_new_tokens > most:
        advice = f"e.g. {flag(field)}={most}" if most >= 1 else "give shorter responses"
        raise UserError(
            f"{option(field)} is {max_new_tokens}, but the model reads {model.max_position} tokens: a token of the "
            f"prompt, "
            f"{len(responses[longest])} of the longest response ({sources[longest]}) and {len(request)} that ask for "
            f"its correction leave {max(most, 0)}; {advice}"
        )
