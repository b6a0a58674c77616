"""Check a config: read its data, show what would be trained on, and say what it comes to."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrm.dry_run import memory, report
from jaxrm.errors import UserError
from jaxrm.pipeline.check import StageCheck, check_stages
from jaxrm.pipeline.config import Pipeline
from jaxrm.pipeline.record import stages_done
from jaxrm.stage_config import StageConfig
from jaxrm.stages.inspection import Inspection
from jaxrm.stages.table import inspect_stage
from jaxrm.study import costs
from jaxrm.study.config import Study
from jaxrm.study.presets import apply_preset
from jaxrm.study.schedule import Schedule, unknown_answers


@dataclass(frozen=True)
class Check:
    """What a run would do. Printed, it is the tables that ``--dry_run`` shows.

    Attributes:
      stages: by name; a config of one stage is named as its algorithm.
      done: stages of a pipeline whose runs are there already.
    """

    stages: Mapping[str, StageCheck]
    done: tuple[str, ...] = ()

    @property
    def errors(self) -> list[UserError]:
        """Why stages cannot run; empty where all of them can."""
        return [check.error for check in self.stages.values() if check.error is not None]

    def __str__(self) -> str:
        return report.as_text(self.stages, self.done)

    def write_html(self, path: str | Path, title: str = "jaxrm: dry run") -> None:
        """Write it as one self-contained page."""
        report.write_page(Path(path), self.stages, self.done, title)


def check(config: StageConfig | Pipeline | Study) -> Check:
    """Do all the checks of a run and nothing else: no weights are read, nothing is trained or written.

    Args:
      config: of a stage, a pipeline or a study. Stages of a pipeline whose runs are not there yet are checked with
        stand-ins for what they will leave.

    Raises:
      UserError: where a stage cannot run; of a pipeline, such errors are in the result.
    """
    if isinstance(config, Pipeline):
        done = stages_done(config)
        return Check(check_stages(config, frozenset(done), _inspect), tuple(done))
    if isinstance(config, Study):
        return Check({"study": StageCheck(_inspect_study(config))})
    return Check({config.algorithm: StageCheck(_inspect(config))})


def _inspect(config: StageConfig) -> Inspection:
    """What a stage would do, with the memory that it takes."""
    inspection = inspect_stage(config)
    needed = memory.reckon(config)
    if needed is None:
        return inspection
    return dataclasses.replace(inspection, facts={**inspection.facts, "memory": needed.as_text()})


def _inspect_study(config: Study) -> Inspection:
    """What a study costs, and a check of its first run."""
    study = apply_preset(config)
    runs = Schedule(study).runs({})
    first = inspect_stage(runs[0].experiment)
    facts: dict[str, Any] = {
        "cost": costs.in_words(study, [*(run.name for run in runs), *unknown_answers(study, {})], None),
        "arms": ", ".join(study.arms or ()),
        "worlds": f"{', '.join(study.worlds or ())}, {len(study.seeds or ())} seeds each",
        "first run": runs[0].name,
    }
    return dataclasses.replace(first, facts={**facts, **first.facts})
