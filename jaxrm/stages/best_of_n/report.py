"""What best-of-n writes: a row for each prompt as it is drawn, the winners as demonstrations, and the closing table."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxrm import atomic
from jaxrm.algorithms.best_of_n import Best, kl_bound
from jaxrm.algorithms.reward_config import in_words
from jaxrm.algorithms.summed_rewards import metrics_of_rows
from jaxrm.data import tasks
from jaxrm.data.prompts import PromptExample
from jaxrm.data.tasks.prompts import prompt_field
from jaxrm.errors import UserError, flag
from jaxrm.runtime.metrics import json_line
from jaxrm.runtime.progress import print_table
from jaxrm.stage_config import BestOfN

Row = dict[str, Any]


def candidate_rows(
    number: int,
    examples: Sequence[PromptExample],
    best: Best,
    text: Callable[[np.ndarray], str],
    end_ids: Iterable[int],
    task: str | None,
    weights: Mapping[str, float] = MappingProxyType({}),
) -> list[Row]:
    """A row of ``candidates.jsonl`` for each prompt of a batch.

    Args:
      number: of the batch, from 0.
      examples: its prompts, without what fills it up.
      best: its winners, as NumPy arrays.
      text: a response's ids as text.
      end_ids: ids that end a response.
      task: embedded task whose judge marks the responses, or None.
      weights: of the sources of a sum of rewards, by name.
    """
    ends = list(end_ids)
    rows = []
    for i, example in enumerate(examples):
        row: Row = {"step": number, "prompt": prompt_field(example.messages)}
        rewards = [float(x) for x in best.candidate_rewards[i]]
        winner = rewards.index(max(rewards))
        for name, batch, drawn in (("winner", best.responses, winner), ("first", best.first, 0)):
            ids = np.asarray(batch.responses[i][batch.response_mask[i]])
            response = text(ids)
            answer: Row = {"response": response, "reward": rewards[drawn], "length": len(ids)}
            if best.candidate_parts:
                parts = {source: float(x[i, drawn]) for source, x in best.candidate_parts.items()}
                answer["sources"] = {source: {"weight": weights[source], "reward": x} for source, x in parts.items()}
            answer["ended"] = bool(np.isin(ids, ends).any())
            if task is not None:
                answer["judge"] = float(tasks.judge(task, example.messages, response))
                answer["behaviour"] = tasks.behavior(task, example.messages, response)
            row[name] = answer
        rows.append(row | {"rewards": rewards})
    return rows


def lines_of(rows: Iterable[Row]) -> str:
    """The rows as JSONL."""
    return "".join(map(json_line, rows))


def write_winners(target: Path, rows: Sequence[Row], config: BestOfN) -> None:
    """Write the winners as demonstrations, all at once, without those that nothing can be learned from.

    Raises:
      UserError: where none is left.
    """
    winners = [row for row in rows if _is_kept(row, config)]
    if not winners:
        longest = config.rollout.sampling.max_new_tokens
        raise UserError(
            f"none of the {len(rows):,} winners has an end token within {longest} tokens, so there is nothing to learn "
            f"from; give a policy that stops, or longer responses, e.g. {flag('rollout.sampling.max_new_tokens')}="
            f"{2 * longest}, or keep what was cut off, {flag('best_of_n.keep_truncated')}=True"
        )
    atomic.write_text(target, "".join(json.dumps(_winner(row), ensure_ascii=False) + "\n" for row in winners))


def summary(rows: Sequence[Row], config: BestOfN) -> dict[str, Any]:
    """What ``evaluation.json`` holds: means over the prompts for one candidate and for the winner.

    The candidate's reward is the mean of all n; the other means are of the first one.
    """
    n = config.best_of_n.n
    sides: dict[str, dict[str, float]] = {}
    for name, column in (("candidate", "first"), ("winner", "winner")):
        answers = [row[column] for row in rows]
        means = {"reward": statistics.fmean(answer["reward"] for answer in answers)}
        if name == "candidate":
            means["reward"] = statistics.fmean(reward for row in rows for reward in row["rewards"])
        if all("judge" in answer for answer in answers):
            means["judge"] = statistics.fmean(answer["judge"] for answer in answers)
        keys = dict.fromkeys(key for answer in answers for key in answer.get("behaviour", {}))
        for key in keys:  # over the prompts that it applies to
            means[key] = statistics.fmean(a["behaviour"][key] for a in answers if key in a.get("behaviour", {}))
        means |= metrics_of_rows(answers)
        means["length"] = statistics.fmean(answer["length"] for answer in answers)
        means["ended"] = statistics.fmean(answer["ended"] for answer in answers)
        means["distinct"] = len({answer["response"] for answer in answers}) / len(answers)
        sides[name] = means
    return {
        "prompts": len(rows),
        "n": n,
        "kind": in_words(config),
        "kl_bound": kl_bound(n),
        "not_the_first": statistics.fmean(row["rewards"][0] < max(row["rewards"]) for row in rows),
        "all_equal": statistics.fmean(min(row["rewards"]) == max(row["rewards"]) for row in rows),
        "winners": sum(_is_kept(row, config) for row in rows),
        **sides,
    }


def print_summary(numbers: dict[str, Any], max_new_tokens: int) -> None:
    """Print what `summary` counted."""
    n, prompts = numbers["n"], numbers["prompts"]
    columns = ("candidate", "winner")
    shown = [name for name in numbers["candidate"] if "/" not in name or name.startswith("reward/")]
    print_table(
        f"Best of {n} by {numbers['kind']} rewards, {prompts:,} prompts",
        ["mean", *columns],
        [[_LABELS.get(name, name), *(numbers[side].get(name) for side in columns)] for name in shown],
    )
    print(
        f"KL of best-of-{n} to the policy: at most log n - (n - 1)/n = {numbers['kl_bound']:.3g} nats a response "
        "(arXiv 2401.01879), a bound and no measurement."
    )
    if n > 1:
        print(
            f"Another than the first response won in {100 * numbers['not_the_first']:.1f} % of the prompts; in "
            f"{100 * numbers['all_equal']:.1f} % all {n} had the same reward."
        )
    if dropped := prompts - numbers["winners"]:
        print(f"{dropped:,} winners are no demonstrations: cut off after {max_new_tokens} tokens, or empty.")


_LABELS = {"length": "length, tokens", "ended": "with an end token", "distinct": "distinct texts, share"}


def _winner(row: Row) -> Row:
    """A demonstration, with what is known of it beside."""
    winner, rewards = row["winner"], row["rewards"]
    spread = {
        "mean": statistics.fmean(rewards),
        "deviation": statistics.pstdev(rewards),
        "lowest": min(rewards),
        "highest": max(rewards),
    }
    about = {"response": winner["response"], "reward": winner["reward"], "rewards_of_candidates": spread}
    return {"prompt": row["prompt"], **about} | {name: winner[name] for name in ("judge",) if name in winner}


def _is_kept(row: Row, config: BestOfN) -> bool:
    winner = row["winner"]
    return bool(winner["response"].strip()) and (config.best_of_n.keep_truncated or winner["ended"])
