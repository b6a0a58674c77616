"""Text in, text out: a model's responses to chat prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxrm.data import templates
from jaxrm.data.records import Message
from jaxrm.errors import UserError
from jaxrm.models.generate import SamplingConfig, generate
from jaxrm.stages.setup import OpenedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LENGTH_BUCKET = 64


class Responder:
    """Answers prompts with a model.

    Prompts are padded to whole buckets of 64 tokens and a power of two of rows, so that few shapes are compiled.

    Args:
      model: the decoder.
      params: its parameters.
      tokenizer: of the model.
      template: chat template, as in ``config.data.template``.
      sampling: how tokens are drawn.
    """

    def __init__(
        self,
        model: OpenedModel,
        params: Any,
        tokenizer: "PreTrainedTokenizerBase",
        template: str,
        sampling: SamplingConfig,
    ) -> None:
        self._model, self._params = model, params
        self._tokenizer, self._template, self._sampling = tokenizer, template, sampling
        self._end_ids = tuple(sorted(templates.end_ids(tokenizer, template)))

    def respond(self, prompts: Sequence[Sequence[Message]], key: jax.Array) -> list[str]:
        """One response to each prompt, as text without its end token."""
        if not prompts:
            return []
        ids = [templates.encode_prompt(self._tokenizer, prompt, self._template) for prompt in prompts]
        room = self._model.config.max_position - self._sampling.max_new_tokens
        longest = max(len(prompt) for prompt in ids)
        if longest > room:
            raise UserError(
                f"a prompt has {longest} tokens, but the model reads {self._model.config.max_position} in all and "
                f"{self._sampling.max_new_tokens} are for the response; shorten it, or lower max_new_tokens"
            )
        width = min(-(-longest // _LENGTH_BUCKET) * _LENGTH_BUCKET, room)
        height = 1 << (len(ids) - 1).bit_length()
        tokens, mask = np.zeros((height, width), np.int32), np.zeros((height, width), bool)
        for row in range(height):
            prompt = ids[min(row, len(ids) - 1)]
            tokens[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = True
        out = generate(
            self._model.graphdef,
            self._params,
            tokens,
            mask,
            key,
            sampling=self._sampling,
            end_ids=self._end_ids,
        )
        drawn, kept = jax.device_get(out)
        return [self._text(drawn[row][kept[row]]) for row in range(len(ids))]

    def _text(self, tokens: np.ndarray) -> str:
        content = [int(token) for token in tokens if int(token) not in self._end_ids]
        return str(self._tokenizer.decode(content, skip_special_tokens=True)).strip()
