"""The embedded task "summarize": notes, of which the important ones are to be listed.

A prompt has six or seven notes, or up to ten on request. Each is an item after a marker of its importance ("urgent
invoice spare poster ..."), and no marker occurs twice. Two to four notes are important. The ideal response lists
exactly those, each once. The prompt does not say which markers are important: the policy has to know.

Demonstrations are imperfect in two ways (``Imperfection``). Most are careless and take half of the markers, always the
same ones, for the other sort. So the most likely response of a policy trained on them is wrong too, and reinforcement
learning has something to correct. And there is independent noise: notes are forgotten, added and repeated. Some
demonstrations ask to repeat all notes instead, from which a small model learns to copy.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrm.data.records import Message
from jaxrm.data.tasks.drawing import pick, pick_several
from jaxrm.data.tasks.files import write_jsonl
from jaxrm.data.tasks.prompts import demonstration
from jaxrm.data.tasks.summarize.words import IMPORTANT, ITEMS, NOTE, PROMPT, REPEAT, RESPONSE, UNIMPORTANT, UNSEEN_WORDS
from jaxrm.data.tasks.vocabulary import write_tokenizer

TRAIN_RECORDS, HELDOUT_RECORDS, PROMPTS, PAIRS = 12_000, 512, 1024, 2000
SELECTION, TEST = 256, 512
COPY_SHARE = 0.3  # of the training demonstrations: all the notes are to be repeated
MAX_LENGTH = 64  # tokens; ten notes, all of them repeated, take 52 with their template


@dataclass(frozen=True, slots=True)
class Note:
    """One item and its importance. Both words are in the tables of ``summarize.words``."""

    marker: str
    item: str


Notes = tuple[Note, ...]


def important_notes(notes: Sequence[Note]) -> list[Note]:
    """The notes to list, in their order."""
    return [note for note in notes if note.marker in IMPORTANT]


def unseen(notes: Notes) -> bool:
    """Whether a marker or item is kept out of pairs and prompts (out of distribution)."""
    return any(note.marker in UNSEEN_WORDS or note.item in UNSEEN_WORDS for note in notes)


def prompt_text(notes: Notes, form: str = PROMPT) -> str:
    """The notes in words."""
    return form.format(notes=" ".join(NOTE.format(marker=note.marker, item=note.item) for note in notes))


def response_text(notes: Sequence[Note]) -> str:
    """A list of notes in words."""
    return prompt_text(tuple(notes), RESPONSE)


def _pattern(form: str) -> re.Pattern[str]:
    return re.compile(re.escape(form).replace(r"\{notes\}", r"(\w+ \w+(?: \w+ \w+)*)"))


_PROMPT, _RESPONSE = _pattern(PROMPT), _pattern(RESPONSE)


def parse_prompt(text: str) -> Notes | None:
    """The notes of a prompt with this text, or None."""
    match = _PROMPT.fullmatch(text)
    if match is None:
        return None
    notes = _notes(match.group(1))
    known = all(note.marker in IMPORTANT + UNIMPORTANT and note.item in ITEMS for note in notes)
    return notes if known and important_notes(notes) else None


def parse_response(text: str) -> Notes | None:
    """The notes of a response with this text, with any words, or None."""
    match = _RESPONSE.fullmatch(text)
    return _notes(match.group(1)) if match else None


def _notes(text: str) -> Notes:
    words = text.split()
    return tuple(Note(marker, item) for marker, item in zip(words[::2], words[1::2], strict=True))


@dataclass(frozen=True, slots=True)
class Imperfection:
    """How often a demonstration is wrong; each is a probability."""

    careless: float = 0.55  # takes every confused marker for one of the other sort
    confused_markers: float = 0.4  # the share of markers, of either sort and of those not out of distribution
    forgotten: float = 0.01  # of every note that would be listed
    added: float = 0.01  # of every note that would not
    repeated: float = 0.01  # of every response: one of its notes once more, at the end


def confused_markers(seed: int, imperfection: Imperfection = Imperfection()) -> frozenset[str]:
    """The markers that careless demonstrations of this seed take for the other sort.

    Every seed has the same number. Markers that are out of distribution are always among them.
    """
    rng = random.Random(f"summarize confusions {seed}")
    confused = UNSEEN_WORDS & {*IMPORTANT, *UNIMPORTANT}
    for markers in (IMPORTANT, UNIMPORTANT):
        seen = [marker for marker in markers if marker not in UNSEEN_WORDS]
        confused |= set(pick_several(rng, seen, round(imperfection.confused_markers * len(seen))))
    return confused


def demonstrate(
    notes: Notes, rng: random.Random, confused: frozenset[str], imperfection: Imperfection = Imperfection()
) -> list[Note]:
    """The notes of an imperfect response, at least one. ``confused`` comes from ``confused_markers``."""
    while True:
        careless = rng.random() < imperfection.careless
        response = []
        for note in notes:
            listed = note.marker in IMPORTANT
            if careless and note.marker in confused:
                listed = not listed
            if rng.random() < (imperfection.forgotten if listed else imperfection.added):
                listed = not listed
            response += [note] * listed
        if response and rng.random() < imperfection.repeated:
            response.append(pick(rng, response))
        if response:
            return response


def sample_notes(rng: random.Random, *, unseen_words: bool | None, max_notes: int = 7) -> Notes:
    """Random notes with different words, two to four of them important.

    Args:
      rng: the random generator.
      unseen_words: True for out of distribution, False for in distribution, None for either.
      max_notes: from 6 to 10; there are so many, or one less. From 8 on more of them are important, since there are
        five other markers in distribution.
    """
    while True:
        words = [
            [word for word in table if unseen_words is not False or word not in UNSEEN_WORDS]
            for table in (IMPORTANT, UNIMPORTANT, ITEMS)
        ]
        count = pick(rng, (max_notes - 1, max_notes))
        important = pick(rng, [n for n in (2, 3, 4, 5) if n >= count - 5][:3])
        markers = pick_several(rng, words[0], important) + pick_several(rng, words[1], count - important)
        items = pick_several(rng, words[2], count)
        notes = tuple(Note(m, i) for m, i in zip(pick_several(rng, markers, count), items, strict=True))
        if unseen_words is None or unseen(notes) == unseen_words:
            return notes


def write(folder: Path, *, seed: int, max_notes: int = 7) -> None:
    """Write the task's files; see ``jaxrm.data.tasks.write_task``.

    The chosen response of a pair is the ideal one. The rejected one is a demonstration that differs from it.
    """
    rng = random.Random(f"summarize {seed}")
    confused = confused_markers(seed)
    taken: set[Notes] = set()

    def fresh(count: int, unseen_words: bool | None) -> Iterator[Notes]:
        for _ in range(count):
            while (notes := sample_notes(rng, unseen_words=unseen_words, max_notes=max_notes)) in taken:
                pass
            taken.add(notes)
            yield notes

    def demonstrations(count: int, copy_share: float) -> Iterator[dict[str, Any]]:
        for notes in fresh(count, None):
            copies = rng.random() < copy_share
            listed = notes if copies else demonstrate(notes, rng, confused)
            prompt = [Message("user", prompt_text(notes, REPEAT if copies else PROMPT))]
            yield demonstration(prompt, response_text(listed))

    def pairs(count: int) -> Iterator[dict[str, str]]:
        for notes in fresh(count, False):
            chosen = rejected = important_notes(notes)
            while rejected == chosen:
                rejected = demonstrate(notes, rng, confused)
            row = {"chosen": response_text(chosen), "rejected": response_text(rejected)}
            yield {"prompt": prompt_text(notes)} | row

    def prompts(unseen_words: bool) -> Callable[[int], Iterator[dict[str, str]]]:
        return lambda count: ({"prompt": prompt_text(notes)} for notes in fresh(count, unseen_words))

    write_tokenizer(folder / "tokenizer", [*IMPORTANT, *UNIMPORTANT, *ITEMS, *_FRAMES], max_length=MAX_LENGTH)
    write_jsonl(folder / "train.jsonl", demonstrations(TRAIN_RECORDS, COPY_SHARE))
    write_jsonl(folder / "heldout.jsonl", demonstrations(HELDOUT_RECORDS, 0.0))
    write_jsonl(folder / "prompts.jsonl", prompts(False)(PROMPTS))
    write_jsonl(folder / "pairs.jsonl", pairs(PAIRS))
    write_jsonl(folder / "selection.jsonl", prompts(False)(SELECTION))
    write_jsonl(folder / "test.jsonl", prompts(False)(TEST))
    write_jsonl(folder / "test_ood.jsonl", prompts(True)(TEST))


_FRAMES = [re.sub(r"\{\w+\}", " , ", form) for form in (PROMPT, REPEAT, NOTE, RESPONSE)]
