"""The reward model stage: sequence MLE on both mappings, or the scalar Bradley-Terry baseline, from the same pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxrm import atomic
from jaxrm.algorithms import scalar_rm, seq2seq_rm
from jaxrm.data.examples import MarkedMappingExample
from jaxrm.data.pairs import TokenPair, correction_request
from jaxrm.data.readers import ReadReport
from jaxrm.inference import sharded_model
from jaxrm.inference.corrections import Corrector
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.models import build, heads
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.sharding.mesh import build_mesh
from jaxrm.stages.inputs.preferences import load_preferences
from jaxrm.stages.inputs.training_data import TrainingData
from jaxrm.stages.inspection import Inspection, inspect_training
from jaxrm.stages.judge import check_judge, judge_pairs
from jaxrm.stages.objective import Objective, build_objective
from jaxrm.stages.report import print_held_out, print_reading, print_size
from jaxrm.stages.reward_model.corrections import print_corrections
from jaxrm.stages.reward_model.evaluation import PairScores, print_divergence, print_ranking, print_reliability
from jaxrm.stages.reward_model.examples import reward_model_data
from jaxrm.stages.reward_model.held_out import PairEvaluation, RankedPairs, ranked_pairs
from jaxrm.stages.stage import Stage, check_training, open_stage
from jaxrm.stages.supervised.train import exit_status, train
from jaxrm.types import ComparisonBatch, MappingBatch, MarkedComparisonBatch, MarkedMappingBatch


@dataclass(frozen=True)
class _Inputs:
    """What a run trains on and is evaluated on, read before its folder is made.

    Attributes:
      stage: that was opened.
      objective: what is minimized.
      data: batches.
      reading: what became of the pairs, by the name of the data.
      ranked: held-out pairs that are ranked.
      request: ids that ask for a correction; None for a scalar reward model.
    """

    stage: Stage
    objective: Objective
    data: TrainingData
    reading: Mapping[str, ReadReport]
    ranked: RankedPairs
    request: tuple[int, ...] | None


def run(config: Any) -> int:
    """Run the stage, or what is left of it.

    Returns:
      Exit status: 0 when the run is complete, 75 when it was asked to stop and saved.

    Raises:
      UserError: for what the user can mend, before anything is written wherever it can be known by then.
    """
    inputs = _open_inputs(config)
    stage, objective, data, ranked, request = inputs.stage, inputs.objective, inputs.data, inputs.ranked, inputs.request
    folder = stage.open_run([data.examples, str(inputs.reading)])
    if stage.is_writer:
        print_reading(inputs.reading)
        print_size(stage, data)
    evaluation = PairEvaluation(stage, folder, objective, data, ranked, request)
    trained = train(
        stage,
        folder,
        objective,
        data,
        init_params=lambda key: init_params(stage, objective, key),
        evaluate=evaluation,
    )
    if trained.is_complete:
        scores = evaluation.last_scores(trained.params)
        corrections = _correct(stage, trained.params, ranked.corrected, request)
        if stage.is_writer:
            _report(stage, folder, trained.step, scores, ranked, corrections)
    return exit_status(stage, trained, data)


def inspect(config: Any) -> Inspection:
    """What `run` would do; errors are the same, no weights are read and nothing is written."""
    inputs = _open_inputs(config)
    inspection = inspect_training(inputs.stage, inputs.reading, inputs.data)
    marked = [x for x in inputs.data.examples if isinstance(x, MarkedMappingExample) and x.is_correction]
    if not marked:
        return inspection
    edits, targets = sum(int(x.is_edit.sum()) for x in marked), sum(int(x.loss_mask.sum()) for x in marked)
    share = f"{edits:,} of {targets:,} tokens of corrections, {100 * edits / targets:.0f} %"
    weight = f"each weighs {config.mapping.edit_weight:g}"
    return replace(inspection, facts={**inspection.facts, "edits": f"{share}; {weight}"})


def _open_inputs(config: Any) -> _Inputs:
    mesh = build_mesh(config.mesh)
    check_training(config, mesh)
    check_judge(config.evaluation.judge)
    with open_stage(config, mesh, records="pairs") as stage:
        trained = build_objective(config, stage.model)
        pairs, held_out = (load_preferences(stage, held_out=side) for side in (False, True))
        request = _request(stage)
        data, report, held_out_report = reward_model_data(stage, pairs, held_out, request)
        ranked = ranked_pairs(stage, held_out, request)
    reading = {
        f"Pairs in {config.data.path}": report,
        "Held-out pairs": held_out_report,
        "Held-out pairs, to be ranked": ranked.report,
    }
    return _Inputs(stage, trained, data, reading, ranked, request)


def objective(config: Any, decoder: ShardedModel) -> Objective:
    """Sequence MLE of a seq2seq reward model, or the Bradley-Terry loss of a scalar one."""
    if config.algorithm == "scalar_rm":
        model = sharded_model.shard_scalar_model(config.model, decoder.mesh, decoder.config, lora=decoder.lora)
        loss_fn = scalar_rm.scalar_rm_loss(model.graphdef, config.scalar_rm)
        batch_type = MarkedComparisonBatch if config.scalar_rm.reads_prefixes else ComparisonBatch
        return Objective(model, loss_fn, batch_type, has_scalar_head=True)
    mapping = config.mapping
    loss_fn = seq2seq_rm.seq2seq_rm_loss(
        decoder.graphdef,
        correction_weight=mapping.correction_weight,
        identity_weight=mapping.identity_weight if mapping.identity else 0.0,
        edit_weight=mapping.edit_weight,
    )
    return Objective(decoder, loss_fn, MarkedMappingBatch if mapping.weighs_edits else MappingBatch)


def _request(stage: Stage) -> tuple[int, ...] | None:
    """Ids that ask a seq2seq reward model for a correction; None for a scalar one, which writes none."""
    if stage.config.algorithm == "scalar_rm":
        return None
    return tuple(correction_request(stage.tokenizer, stage.template, stage.config.mapping.instruction))


def init_params(stage: Stage, trained: Objective, key: jax.Array) -> Any:
    """The decoder's first parameters, and those of the scalar head where there is one."""
    key, head_key = jax.random.split(key)
    params = stage.init_params(key)
    if not trained.has_scalar_head:
        return params
    head = build.init_scalar_head(stage.model.config, head_key, trained.model.shardings["scalar_head"])
    return heads.from_decoder_params(params, head)


