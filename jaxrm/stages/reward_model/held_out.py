"""Held-out pairs of a reward model in training: which are scored and corrected, and how well they are ranked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxrm.algorithms import scoring
from jaxrm.data.pairs import TokenPair, readable_pairs
from jaxrm.data.readers import ReadReport
from jaxrm.data.records import PreferenceRecord
from jaxrm.inference.corrections import check_room
from jaxrm.inference.parameters import init_key
from jaxrm.inference.token_scores import policy_log_probs
from jaxrm.runtime.preemption import StopRequest
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.stages.inputs.preferences import Preferences
from jaxrm.stages.inputs.training_data import TrainingData
from jaxrm.stages.judge import check_judge
from jaxrm.stages.objective import Objective
from jaxrm.stages.reward_model.evaluation import (
    HeldOutPairs,
    PairScores,
    metrics,
    with_centered,
    with_length_residual,
)
from jaxrm.stages.stage import Stage
from jaxrm.stages.supervised.train import held_out_loss


@dataclass(frozen=True)
class RankedPairs:
    """The held-out pairs that the reward model can read whole.

    Attributes:
      pairs: as tokens.
      records: the same as text.
      corrected: the first of ``pairs``, whose responses are corrected when training ends.
      report: which pairs were left out.
    """

    pairs: Sequence[TokenPair]
    records: Sequence[PreferenceRecord]
    corrected: Sequence[TokenPair]
    report: ReadReport


def ranked_pairs(stage: Stage, held_out: Preferences, request: Sequence[int] | None) -> RankedPairs:
    """The held-out pairs that are ranked.

    Args:
      stage: whose config says how.
      held_out: side of the split.
      request: ids that ask a seq2seq reward model for a correction; None for a scalar one.

    Raises:
      UserError: where the judge knows nothing of a pair, or a correction would not fit behind its response.
    """
    config = stage.config
    pairs, report = readable_pairs(
        held_out.pairs,
        config.data.max_length,  # no longer than what it was trained on, and no larger in memory
        config.data,
        request=request,
        first_id=stage.bos_id,
    )
    records = [held_out.records[pair.source] for pair in pairs]
    check_judge(config.evaluation.judge, records)
    corrected = [] if request is None else pairs[: config.evaluation.corrections]
    if corrected:
        check_room(
            stage.model.config,
            request or (),
            config.evaluation.sampling.max_new_tokens,
            [response for pair in corrected for response in (pair.chosen, pair.rejected)],
            [pair.source for pair in corrected for _ in range(2)],
            field="evaluation.sampling.max_new_tokens",
        )
    return RankedPairs(pairs, records, corrected, report)


class PairEvaluation:
    """Held-out metrics of a reward model's parameters.

    The latest scores are remembered: the closing table is of the last parameters, and costs no further pass.

    Args:
      stage: whose config says how.
      folder: of the run, where the reference's log-probs are kept.
      objective: what is trained.
      data: with the held-out batches of the loss.
      ranked: the pairs.
      request: ids that ask a seq2seq reward model for a correction; None for a scalar one.
    """

    def __init__(
        self,
        stage: Stage,
        folder: RunFolder,
        objective: Objective,
        data: TrainingData,
        ranked: RankedPairs,
        request: tuple[int, ...] | None,
    ) -> None:
        self._reward, self._is_seq2seq = stage.config.reward, request is not None
        self._loss = held_out_loss(stage, objective, data.eval_batches)
        pairs = HeldOutPairs(ranked.pairs, stage.config.data.batch_size, stage.mesh)
        diagnostics = scoring.build_diagnostics(
            "scalar" if request is None else "seq2seq",
            objective.model.graphdef,
            request=request or (),
            end_ids=stage.end_ids,
            pad_to_multiple_of=stage.pad_to_multiple_of,
        )
        if request is not None and stage.config.model.path is not None:
            # The policy that the reward model starts from is its reference.
            pairs.keep_reference(
                folder.path / "reference_log_probs.npy",
                lambda: policy_log_probs(
                    stage.model, stage.init_params(init_key(stage.config.seed)), stage.mesh, whole=True
                ),
                is_writer=stage.is_writer,
            )
        self._read = pairs.reader(diagnostics, objective.model.shardings)
        self._latest: PairScores | None = None

    def __call__(self, params: Any, stop: StopRequest) -> dict[str, float]:
        """Held-out loss, and how the pairs are ranked.

        Raises:
          StoppedError: where it was asked to stop.
        """
        self._latest = self.scores(params, stop)
        return self._loss(params, stop) | metrics(self._latest, self._reward.kind)

    def scores(self, params: Any, stop: StopRequest | None = None) -> PairScores:
        """Scores of both responses of every pair, by kind of token reward."""
        scores = self._read(params, stop)
        return with_centered(scores if self._is_seq2seq else with_length_residual(scores), self._reward.center)

    def last_scores(self, params: Any) -> PairScores:
        """The scores of the last parameters: of the latest evaluation, or read now where there was none."""
        return self.scores(params) if self._latest is None else self._latest
