"""A response as text, with what was drawn."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Response(str):
    """A response as text, without its end token, other special tokens and white space around it.

    Attributes:
      raw: the text with all of these but the end token, as the tokenizer writes them.
      token_ids: ``[T]`` int32, as they were drawn, the end token included where it was reached.
      ended: whether it was; False where the response was cut off at ``max_new_tokens``.
    """

    raw: str
    token_ids: np.ndarray
    ended: bool


def response_text(
    tokenizer: "PreTrainedTokenizerBase", end_ids: Collection[int], tokens: Sequence[int] | np.ndarray
) -> Response:
    """A response as text, without its end token."""
    content = [int(token) for token in tokens if int(token) not in end_ids]
    response = Response(str(tokenizer.decode(content, skip_special_tokens=True)).strip())
    response.raw = str(tokenizer.decode(content, skip_special_tokens=False))
    response.token_ids = np.asarray(tokens, np.int32)
    response.ended = bool(len(tokens)) and int(tokens[-1]) in end_ids
    return response