@dataclass(frozen=True)
class _Corrections:
    """Corrections of held-out pairs: who wrote them, and the token ids by side."""

    corrector: Corrector
    written: Mapping[str, Sequence[np.ndarray]]


def _correct(
    stage: Stage, params: Any, pairs: Sequence[TokenPair], request: tuple[int, ...] | None
) -> _Corrections | None:
    """Corrections of pairs by a seq2seq reward model; all processes write them together."""
    if request is None or not pairs:
        return None
    max_new_tokens = stage.config.evaluation.sampling.max_new_tokens
    corrector = Corrector(stage.model, params, stage.tokenizer, stage.template, request, max_new_tokens)
    return _Corrections(corrector, corrector.correct_pairs(pairs, show_progress=stage.show_progress))


def _report(
    stage: Stage,
    folder: RunFolder,
    step: int,
    scores: PairScores,
    ranked: RankedPairs,
    corrections: _Corrections | None,
) -> None:
    """Print the closing tables, and write their numbers to ``evaluation.json``."""
    evaluation = stage.config.evaluation
    print_held_out(folder)
    judge_scores = None if evaluation.judge is None else judge_pairs(evaluation.judge, ranked.records)
    numbers: dict[str, Any] = {
        "step": step,
        "pairs": len(ranked.pairs),
        "kinds": print_ranking(scores, judge_scores),
    }
    if "scalar" in scores:
        numbers["calibration"] = print_reliability(scores)
    else:
        numbers["divergence"] = print_divergence(scores)
    if corrections is not None:
        numbers["corrections"] = print_corrections(
            corrections.corrector,
            ranked.corrected,
            corrections.written,
            {record.source: record for record in ranked.records},
            judge=evaluation.judge,
            samples=evaluation.samples,
        )
    atomic.write_json(folder.path / "evaluation.json", numbers)
    print(f"The run is in {folder.path}; these numbers are in {folder.path / 'evaluation.json'}")
