"""What names of files, folders and fields say of a split: ``hh_train.jsonl``, ``dev/``, ``test-00000-of-00002``.

The words are those of the ``datasets`` library, and those for held-out data.
"""

import re
from collections.abc import Iterable

TRAIN = "train"
_WORDS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
    "heldout": ("heldout", "holdout"),
}
_SPLITS = {word: split for split, words in _WORDS.items() for word in words}


def words(name: str) -> tuple[str, ...]:
    """The words and numbers of a name in lower case: ``hhTest-01`` is hh, test, 01."""
    text = re.sub(r"(?i)(held|hold)[^a-z0-9]+out", r"\1out", name)
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]+", text)
    return tuple(part.lower() for part in parts)


def splits(name: str) -> frozenset[str]:
    """The splits that a name has a word for, each under its first word: train, validation, test, heldout."""
    known = (_SPLITS.get(word) or _SPLITS.get(re.sub(r"(set|data|split)$", "", word)) for word in words(name))
    return frozenset(split for split in known if split)


def names_split(name: str, split: str) -> bool:
    """Whether a name has the words of ``split`` one after the other."""
    parts, wanted = words(name), words(split)
    return bool(wanted) and any(parts[i : i + len(wanted)] == wanted for i in range(len(parts)))


def is_split(value: str, split: str) -> bool:
    """Whether a whole name is that of ``split``, perhaps under its other word: ``dev`` is ``validation``."""
    one, other = "".join(words(value)), "".join(words(split))
    return one == other or (one in _SPLITS and _SPLITS.get(one) == _SPLITS.get(other))


def choose(names: Iterable[str], split: str) -> str | None:
    """The one of several declared splits that ``split`` is, or None."""
    declared = list(names)
    same = [name for name in declared if name == split] or [name for name in declared if is_split(name, split)]
    return same[0] if len(same) == 1 else None


def pattern(name: str) -> str:
    """The name with its numbers as ``#``: the same for the parts of one split, another for ``v2`` or ``10k``."""
    return re.sub(r"(?<![vV\d])\d+(?![a-zA-Z\d])", "#", name)


def missing_part(names: Iterable[str]) -> str | None:
    """The first part that files named ``…-00000-of-00003…`` lack, or None."""
    parts: dict[tuple[str, str, str], dict[int, str]] = {}
    for name in names:
        if match := re.fullmatch(r"(.*?)(\d+)(-of-\d+)(.*)", name, re.DOTALL):
            parts.setdefault((match[1], match[3], match[4]), {})[int(match[2])] = match[2]
    for (before, of, after), numbers in parts.items():
        total, first = int(of.removeprefix("-of-")), 0 if 0 in numbers else 1
        for number in range(first, min(first + total, first + len(numbers) + 1)):
            if number not in numbers:
                width = len(next(iter(numbers.values())))
                return f"{before}{number:0{width}d}{of}{after}"
    return None
