"""The files of the embedded task "dialogue"."""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxrm.data.tasks.dialogue import words
from jaxrm.data.tasks.dialogue.task import Dialogue, confused_beliefs, demonstrate, ideal_response, sample_dialogue
from jaxrm.data.tasks.files import write_jsonl
from jaxrm.data.tasks.prompts import demonstration, prompt_field
from jaxrm.data.tasks.vocabulary import write_tokenizer

TRAIN_RECORDS, HELDOUT_RECORDS, PROMPTS, PAIRS = 8000, 512, 1024, 2000
SELECTION, TEST = 256, 512
MAX_LENGTH = 64  # tokens; the longest dialogue takes 56 with its template


def write(folder: Path, *, seed: int) -> None:
    """Write the task's files; see ``jaxrm.data.tasks.write_task``.

    The chosen response of a pair is the ideal one. The rejected one is a demonstration that differs from it.
    """
    rng = random.Random(f"dialogue {seed}")
    confused = confused_beliefs(seed)
    taken: set[Dialogue] = set()

    def fresh(count: int, unseen: bool | None) -> Iterator[Dialogue]:
        for _ in range(count):
            while (dialogue := sample_dialogue(rng, unseen=unseen)) in taken:
                pass
            taken.add(dialogue)
            yield dialogue

    def demonstrations(count: int) -> Iterator[dict[str, Any]]:
        for dialogue in fresh(count, None):
            yield demonstration(dialogue.messages, demonstrate(dialogue, rng, confused).text)

    def pairs(count: int) -> Iterator[dict[str, Any]]:
        for dialogue in fresh(count, False):
            chosen = rejected = ideal_response(dialogue)
            while rejected == chosen:
                rejected = demonstrate(dialogue, rng, confused)
            row = {"chosen": chosen.text, "rejected": rejected.text}
            yield {"prompt": prompt_field(dialogue.messages)} | row

    def prompts(count: int, unseen: bool) -> Iterator[dict[str, Any]]:
        return ({"prompt": prompt_field(dialogue.messages)} for dialogue in fresh(count, unseen))

    write_tokenizer(folder / "tokenizer", _all_text(), max_length=MAX_LENGTH)
    write_jsonl(folder / "train.jsonl", demonstrations(TRAIN_RECORDS))
    write_jsonl(folder / "heldout.jsonl", demonstrations(HELDOUT_RECORDS))
    write_jsonl(folder / "prompts.jsonl", prompts(PROMPTS, False))
    write_jsonl(folder / "pairs.jsonl", pairs(PAIRS))
    write_jsonl(folder / "selection.jsonl", prompts(SELECTION, False))
    write_jsonl(folder / "test.jsonl", prompts(TEST, False))
    write_jsonl(folder / "test_ood.jsonl", prompts(TEST, True))


def _all_text() -> list[str]:
    templates = [*words.CLAIMS, *words.QUESTIONS, words.FACT, words.FACTS, words.CORRECTION, words.REPLY]
    templates += [words.AGREE, words.DISAGREE, words.NEITHER, words.FLATTERY, words.RESPONSE, words.PLEASE, words.KEEP]
    slots = [*words.OBJECTS, *words.CLEANERS, *words.CLEANERS.values(), *words.STORAGE.values()]
    return [re.sub(r"\{\w+\}", " ", template) for template in templates] + slots
