"""Judges behind endpoints among the sources of rewards: whether they can be asked, and what they cost."""

import functools
from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxrm.algorithms.reward_config import naming_source, sources_of
from jaxrm.algorithms.rollout import RewardSource
from jaxrm.inference.endpoint_scorer import EndpointScorer
from jaxrm.runtime.metrics import JUDGE_COST
from jaxrm.runtime.processes import once_a_job
from jaxrm.runtime.progress import print_table
from jaxrm.stages.rewards.summed import scorers_of


def check_reachable(config: Any) -> None:
    """Refuse a judge that cannot be asked, before weights are read; no question is put. A dry run does not call it.

    Process 0 of a job looks, since it is the one that will ask.

    Args:
      config: of a stage with rewards.

    Raises:
      UserError: in every process of the job.
    """
    for name, source in sources_of(config).items():
        if source.endpoint is None:
            continue
        with naming_source(config, name):
            once_a_job(functools.partial(_check, EndpointScorer(source.endpoint)), (0,))


def _check(judge: EndpointScorer) -> np.ndarray:
    judge.check()
    return np.zeros(0, np.float32)  # for the other processes there is nothing to know


def judges_in_words(config: Any) -> dict[str, str]:
    """For a dry run: which judges would be asked; empty where there are none."""
    urls = {name: source.endpoint.url for name, source in sources_of(config).items() if source.endpoint is not None}
    if not urls:
        return {}
    return {"judge": f"a question for each response to {', '.join(urls.values())}; not called in a dry run"}


class JudgeCosts:
    """What the judges of a run cost since it began, whichever launch asked.

    Args:
      source: of rewards, in which judges are looked for.
      row: of metrics, in which an earlier launch wrote what they had cost.
    """

    def __init__(self, source: RewardSource | None, row: Mapping[str, float] = MappingProxyType({})) -> None:
        scorers = scorers_of(source)
        self._judges = {name: judge for name, judge in scorers.items() if isinstance(judge, EndpointScorer)}
        self._before = {name: _read(row, name) for name in self._judges}

    def metrics(self) -> dict[str, float]:
        """The costs as fields of a row: ``judge_calls`` and so on, or ``judge_calls/NAME`` of a named source."""
        return {
            _field(field, name): before[field] + value
            for name, before in self._before.items()
            for field, value in asdict(self._judges[name].cost).items()
        }


def print_costs(row: Mapping[str, float]) -> None:
    """A table of what judges cost, from a row of `JudgeCosts.metrics`; nothing where there were none."""
    names = [name.partition("/")[2] for name in row if name.partition("/")[0] == _field("calls", "")]
    if names:
        print_table(
            "The judge's cost",
            ["", *(name or "in all" for name in names)],
            [[field.replace("_", " "), *(row.get(_field(field, name), 0.0) for name in names)] for field in JUDGE_COST],
        )


def _read(row: Mapping[str, float], name: str) -> dict[str, float]:
    return {field: row.get(_field(field, name), 0.0) for field in JUDGE_COST}


def _field(field: str, name: str) -> str:
    return f"judge_{field}{f'/{name}' if name else ''}"
