"""Prompts that are too long for a row: what goes, and what stays.

The beginning of the dialogue goes, up to within a turn of the user. What stays in front is everything before the text
of the first turn: BOS, the system text and the header. So what is left is a dialogue as the template writes it. Where
that cannot be, the last tokens stay, and BOS. Reports count such prompts apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxrm.data.records import Message
from jaxrm.data.templates import Text, encode, locate_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CutPoints:
    """Where a prompt may be cut.

    Attributes:
      head: int32 ``[h]``, the ids before the text of the first turn.
      spans: first and last token, exclusive, of the texts of that turn and of later ones of its role.
      system: the first token of a system text that stands behind ``head``; None where there is none.
    """

    head: np.ndarray
    spans: tuple[tuple[int, int], ...]
    system: int | None


class Cut(NamedTuple):
    """A cut of a prompt: ``head``, then what begins at ``start``.

    Attributes:
      head: int32 ``[h]``.
      start: of the tokens that stay.
      keeps_head: whether system text and first header stay.
    """

    head: np.ndarray
    start: int
    keeps_head: bool


def cut_points(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], template: str, prompt: np.ndarray
) -> CutPoints | None:
    """Where a prompt may be cut; None where its parts cannot be told.

    Args:
      tokenizer: as ``load_tokenizer`` returns it.
      messages: of the prompt.
      template: that it is written with.
      prompt: int32 ``[p]``, its ids.
    """
    places = locate_texts(tokenizer, messages, template)
    if places is None:
        return None
    ends = [place for span in places.spans for place in span]
    if places.system is not None:
        ends.append(places.system)
    encoded = encode(tokenizer, [_beginning(places.text, end) for end in ends])
    tokens = [_common_length(ids, prompt) for ids in encoded]
    pairs = list(zip(tokens[: 2 * len(places.spans) : 2], tokens[1 : 2 * len(places.spans) : 2], strict=True))
    return CutPoints(np.array(encoded[0], np.int32), tuple(pairs), None if places.system is None else tokens[-1])


def find_cut(prompt: np.ndarray, max_tokens: int, first_id: int | None, points: CutPoints | None = None) -> Cut:
    """How to leave ``max_tokens`` tokens of a prompt.

    Args:
      prompt: int32 ``[p]``.
      max_tokens: at least 1.
      first_id: the template's BOS, or None.
      points: from ``cut_points``.
    """
    assert max_tokens >= 1
    if len(prompt) <= max_tokens:
        return Cut(prompt[:0], 0, keeps_head=True)
    if points is not None:
        room = max_tokens - len(points.head)
        start = next((max(a, len(prompt) - room) for a, b in points.spans if b > len(prompt) - room and a < b), None)
        if start is not None and room > 0:
            return Cut(points.head, start, keeps_head=points.system is None or points.system >= start)
    num_bos = int(first_id is not None and prompt[0] == first_id)
    return Cut(prompt[:num_bos], len(prompt) - max_tokens + num_bos, keeps_head=False)


def cut_prompt(
    prompt: np.ndarray, max_tokens: int, first_id: int | None, points: CutPoints | None = None
) -> np.ndarray:
    """At most ``max_tokens`` tokens of a prompt; arguments as for ``find_cut``."""
    cut = find_cut(prompt, max_tokens, first_id, points)
    return np.concatenate([cut.head, prompt[cut.start :]]) if cut.start else prompt


def _beginning(text: Text, length: int) -> Text:
    """The first characters of a text."""
    parts = []
    for part in text.parts:
        parts.append(part[:length])
        length -= len(part)
        if length <= 0:
            break
    return Text(tuple(parts), text.behind)


def _common_length(ids: Sequence[int], prompt: np.ndarray) -> int:
    count = min(len(ids), len(prompt))
    differs = np.flatnonzero(np.asarray(ids[:count], np.int32) != prompt[:count])
    return int(differs[0]) if len(differs) else count
