"""Draws that give the same in every version of Python."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """One of the options, evenly."""
    # Of the generator's methods only random() promises the same stream in every version of Python.
    return options[int(rng.random() * len(options))]


def pick_several(rng: random.Random, options: Sequence[T], count: int) -> list[T]:
    """`count` different places of `options`, evenly, in random order."""
    return sorted(options, key=lambda _: rng.random())[:count]


def confusions(rng: random.Random, right: dict[str, str], share: float) -> dict[str, str]:
    """A `share` of the keys, each with a value that is another key's: what is usually said of it by mistake."""
    chosen = sorted(pick_several(rng, list(right), round(share * len(right))))
    return {key: pick(rng, [value for value in right.values() if value != right[key]]) for key in chosen}
