"""How long prompts and responses are in a plan, and what follows from that for a rollout.

Lengths of responses are taken to be geometric: each token ends a response with the same chance, until the limit does
(jaxrm choice). Without a mean every response reaches the limit.
"""

import math
from dataclasses import dataclass

import numpy as np

from jaxrm.errors import UserError

_SLOT_USE = 0.87  # of the slots of geometric lengths: tests/benchmarks/decode.py --of=ragged


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens.

    Attributes:
      prompt: of a prompt, in the mean.
      limit: of the longest response.
      response: of a response in the mean, were there no limit; infinite where all reach it.
    """

    prompt: float
    limit: int
    response: float = math.inf

    @property
    def is_expected(self) -> bool:
        """Whether a mean was given."""
        return self.response < math.inf

    @property
    def mean(self) -> float:
        """Of a response."""
        return self.longest(1)

    def longest(self, rows: int) -> float:
        """Length that the longest of ``rows`` responses is expected to have."""
        return float(np.sum(1.0 - (1.0 - self._lasting()) ** rows))

    def decoding_steps(self, prompts: int, n: int, groups: int) -> float:
        """Tokens after the first that all steps of decoding write one after another.

        Args:
          prompts: to answer.
          n: responses to each, whose slots are taken anew together.
          groups: of n slots; where there are fewer than prompts, slots are taken anew.
        """
        if groups >= prompts:
            return self.longest(prompts * n) - 1
        steps = (self.longest(n) - 1) * prompts / groups
        return max(steps / _SLOT_USE, self.longest(groups * n) - 1) if self.is_expected else steps

    def tokens_read(self, block: int) -> float:
        """Own tokens that a response reads until it ends, in whole blocks of ``block``."""
        t = np.arange(1, self.limit + 1)
        return float(np.sum(self._lasting() * np.minimum(-(-t // block) * block, self.limit)))

    def drawn(self, rows: int) -> np.ndarray:
        """Lengths of ``rows`` responses, always the same ones."""
        if not self.is_expected:
            return np.full(rows, self.limit)
        return np.minimum(np.random.default_rng(0).geometric(1.0 / self.response, rows), self.limit)

    def _lasting(self) -> np.ndarray:
        """Chance that a response has a token ``t``, of each from 1 to the limit."""
        return (1.0 - 1.0 / self.response) ** np.arange(self.limit)


def expected_lengths(mean_prompt: float | None, mean_response: float, prompt: int, limit: int) -> Lengths:
    """Lengths that a user expects.

    Args:
      mean_prompt: None for the longest.
      mean_response: below the limit.
      prompt: tokens of the longest prompt.
      limit: of the longest response.

    Raises:
      UserError: where a mean is above the longest.
    """
    for flag, mean, longest in (("--mean_prompt", mean_prompt, prompt), ("--mean_response", mean_response, limit)):
        if mean is not None and not 1 <= mean <= longest:
            raise UserError(flag, f"{mean:g}", f"from 1 to the {longest} tokens of the config", f"{flag}={longest}")
    return Lengths(float(mean_prompt or prompt), limit, float(mean_response))


def in_words(lengths: Lengths) -> str:
    """The means, for a heading."""
    return f"prompts of {lengths.prompt:g} tokens, responses of {lengths.response:g} in the mean"
