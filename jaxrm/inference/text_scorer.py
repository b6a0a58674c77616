"""Scorers of text: what rewards a response as text, and not as the policy's tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxrm.data.records import Message
from jaxrm.data.responses import Response


@dataclass(frozen=True)
class TextSample:
    """A response to be scored, as text.

    Attributes:
      prompt: the turns before the response.
      response: its text, with what was drawn.
      fields: the columns of the prompt's record by name, e.g. a reference answer.
    """

    prompt: Sequence[Message]
    response: Response
    fields: Mapping[str, Any]


class TextScorer(Protocol):
    """A function of text, a judge, or a model with a tokenizer of its own.

    Attributes:
      name: for people.
      is_collective: True for a model on the mesh: every process calls it with all samples, and gets the same scores.
        False for what runs on a host: process 0 of a job calls it, and the others get its scores.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - in the class's docstring

    @property
    def is_collective(self) -> bool: ...  # noqa: D102 - in the class's docstring

    def __call__(self, samples: Sequence[TextSample]) -> np.ndarray | Sequence[np.ndarray]:
        """Score responses.

        Returns:
          ``[B]`` float32, finite; where the kind of reward is one of tokens, ``[T_i]`` of each response instead, a
          number for each of its ``response.token_ids``.

        Raises:
          UserError: naming the option and the sample that could not be scored.
        """
        ...
