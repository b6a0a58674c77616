"""Text in, text out: a model's responses to chat prompts."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrm.data import templates
from jaxrm.data.records import Message
from jaxrm.data.responses import Response, response_text
from jaxrm.errors import UserError, flag, option
from jaxrm.inference.decode_memory import CacheFields, cache_room, check_room
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.models.cache import bytes_of_a_token
from jaxrm.models.config import ModelConfig
from jaxrm.models.generate import generate, refill_of
from jaxrm.models.quantized_params import count_parameters
from jaxrm.models.sampling import GenerateOptions, SamplingConfig, prompt_keys, response_keys
from jaxrm.models.stream import Prompt, Stream, bucket
from jaxrm.sharding.mesh import batch_shards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LENGTH_BUCKET = 64


def prompt_room(model: ModelConfig, sampling: SamplingConfig, field: str) -> int:
    """Longest prompt in tokens that leaves room for a response.

    Args:
      model: whose positions they share.
      sampling: says the length of the response.
      field: where that is said, for the message.

    Raises:
      UserError: where there is no room at all.
    """
    room = model.max_position - sampling.max_new_tokens
    if room < 1:
        raise UserError(
            f"{option(field)} is {sampling.max_new_tokens}, but the model reads {model.max_position} tokens, prompt "
            f"and "
            f"response together; e.g. {flag(field)}={max(model.max_position // 4, 1)}"
        )
    return room


def answerable(
    prompts: Iterable[Sequence[Message]], tokenizer: "PreTrainedTokenizerBase", template: str, room: int
) -> Iterator[Sequence[Message]]:
    """Those prompts that the template takes and that have at most ``room`` tokens."""
    for prompt in prompts:
        try:
            ids = templates.encode_prompt(tokenizer, prompt, template)
        except UserError:
            continue
        if len(ids) <= room:
            yield prompt


class Sampler:
    """Generates responses to prompts with one model.

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
        model: ShardedModel,
        params: Any,
        tokenizer: "PreTrainedTokenizerBase",
        template: str,
        sampling: SamplingConfig,
    ) -> None:
        self._model, self._params = model, params
        self._tokenizer, self._template, self._sampling = tokenizer, template, sampling
        self._end_ids = model.end_ids(tokenizer, template)
        self._options = GenerateOptions(sampling, self._end_ids)
        self._streams: dict[int, Stream] = {}

    def encode(self, prompts: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Token ids of each prompt.

        Raises:
          UserError: the template refuses one, or the model cannot read it whole.
        """
        room = prompt_room(self._model.config, self._sampling, "max_new_tokens")
        encoded = []
        for number, prompt in enumerate(prompts, 1):
            try:
                ids = templates.encode_prompt(self._tokenizer, prompt, self._template)
            except UserError as error:
                raise UserError(f"prompt {number}: {error}") from error
            encoded.append(ids)
            if len(ids) > room:
                raise UserError(
                    f"prompt {number} has {len(ids)} tokens, but the model reads {self._model.config.max_position} in "
                    f"all and {self._sampling.max_new_tokens} are for the response; shorten it, or use a smaller "
                    f"{flag('max_new_tokens')}"
                )
        return encoded

    def respond(self, prompts: Sequence[Sequence[Message]], key: jax.Array) -> list[str]:
        """One response to each prompt, as text without its end token.

        Raises:
          UserError: as `encode`.
        """
        return [self.text(tokens) for tokens in self.continue_ids(self.encode(prompts), key)]

    def answers(
        self, prompts: Sequence[Sequence[Message]], keys: jax.Array, slots: int
    ) -> Iterator[tuple[int, Response]]:
        """One response to each prompt as soon as it has ended, with the number of its prompt, from 0.

        Args:
          prompts: each as messages; any number.
          keys: ``[N]`` typed PRNG keys of the prompts, or ``[N, 1]`` of the responses.
          slots: prompts answered at once; as one response ends, the next prompt takes its place.

        Raises:
          UserError: as `encode`; at once, before anything is drawn.
        """
        encoded = self.encode(prompts)
        shards = batch_shards(self._model.mesh)
        slots = min(slots, 1 << max(len(encoded) - 1, 0).bit_length())  # few numbers: few programs are compiled
        slots = -(-slots // shards) * shards  # as many on every device
        if encoded:
            self._check_memory(max(map(len, encoded)), slots)
        return self._answers(encoded, keys, slots)

    def _check_memory(self, prompt: int, slots: int) -> None:
        """Refuse more slots than a device has memory for."""
        model, response = self._model, self._sampling.max_new_tokens
        itemsize = jnp.dtype(model.source.dtype).itemsize
        weights = itemsize * count_parameters(model.shapes)
        token_bytes, tokens = bytes_of_a_token(model.config, itemsize, "compute"), bucket(prompt) + response
        room = cache_room(model.config, model.mesh, token_bytes=token_bytes, weights=weights, tokens=tokens)
        check_room(room, slots, prompt, response, CacheFields("batch_size", flag("batch_size"), "max_new_tokens"))

    def _answers(self, encoded: list[list[int]], keys: jax.Array, slots: int) -> Iterator[tuple[int, Response]]:
        if not encoded:
            return
        data = np.asarray(jax.random.key_data(response_keys(keys, len(encoded), 1)[:, 0]))
        limit = self._sampling.max_new_tokens
        waiting = [Prompt(ids, key, limit) for ids, key in zip(encoded, data, strict=True)]
        for answer in self._stream(slots).answer(waiting):
            yield answer.place, self.text(answer.tokens)

    def _stream(self, slots: int) -> Stream:
        """The programs for so many slots; with their copy of the weights they live as long as this."""
        if slots not in self._streams:
            self._streams[slots] = Stream(
                self._model.graphdef,
                self._params,
                options=replace(self._options, slots=slots, refill=refill_of(slots, batch_shards(self._model.mesh))),
            )
        return self._streams[slots]

    def continue_ids(self, prompts: Sequence[Sequence[int]], key: jax.Array) -> list[np.ndarray]:
        """Token ids of one response to each prompt, its end token included where it was reached.

        Args:
          prompts: token ids, each short enough to leave room for a response.
          key: typed PRNG key of all, or one of each prompt, or ``[B, 1]`` of each response.
        """
        if not prompts:
            return []
        room = prompt_room(self._model.config, self._sampling, "max_new_tokens")
        longest = max(len(prompt) for prompt in prompts)
        width = min(-(-longest // _LENGTH_BUCKET) * _LENGTH_BUCKET, room)
        height = 1 << (len(prompts) - 1).bit_length()
        keys = prompt_keys(key, 0, height) if key.ndim == 0 else key[np.minimum(np.arange(height), len(key) - 1)]
        tokens, mask = np.zeros((height, width), np.int32), np.zeros((height, width), bool)
        for row in range(height):
            prompt = prompts[min(row, len(prompts) - 1)]
            tokens[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = True
        out = generate(
            self._model.graphdef,
            self._params,
            tokens,
            mask,
            keys,
            options=self._options,
        )
        responses, response_mask = jax.device_get((out.tokens, out.mask))
        return [responses[row][response_mask[row]] for row in range(len(prompts))]

    def text(self, tokens: Sequence[int] | np.ndarray) -> Response:
        """A response as text, without its end token."""
        return response_text(self._tokenizer, self._end_ids, tokens)
