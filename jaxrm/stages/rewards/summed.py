"""The sum of several reward sources, which is a source itself."""

import functools
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from jaxrm.algorithms.rollout import RewardSource
from jaxrm.algorithms.summed_rewards import sum_rewards
from jaxrm.errors import naming, option
from jaxrm.inference.text_scorer import TextScorer
from jaxrm.ops.reward_scaling import Calibration
from jaxrm.sharding import partition
from jaxrm.stages.rewards.model_run import shared_readings
from jaxrm.stages.rewards.text import TextRewards
from jaxrm.types import ResponseBatch, TokenRewards


class SummedRewards:
    """Reward source whose token rewards are the weighted sum of those of others.

    Its calibration is that of each of them, by name. `jaxrm.types.TokenRewards.parts` holds what each gave.

    Args:
      sources: by name, as ``config.rewards`` has them.
      weights: of each; one at least is not 0.
      end_ids: ids that end a response.
      mesh: the devices.
    """

    def __init__(
        self,
        sources: Mapping[str, RewardSource],
        weights: Mapping[str, float],
        *,
        end_ids: tuple[int, ...],
        mesh: Mesh,
    ) -> None:
        self.sources, self._shared = dict(sources), shared_readings(sources)
        rows = partition.batch_sharding(mesh)
        add = functools.partial(sum_rewards, weights=dict(weights), end_ids=end_ids)
        self._add = jax.jit(add, in_shardings=(rows, rows), out_shardings=rows)

    @property
    def needs_reference(self) -> bool:
        """Whether one of them does."""
        return any(source.needs_reference for source in self.sources.values())

    def __call__(
        self, calibration: Mapping[str, Calibration], batch: ResponseBatch, reference_log_probs: jax.Array | None
    ) -> TokenRewards:
        """Score responses with each source, one after another, and add. Sources of one model read it once.

        Raises:
          UserError: of a source, whose options it names.
        """
        parts: dict[str, TokenRewards] = {}
        for score in self._shared:
            parts |= score(calibration, batch, reference_log_probs)
        for name, source in self.sources.items():
            if name in parts:
                continue
            with naming({"reward": option(f"rewards.{name}")}):
                parts[name] = source(calibration[name], batch, reference_log_probs)
        return self._add(parts, batch)


def scorers_of(source: RewardSource | None) -> dict[str, TextScorer]:
    """What scores text in a source of rewards, by the names of a sum's sources; that of a single source has no name."""
    by_name = source.sources if isinstance(source, SummedRewards) else {"": source}
    return {name: part.scorer for name, part in by_name.items() if isinstance(part, TextRewards)}
