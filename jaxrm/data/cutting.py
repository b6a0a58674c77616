"""Prompts that are too long for a row: what goes, and what stays.

The beginning of the dialogue goes, up to within a turn of the user. What stays in front is everything before the text
of the first turn: BOS, the system text and the header. So what is left is a dialogue as the template writes it. Where
that cannot be, the last tokens stay, and BOS. Reports count such prompts apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxrm.data.records import Message
from jaxrm.data.templates import Places, Text, encode, locate_texts

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
    tokenizer: "PreTrainedTokenizerBase", template: str, prompts: Sequence[tuple[Sequence[Message], np.ndarray]]
) -> list[CutPoints | None]:
    """Where prompts may be cut; None where the parts of one cannot be told.

    Args:
      tokenizer: as ``load_tokenizer`` returns it.
      template: that they are written with.
      prompts: the messages of each and int32 ``[p]``, its ids.
    """
    located = [locate_texts(tokenizer, messages, template) for messages, _ in prompts]
    ends = [[] if places is None else _ends(places) for places in located]
    encoded = iter(encode(tokenizer, list(chain.from_iterable(ends))))
    points: list[CutPoints | None] = []
    for places, (_, prompt) in zip(located, prompts, strict=True):
        if places is None:
            points.append(None)
            continue
        head = next(encoded)
        edges = [_common_length(ids, prompt) for ids in (head, *islice(encoded, 2 * len(places.spans) - 1))]
        system = None if places.system is None else _common_length(next(encoded), prompt)
        spans = tuple(zip(edges[::2], edges[1::2], strict=True))
        points.append(CutPoints(np.array(head, np.int32), spans, system))
    return points


def _ends(places: Places) -> list[Text]:
    """The prompt up to the beginning and the end of each span, and up to the system text."""
    ends = [place for span in places.spans for place in span]
    if places.system is not None:
        ends.append(places.system)
    return [_beginning(places.text, end) for end in ends]


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
    cut = None if points is None else _cut_within_turn(prompt, max_tokens, points)
    if cut is not None:
        return cut
    num_bos = int(first_id is not None and prompt[0] == first_id)
    return Cut(prompt[:num_bos], len(prompt) - max_tokens + num_bos, keeps_head=False)


def _cut_within_turn(prompt: np.ndarray, max_tokens: int, points: CutPoints) -> Cut | None:
    """The cut that leaves most and begins within the text of a turn; None where not even the last one's header fits."""
    system = len(prompt) if points.system is None else points.system
    previous = 0
    for start, stop in points.spans:
        # Mistral writes the system text into the last turn, between its header and its text: there it stays.
        own_system = prompt[system:start] if previous <= system else prompt[:0]
        head = np.concatenate([points.head, own_system])
        first = max(start, len(prompt) - max_tokens + len(head))
        if first < stop and len(head) < max_tokens:
            return Cut(head, first, keeps_head=previous <= system)
        previous = stop
    return None


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
