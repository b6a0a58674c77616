"""Token rewards of responses, as a person reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrm.reports import notebook, text_table


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """Token rewards of N responses, in their order; response ``i`` has ``T_i`` tokens, the end token included.

    In a notebook it draws itself: every token on the color of its reward. Elsewhere it prints as a table.

    Attributes:
      records: one response each, as `jaxrm.inference.token_scores.as_record` makes them.
      reward_model: where the reward model came from.
    """

    records: Sequence[Mapping[str, Any]]
    reward_model: str

    @property
    def kind(self) -> str | None:
        """Kind of token reward; None where nothing was scored."""
        return self.records[0]["kind"] if self.records else None

    @property
    def tokens(self) -> list[list[str]]:
        """Text of each token, ``N`` lists of ``T_i``."""
        return [list(response["tokens"]) for response in self._responses]

    @property
    def rewards(self) -> list[np.ndarray]:
        """Reward of each token, ``N`` arrays ``[T_i]`` float32, before scale and center."""
        return [np.array(response["rewards"], np.float32) for response in self._responses]

    @property
    def tags(self) -> list[np.ndarray] | None:
        """Whether the reward model would have written each token too, ``N`` arrays ``[T_i]`` bool.

        None where the reward model is a scalar one.
        """
        tags = [response["tags"] for response in self._responses]
        return None if any(each is None for each in tags) else [np.array(each, bool) for each in tags]

    @property
    def sum(self) -> np.ndarray:
        """Reward of each response, ``[N]`` float32: the sum over its tokens."""
        return np.array([response["sum"] for response in self._responses], np.float32)

    @property
    def _responses(self) -> list[Mapping[str, Any]]:
        return [record["responses"][0] for record in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return text_table.token_rewards(self.records)

    def _repr_html_(self) -> str:
        return notebook.token_rewards_html(self.records)
