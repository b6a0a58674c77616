"""Reports of a PPO run: metrics of every step, warnings with likely causes, and the closing report."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxrm.errors import flag
from jaxrm.runtime import hardware
from jaxrm.runtime.metrics import PHASES, MetricsWriter, read_rows
from jaxrm.runtime.progress import Progress, format_value, print_table
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.stages.rewards.judges import print_costs

_QUIET = 20  # steps after a warning in which it is not repeated


class PPOReporter:
    """Sends metrics to the progress bar at every step and to the files every so often, and warns.

    Args:
      writer: of the metrics files.
      progress: the bar.
      every: steps between rows; evaluations always have one.
      num_steps: the last step, which always has a row.
      learning_rate: of the policy, at a step counted from 0.
      seen: rows of earlier steps, which warnings compare with.
      judge_costs: what judges cost so far, as fields of a row.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        progress: Progress,
        *,
        every: int,
        num_steps: int,
        learning_rate: Callable[[int], Any],
        seen: Iterable[Mapping[str, float]] = (),
        judge_costs: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self._writer, self._progress = writer, progress
        self._every, self._num_steps, self._learning_rate = every, num_steps, learning_rate
        self._judge_costs = judge_costs
        self._seen: list[Mapping[str, float]] = list(seen)
        self._warned: dict[str, int] = {}

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one step."""
        self._progress.update(
            step,
            reward=metrics["reward"],
            **{name: x for name, x in metrics.items() if name.startswith("reward/")},
            kl=metrics["kl"],
            length=metrics["response_length"],
            tokens_per_second=metrics["tokens_per_second"],
        )
        if step % self._every == 0 or step == self._num_steps:
            device = hardware.device_memory()
            measured = {
                "learning_rate": float(self._learning_rate(step - 1)),
                "host_memory_gib": hardware.host_memory_gib(),
                "device_memory_gib": None if device is None else device.peak,
            }
            there = {name: x for name, x in measured.items() if x is not None}
            self._writer.write(step, {**metrics, **there, **self._judge_costs()})
        self._seen.append(dict(metrics))
        for name, text in warnings(self._seen).items():
            if step - self._warned.get(name, -_QUIET) >= _QUIET:
                self._warned[name] = step
                self._progress.print(f"step {step}: warning: {text}")

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Held-out metrics after ``step`` steps."""
        self._writer.write(step, {**metrics, **self._judge_costs()})
        shown = {name: x for name, x in metrics.items() if "/" not in name or name.startswith("eval_reward/")}
        line = " · ".join(f"{name.removeprefix('eval_')} {format_value(x)}" for name, x in shown.items())
        self._progress.print(f"step {step}: held-out {line}")


def warnings(seen: list[Mapping[str, float]]) -> dict[str, str]:
    """Warnings about the latest of the steps seen so far, with likely causes; by a short name."""
    now, texts = seen[-1], {}
    # Of one response there is no error to compare with; below a thousandth of a nat it is rounding.
    if len(seen) >= 3 and all(row["kl_error"] > 0 and row["kl"] < -4 * row["kl_error"] - 1e-3 for row in seen[-3:]):
        texts["negative KL"] = (
            f"the KL to the reference is {now['kl']:.3g} nats a response, three steps running, but the true one cannot "
            "be negative: responses were not drawn from the distribution whose log-probs are taken. Likely causes: "
            "another template or tokenizer than the reference's, attention kernels of different precision in sampling "
            f"and training ({flag('model.attention')}, {flag('model.dtype')}), responses cut before their end token"
        )
    if now["entropy"] < 0.1 * seen[0]["entropy"]:
        texts["entropy"] = (
            f"the entropy fell from {seen[0]['entropy']:.3g} to {now['entropy']:.3g} nats a token: the policy hardly "
            f"explores any more. Likely causes: a learning rate too high ({flag('optimizer.lr')}), a KL penalty too "
            f"weak "
            f"({flag('ppo.kl_coef')}), a reward that one fixed answer satisfies"
        )
    earlier = [row["value_loss"] for row in seen[:-1] if "value_loss" in row]
    if len(earlier) >= 5 and now["value_loss"] > 20 * max(statistics.median(earlier), 1e-6):
        texts["value loss"] = (
            f"the value loss is {now['value_loss']:.3g}, twenty times its median so far. Likely causes: rewards of "
            f"very different size ({flag('reward.scale')}=unit, {flag('ppo.reward_clip')}), a critic that learns "
            f"too fast "
            f"({flag('critic.optimizer.lr')})"
        )
    if now["ended"] == 0:
        texts["truncated"] = (
            f"no response reached its end token within {now['response_length']:.0f} tokens. Likely causes: too short a "
            f"{flag('rollout.sampling.max_new_tokens')}, an SFT policy that never learned to stop, a reward that "
            f"pays for "
            f"length ({flag('reward.center')}=running, {flag('ppo.missing_end_penalty')})"
        )
    # Shares of ends with tag -; of a reward model without tags there are none.
    first, last = (statistics.fmean(row["ended"] - row["end_tag"] for row in rows) for rows in (seen[:5], seen[-5:]))
    if len(seen) >= 10 and last > first + 0.2:
        texts["early ends"] = (
            f"{last:.0%} of the responses end where the reward model would go on, {first:.0%} at first: "
            "the policy stops before it can be wrong. Likely causes: a "
            f"reward that charges such an end as one token ({flag('ppo.early_end_penalty')}=1), a learning rate too "
            f"high ({flag('optimizer.lr')})"
        )
    return texts


