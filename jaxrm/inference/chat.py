"""A chat on standard input and output."""

import sys

import jax

from jaxrm.data.records import Message
from jaxrm.errors import UserError
from jaxrm.inference.sampler import Sampler


def chat(sampler: Sampler, key: jax.Array) -> None:
    """Alternate turns until an empty line; the whole dialogue is the prompt of each response."""
    dialogue: list[Message] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            line = ""
        if not line:
            return
        dialogue.append(Message("user", line))
        _drop_oldest_turns(dialogue, sampler)
        response = sampler.respond([dialogue], jax.random.fold_in(key, len(dialogue)))[0]
        dialogue.append(Message("assistant", response))
        print(response)


def _drop_oldest_turns(dialogue: list[Message], sampler: Sampler) -> None:
    """Drop the oldest turns of a dialogue that has outgrown the model; a single message stays, to be refused."""
    while len(dialogue) > 1:
        try:
            sampler.encode([dialogue])
        except UserError:
            del dialogue[:2]
            print("(the oldest turns no longer fit and are forgotten)", file=sys.stderr)
        else:
            return
