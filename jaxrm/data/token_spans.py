"""Character spans of a response, laid onto the tokens that were drawn.

Offsets come from decoding, since a policy may draw other tokens than a tokenizer would write for the same text.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from jaxrm.data.responses import Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int, float]  # start, end and number
_INCOMPLETE = "\ufffd"  # what bytes that are no character yet are decoded to


def lay_on_tokens(
    tokenizer: "PreTrainedTokenizerBase", end_ids: Collection[int], response: Response, spans: Iterable[Span]
) -> np.ndarray:
    """Numbers of spans as numbers of tokens: each on the last token that writes a character of its span.

    Numbers on one token add. An empty span at the end of the text is the response as a whole, whose number is on its
    last token.

    Args:
      tokenizer: of the policy.
      end_ids: ids that end a response.
      response: its text and its ids.
      spans: ``(start, end, number)`` in characters of the response's text.

    Returns:
      ``[T]`` float32, a number for each of ``response.token_ids``.
    """
    numbers, spans = np.zeros(len(response.token_ids), np.float64), list(spans)
    written = written_after(tokenizer, end_ids, response) if spans and numbers.size else []
    for start, end, number in spans if written else ():
        numbers[-1 if start == end else bisect_left(written, end)] += number
    return numbers.astype(np.float32)


def written_after(tokenizer: "PreTrainedTokenizerBase", end_ids: Collection[int], response: Response) -> list[int]:
    """How many characters of a response's text are written once each of its tokens is.

    A character whose bytes are shared among tokens is written by the last of them. A special token writes none.
    """

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode([i for i in ids if i not in end_ids], skip_special_tokens=True))

    ids = [int(i) for i in response.token_ids]
    text = decode(ids)
    counts = _by_windows(decode, ids, text)
    if counts is None:  # what a token writes depends on more than the token before it
        counts = [_common(decode(ids[: number + 1]), text) for number in range(len(ids))]
    # A character may look written until a later token changes it, so what counts is the least from there on.
    counts = list(accumulate(reversed(counts), min))[::-1]
    before = len(text) - len(text.lstrip())  # white space that the response's text lacks
    return [min(max(count - before, 0), len(response)) for count in counts]


def _by_windows(decode: Callable[[Sequence[int]], str], ids: Sequence[int], text: str) -> list[int] | None:
    """The same by decoding each token beside few before it; None where that does not write the text."""
    counts, first, read, done, context = [], 0, 0, 0, ""
    for number in range(1, len(ids) + 1):
        window = decode(ids[first:number])
        if not window.startswith(context):
            return None
        piece = window[len(context) :]
        counts.append(done + _common(piece, text[done : done + len(piece)]))
        if piece and not piece.endswith(_INCOMPLETE):
            first, read, done = read, number, done + len(piece)
            context = decode(ids[first:read])
    return counts if not counts or counts[-1] == len(text) else None


def _common(text: str, other: str) -> int:
    """Length of the beginning that two texts share."""
    return next(
        (i for i, pair in enumerate(zip(text, other, strict=False)) if pair[0] != pair[1]), min(len(text), len(other))
    )