def source_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[list[Any]]:
    """A row for each source of a sum of rewards, from two rows of held-out metrics; none for a single source.

    Its reward before and after; after training its share (see `jaxrm.algorithms.summed_rewards.metrics_of_sums`), and
    its correlations with the length and with the other sources.
    """
    prefix = "eval_reward/"
    names = [field.removeprefix(prefix) for field in after if field.startswith(prefix)]
    rows = []
    for name in names:
        share, by_length = (after[f"eval_reward_{field}/{name}"] for field in ("share", "length_correlation"))
        with_others = [
            None if other == name else after[f"eval_reward_correlation/{'/'.join(sorted((name, other)))}"]
            for other in names
        ]
        rewards = [row.get(f"{prefix}{name}") for row in (before, after)]
        rows.append([name, *rewards, share, by_length, *with_others])
    return rows


def source_columns(rows: Sequence[Sequence[Any]], steps: tuple[str, str]) -> list[str]:
    """Names of the columns of `source_rows`; ``steps`` are those of the rewards before and after."""
    return [
        "source",
        *(f"reward, {step}" for step in steps),
        "share",
        "r with length",
        *(f"r with {row[0]}" for row in rows),
    ]


def closing_report(folder: RunFolder, kind: str, prompts: int) -> dict[str, Any]:
    """Print the seconds of a step by phase; returns held-out metrics before and after, from the rows of the run."""
    rows = read_rows(folder.metrics)
    steps = [row for row in rows if "step_seconds" in row]
    if steps:
        print_table(
            f"A step took {statistics.median(row['step_seconds'] for row in steps):.3g} s (median)",
            ["phase", "seconds", "tokens/s"],
            [
                [
                    phase,
                    statistics.median(row[f"{phase}_seconds"] for row in steps),
                    statistics.median(row[f"{phase}_tokens_per_second"] for row in steps),
                ]
                for phase in PHASES
            ],
        )
    mismatch = [row["sampler_mismatch"] for row in steps if "sampler_mismatch" in row]
    if mismatch:
        print(
            f"Log-probs of the sampler differ from those of training by {statistics.median(mismatch):.3g} nats a token "
            f"(median; at most {max(mismatch):.3g})"
        )
    print_costs(rows[-1] if rows else {})
    evaluated = [row for row in rows if "eval_reward" in row]
    if sources := source_rows(evaluated[0], evaluated[-1]):
        steps_shown = f"step {evaluated[0]['step']}", f"step {evaluated[-1]['step']}"
        print_table("Sources of the reward, held-out data", source_columns(sources, steps_shown), sources)
    sides = {
        name: {field.removeprefix("eval_"): row[field] for field in row if field.startswith("eval_")}
        for name, row in (("before", evaluated[0]), ("after", evaluated[-1]))
    }
    return {"step": evaluated[-1]["step"], "prompts": prompts, "kind": kind, **sides}
