"""Random choices that are the same in every version of Python."""

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """One of the options, uniformly."""
    # Of the generator's methods only random() promises the same stream in every version of Python.
    return options[int(rng.random() * len(options))]


def pick_several(rng: random.Random, options: Sequence[T], count: int) -> list[T]:
    """``count`` options at different positions, uniformly, in random order."""
    return sorted(options, key=lambda _: rng.random())[:count]


def confusions(rng: random.Random, right: dict[str, str], share: float) -> dict[str, str]:
    """A ``share`` of the keys, each with the value of another key: its usual mistake."""
    chosen = sorted(pick_several(rng, list(right), round(share * len(right))))
    return {key: pick(rng, [value for value in right.values() if value != right[key]]) for key in chosen}
