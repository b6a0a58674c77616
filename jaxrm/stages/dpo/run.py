"""The DPO stage: a policy learns from preference pairs, compared with its own log-probs from before the training."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrm.algorithms import dpo
from jaxrm.algorithms.dpo import DPOBatch
from jaxrm.data.loader import build_loader, fingerprint
from jaxrm.data.readers import ReadReport
from jaxrm.data.records import PreferenceRecord
from jaxrm.errors import UserError, flag, option
from jaxrm.inference import weights
from jaxrm.inference.parameters import init_key
from jaxrm.inference.sampler import Sampler, answerable, prompt_room
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.runtime.checkpoint import Checkpoints
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.sharding.mesh import build_mesh
from jaxrm.stages.dpo.reference import (
    REFERENCE,
    DPOExample,
    dpo_examples,
    load_or_compute_reference,
    read_reference,
    with_reference,
)
from jaxrm.stages.inputs.preferences import Preferences, load_preferences
from jaxrm.stages.inputs.training_data import training_data
from jaxrm.stages.inspection import Inspection, inspect_training
from jaxrm.stages.judge import check_judge, judge_response
from jaxrm.stages.objective import Objective, build_objective
from jaxrm.stages.report import print_held_out, print_reading, print_size
from jaxrm.stages.stage import Stage, check_is_policy, check_training, judge_of, open_stage
from jaxrm.stages.supervised.train import exit_status, train


@dataclass(frozen=True)
class _Inputs:
    """What a run trains on, read before its folder is made.

    Attributes:
      stage: that was opened.
      examples: pairs that are trained on, without the reference's log-probs as yet.
      held_out: pairs that are evaluated, numbered behind them.
      reading: what became of the pairs, by the name of the data.
      prompts: records whose prompts are answered when training ends.
    """

    stage: Stage
    examples: Sequence[DPOExample]
    held_out: Sequence[DPOExample]
    reading: Mapping[str, ReadReport]
    prompts: Sequence[PreferenceRecord]


def run(config: Any) -> int:
    """Run the stage, or what is left of it.

    Returns:
      Exit status: 0 when the run is complete, 75 when it was asked to stop and saved.

    Raises:
      UserError: for what the user can mend, before anything is written wherever it can be known by then.
    """
    inputs = _open_inputs(config)
    stage, examples, held_out = inputs.stage, inputs.examples, inputs.held_out
    folder = stage.open_run([examples, held_out])
    if stage.is_writer:
        print_reading(inputs.reading)
    # The reference's parameters are gone before those of the training are there: no two models are in memory.
    log_probs = _reference_log_probs(stage, folder, [*examples, *held_out])
    data = training_data(stage, with_reference(examples, log_probs), with_reference(held_out, log_probs))
    data = dataclasses.replace(data, fingerprint=fingerprint(examples, config.data))  # that of the pairs alone
    if stage.is_writer:
        print_size(stage, data)
    trained = train(stage, folder, build_objective(config, stage.model), data)
    if trained.is_complete:
        _print_samples(stage, folder, trained.params, inputs.prompts)
    return exit_status(stage, trained, data)


def inspect(config: Any) -> Inspection:
    """What `run` would do; errors are the same, no weights are read and nothing is written."""
    inputs = _open_inputs(config)
    return inspect_training(inputs.stage, inputs.reading, training_data(inputs.stage, inputs.examples, inputs.held_out))


def _open_inputs(config: Any) -> _Inputs:
    mesh = build_mesh(config.mesh)
    _check(config, mesh)
    with open_stage(config, mesh, records="pairs") as stage:
        pairs, held_out = (load_preferences(stage, held_out=side) for side in (False, True))
        examples, fitted = dpo_examples(pairs.pairs, config.data, first_id=stage.bos_id)
        held_out_examples, held_out_fitted = dpo_examples(
            held_out.pairs, config.data, first_id=stage.bos_id, first_pair=len(examples)
        )
        build_loader(examples, config.data, **stage.batching)  # refuses too few pairs before anything is written
        prompts = _sample_records(stage, held_out)
        check_judge(judge_of(config), prompts)
    reading = {
        f"Pairs in {config.data.path}": pairs.report.merge(fitted),
        "Held-out pairs": held_out.report.merge(held_out_fitted),
    }
    return _Inputs(stage, examples, held_out_examples, reading, prompts)


def objective(config: Any, decoder: ShardedModel) -> Objective:
    """The loss of DPO or IPO."""
    return Objective(decoder, dpo.policy_loss(decoder.graphdef, config.dpo), DPOBatch)


def _check(config: Any, mesh: Mesh) -> None:
    """What the config alone shows to be wrong."""
    check_training(config, mesh)
    check_judge(config.evaluation.judge)
    if config.model.path is None:
        raise UserError(
            f"{option('model.path')} is None, but DPO goes on from a policy, which is its reference too; give the "
            f"folder of a run or published weights, e.g. {flag('model.path')}=runs/quickstart/sft"
        )
    check_is_policy(config)


def _sample_records(stage: Stage, held_out: Preferences) -> list[PreferenceRecord]:
    """The first held-out records whose prompts leave room for a response."""
    evaluation = stage.config.evaluation
    max_prompt_tokens = prompt_room(stage.model.config, evaluation.sampling, "evaluation.sampling.max_new_tokens")
    fitting = (
        record
        for record in held_out.records.values()
        if any(answerable([record.prompt], stage.tokenizer, stage.template, max_prompt_tokens))
    )
    return list(islice(fitting, evaluation.samples))


def _reference_log_probs(stage: Stage, folder: RunFolder, examples: Sequence[DPOExample]) -> np.ndarray:
    """``[N, 2]`` log-probs of both responses of every pair under the policy that the run begins with."""
    config = stage.config
    checkpoints = Checkpoints(folder.checkpoints, read_only=True)
    has_trained = bool(checkpoints.steps())
    checkpoints.close()
    return load_or_compute_reference(
        folder.path / REFERENCE,
        {
            "data": fingerprint(examples, config.data),
            "pairs": len(examples),
            "policy": weights.identity_of_source(config.model),
        },
        lambda: read_reference(
            examples,
            config.data,
            stage.model,
            stage.init_params(init_key(config.seed)),
            stage.mesh,
            show_progress=stage.show_progress,
        ),
        has_trained=has_trained,
        is_writer=stage.is_writer,
    )


def _print_samples(stage: Stage, folder: RunFolder, params: Any, records: Sequence[PreferenceRecord]) -> None:
    """Responses to held-out prompts; all processes generate them together."""
    config, judge = stage.config, judge_of(stage.config)
    sampler = Sampler(stage.model, params, stage.tokenizer, stage.template, config.evaluation.sampling)
    responses = sampler.respond([record.prompt for record in records], jax.random.key(config.seed))
    if stage.is_writer:
        print_held_out(folder)
        for record, response in zip(records, responses, strict=True):
            score = "" if judge is None else f"  (judge {judge_response(judge, record, response):.2f})"
            print(f"prompt    {record.prompt[-1].content}\nresponse  {response}{score}\n")
        print(f"The run is in {folder.path}")
