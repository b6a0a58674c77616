"""What a study costs: seconds of one core for each sort of run, measured, and how many runs of each there are."""

from collections.abc import Iterable, Mapping, Sequence

from jaxrm.runtime.progress import format_seconds
from jaxrm.study.arms import read_arm
from jaxrm.study.config import Study

# Seconds of one core of a busy server, with the settings of configs/study.py and the tiny policy.
SECONDS = {
    "sft": 170.0,
    "pairs": 12.0,
    "rm_scalar": 30.0,
    "rm_seq2seq": 45.0,
    "rm_dpo": 40.0,
    "winners": 30.0,
    "imitation": 25.0,
    "dpo": 40.0,
    "rewarded": 80.0,
    "answers": 7.5,
    "mechanism": 10.0,
}
_LARGER = {"tiny": 1.0}
"""How many times as long a run of a larger policy takes, where it was measured."""


def in_words(study: Study, names: Sequence[str], worker_count: int | None) -> str:
    """How many runs there are, and how long they may take.

    Args:
      study: from `jaxrm.study.presets.apply_preset`.
      names: of the runs that are to come.
      worker_count: runs at once; None where it is not known yet.
    """
    seconds = seconds_of(study, names, {})
    if seconds is None:
        return f"{len(names):,} runs, of a size whose cost is not known; the first runs will tell"
    text = f"{len(names):,} runs, about {seconds / 3600:.1f} hours of one core"
    if worker_count is not None and worker_count > 1:
        text += f", so about {format_seconds(seconds / worker_count)} with {worker_count} workers"
    return text


def seconds_of(study: Study, names: Iterable[str], measured: Mapping[str, float]) -> float | None:
    """Seconds that runs may take one after another; None where nothing is known of some of them.

    Args:
      study: from `jaxrm.study.presets.apply_preset`.
      names: of the runs.
      measured: seconds of runs that are done, which count before the table.
    """
    by_sort: dict[str, list[float]] = {}
    for name, seconds in measured.items():
        by_sort.setdefault(sort_of(name), []).append(seconds)
    total = 0.0
    for name in names:
        sort = sort_of(name)
        if sort in by_sort:
            total += sum(by_sort[sort]) / len(by_sort[sort])
        elif (study.size or "tiny") in _LARGER and study.preset != "smoke":
            total += SECONDS[sort] * _LARGER[study.size or "tiny"]
        else:
            return None
    return total


def sort_of(name: str) -> str:
    """The sort of a run, by its name: runs of a sort take about as long as each other."""
    what = name.split("/")[2]
    if what in SECONDS:
        return what
    if read_arm(what) is not None:
        return "rewarded"
    if what.startswith("winners"):
        return "winners"
    return "imitation" if what == "sft_chosen" or what.startswith("rft_") else what.removesuffix("_lora")
