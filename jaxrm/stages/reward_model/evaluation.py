"""How well a reward model ranks the chosen response of held-out pairs above the rejected one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm import atomic
from jaxrm.data.pairs import TokenPair
from jaxrm.errors import UserError, flag
from jaxrm.evaluation.ranking import length_correlation, pair_accuracy
from jaxrm.evaluation.reliability import measure_reliability
from jaxrm.inference.response_batches import response_batches
from jaxrm.ops import reward_kinds
from jaxrm.runtime.preemption import StopRequest
from jaxrm.runtime.progress import print_table
from jaxrm.sharding import partition
from jaxrm.types import ResponseBatch

PairScores = dict[str, dict[str, np.ndarray]]  # kind -> diagnostic -> [2, N]: chosen, rejected


class HeldOutPairs:
    """Both sides of held-out pairs, on the devices.

    Args:
      pairs: N pairs.
      rows: responses in a batch.
      mesh: the devices.
    """

    def __init__(self, pairs: Sequence[TokenPair], rows: int, mesh: Mesh) -> None:
        self.pairs = pairs
        prompts = [pair.prompt for pair in pairs] * 2
        responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        self.lengths = np.array([len(response) for response in responses]).reshape(2, -1)
        self._batches = list(response_batches(prompts, responses, rows, mesh))
        self._copied = NamedSharding(mesh, PartitionSpec())
        self._rows = partition.batch_sharding(mesh)
        self._reference: Sequence[jax.Array | None] = [None] * len(self._batches)

    def keep_reference(
        self, file: Path, open_policy: Callable[[], Callable[[ResponseBatch], jax.Array]], *, is_writer: bool
    ) -> None:
        """Have the log-probs that a reference policy gives to the responses, for the kind ``contrast``.

        They are saved in a file, so that a run that is continued compares with the policy that it began with, and need
        not open it again.

        Args:
          file: where they are, or will be.
          open_policy: opens the policy; its function gives ``[B, T]`` log-probs, whole on every device.
          is_writer: whether this process writes.
        """
        longest = int(self.lengths.max())
        if file.exists():
            log_probs = np.load(file, allow_pickle=False)
        else:
            policy = open_policy()
            log_probs = np.zeros((self.lengths.size, longest), np.float32)
            for batch, indices in self._batches:
                computed = jax.device_get(policy(batch))[: len(indices), :longest]
                log_probs[indices, : computed.shape[1]] = computed
            if is_writer:
                with atomic.open_for_writing(file, "wb") as opened:
                    np.save(opened, log_probs)
        reference = []
        for batch, indices in self._batches:
            array = np.zeros(batch.responses.shape, np.float32)
            width = min(array.shape[1], longest)
            array[: len(indices), :width] = log_probs[indices, :width]
            reference.append(jax.make_array_from_callback(array.shape, self._rows, array.__getitem__))
        self._reference = reference

    def reader(self, diagnostics: Callable[..., Any], params_sharding: Any) -> Callable[..., PairScores]:
        """Function ``(params, stop=None)`` to the diagnostics of both sides; it looks at the request to stop.

        Args:
          diagnostics: from `jaxrm.algorithms.scoring`.
          params_sharding: where the parameters lie.
        """
        step = jax.jit(diagnostics, in_shardings=(params_sharding, self._rows, self._rows), out_shardings=self._copied)

        def read(params: Any, stop: StopRequest | None = None) -> PairScores:
            sides: PairScores = {}
            batches = zip(self._batches, self._reference, strict=True)
            for (batch, indices), reference in batches if stop is None else stop.checked(batches):
                for kind, names in jax.device_get(step(params, batch, reference)).items():
                    if not np.isfinite(names["sum"]).all():
                        raise UserError(
                            f"the {kind} rewards of held-out pairs are not finite, so nothing of these parameters was "
                            f"saved; try a lower {flag('optimizer.lr')}, or other weights than {flag('model.path')}"
                        )
                    for name, values in names.items():
                        array = sides.setdefault(kind, {}).setdefault(name, np.zeros(self.lengths.size))
                        array[indices] = values[: len(indices)]
            return {
                kind: {name: array.reshape(2, -1) for name, array in sides[kind].items()}
                for kind in reward_kinds.KINDS
                if kind in sides
            }

        return read


def with_length_residual(sides: PairScores) -> PairScores:
    """Add the kind ``scalar_length_residual``: the linear effect of length, fitted on both sides, taken out."""
    scores, lengths = sides["scalar"]["sum"], sides["scalar"]["length"]
    slope, intercept = np.polyfit(lengths.ravel(), scores.ravel(), 1) if np.ptp(lengths) > 0 else (0.0, scores.mean())
    residual = scores - (slope * lengths + intercept)
    return {**sides, "scalar_length_residual": {**sides["scalar"], "sum": residual, "mean": residual / lengths}}


def with_centered(sides: PairScores, center: str) -> PairScores:
    """Add ``centered``, the sum that PPO optimizes: tag and soft rewards lose their mean over the pairs' tokens.

    Args:
      sides: scores of both responses of every pair.
      center: as in `jaxrm.algorithms.reward_config.RewardConfig`; with ``none`` nothing is taken off.
    """

    def centered(kind: str, names: dict[str, np.ndarray]) -> np.ndarray:
        if center == "none" or not reward_kinds.KINDS[kind].is_centered:
            return names["sum"]
        return names["sum"] - names["length"] * (names["sum"].sum() / names["length"].sum())

    return {kind: {**names, "centered": centered(kind, names)} for kind, names in sides.items()}


def metrics(sides: PairScores, kind: str) -> dict[str, float]:
    """Metrics of one evaluation, for the rows of a run; those with a slash in their names are details.

    Args:
      sides: scores of both responses of every pair.
      kind: of token reward, whose share of pairs ranked right by its centered sum is ``eval_pair_accuracy``; where
        this sort of reward model has no such kind, its first is taken.
    """
    shown = sides.get(kind, next(iter(sides.values())))
    numbers = {"eval_pair_accuracy": pair_accuracy(*shown["centered"]).accuracy}
    if "scalar" in sides:
        gap = sides["scalar"]["sum"][0] - sides["scalar"]["sum"][1]
        numbers["eval_calibration_error"] = measure_reliability(gap).expected_calibration_error
    else:
        any_kind = next(iter(sides.values()))
        for i, side in enumerate(("chosen", "rejected")):
            numbers[f"eval_divergence_{side}"] = float(np.mean(any_kind["divergence"][i] / any_kind["length"][i]))
            numbers[f"eval_tag_rate_{side}"] = float(np.mean(any_kind["tag_rate"][i]))
            numbers[f"eval_end_tag/{side}"] = float(np.mean(any_kind["end_tag"][i]))
    for name, scores in sides.items():
        for i, side in enumerate(("chosen", "rejected")):
            numbers[f"eval_reward_sum/{name}_{side}"] = float(np.mean(scores["sum"][i]))
        numbers[f"eval_pairs/{name}_by_sum"] = pair_accuracy(*scores["sum"]).accuracy
        numbers[f"eval_pairs/{name}_by_centered_sum"] = pair_accuracy(*scores["centered"]).accuracy
        if reward_kinds.KINDS[name].reads != "response":
            numbers[f"eval_pairs/{name}_by_mean"] = pair_accuracy(*scores["mean"]).accuracy
        correlation = length_correlation(scores["sum"].ravel(), scores["length"].ravel())
        if correlation is not None:
            numbers[f"eval_length_correlation/{name}"] = correlation
    return numbers


def print_ranking(sides: PairScores, marks: np.ndarray | None = None) -> list[dict[str, Any]]:
    """Print how each kind ranks the pairs; returns the table's numbers.

    PPO optimizes the sum of token rewards after centering, so the verdict is by that. The residual's correlation with
    length is 0 by construction, since its line is fitted on these pairs.

    Args:
      sides: scores of both responses of every pair.
      marks: ``[2, N]`` exact utilities of both responses, or None. With them the table has one more column: how often
        the centered sum is higher for the response with the higher utility, whichever was labeled chosen. Pairs with
        equal utilities are left out.
    """
    rows, numbers = [], []
    better = None if marks is None or (marks[0] == marks[1]).all() else np.argsort(-marks, axis=0, kind="stable")
    for kind, names in sides.items():
        accuracy = {name: pair_accuracy(*names[name]) for name in ("centered", "sum", "mean")}
        correlation = length_correlation(names["sum"].ravel(), names["length"].ravel())
        shown = [f"{100 * p.accuracy:.1f} % [{100 * p.low:.1f}, {100 * p.high:.1f}]" for p in accuracy.values()]
        if reward_kinds.KINDS[kind].reads == "response":  # a score for the whole has no mean over tokens, and no center
            shown = ["–", shown[1], "–"]
        if better is not None and marks is not None:
            ranked = np.take_along_axis(names["centered"], better, axis=0)[:, marks[0] != marks[1]]
            accuracy["judge"] = pair_accuracy(*ranked)
            shown.append(f"{100 * accuracy['judge'].accuracy:.1f} %")
        rows.append(
            [
                kind,
                *shown,
                "–" if correlation is None else f"{round(correlation, 2) + 0.0:.2f}",
                accuracy["centered"].verdict,
            ]
        )
        numbers.append(
            {
                "kind": kind,
                **{f"by_{name}": [p.accuracy, p.low, p.high] for name, p in accuracy.items()},
                "length_correlation": correlation,
                "verdict": accuracy["centered"].verdict,
            }
        )
    count = next(iter(sides.values()))["sum"].shape[1]
    print_table(
        f"{count} held-out pairs: chosen above rejected, with 95 % intervals",
        [
            "kind",
            "by centered sum",
            "by sum",
            "by mean",
            *(["as the judge"] if better is not None else []),
            "length r",
            "so it",
        ],
        rows,
    )
    return numbers


def print_divergence(sides: PairScores) -> dict[str, dict[str, float]]:
    """Print where a seq2seq reward model begins to disagree with each side; returns the table's numbers."""
    names = next(iter(sides.values()))
    numbers: dict[str, dict[str, float]] = {}
    for i, side in enumerate(("chosen", "rejected")):
        at, length = names["divergence"][i], names["length"][i]
        numbers[side] = {
            "first_disagreement_token": float(np.mean(at)),
            "first_disagreement_share": float(np.mean(at / length)),
            "never_disagrees": float(np.mean(at >= length)),
            "tag_rate": float(np.mean(names["tag_rate"][i])),
            "end_tag": float(np.mean(names["end_tag"][i])),
            "length": float(np.mean(length)),
        }
    labels = {
        "first_disagreement_token": "tokens before the first disagreement",
        "first_disagreement_share": "  as a share of the response",
        "never_disagrees": "share never disagreed with",
        "tag_rate": "share of + tags",
        "end_tag": "share whose end is tagged +",
        "length": "length in tokens",
    }
    print_table(
        "Where the reward model disagrees",
        ["", "chosen", "rejected"],
        [[text, numbers["chosen"][name], numbers["rejected"][name]] for name, text in labels.items()],
    )
    return numbers


def print_reliability(sides: PairScores) -> dict[str, Any]:
    """Print how far a scalar reward model's confidence can be believed; returns the table's numbers."""
    reliability = measure_reliability(sides["scalar"]["sum"][0] - sides["scalar"]["sum"][1])
    print_table(
        f"Calibration of the scalar rewards: expected error {reliability.expected_calibration_error:.3f}, "
        f"Brier {reliability.brier:.3f}, log loss {reliability.log_loss:.3f}",
        ["confidence", "share right", "pairs"],
        reliability.rows,
    )
    return {
        "expected_calibration_error": reliability.expected_calibration_error,
        "brier": reliability.brier,
        "log_loss": reliability.log_loss,
        "rows": [list(row) for row in reliability.rows],
    }
