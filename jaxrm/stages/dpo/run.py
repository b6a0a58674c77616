"""The DPO stage: a policy learns from preference pairs, compared with what it said of them before."""

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import jax

from jaxrm.algorithms import dpo
from jaxrm.algorithms.dpo import DPOBatch
from jaxrm.config import dicts
from jaxrm.data import tasks
from jaxrm.data.loader import build_loader, eval_batches, fingerprint, rows_per_epoch
from jaxrm.data.records import PreferenceRecord
from jaxrm.data.templates import bos_id
from jaxrm.data.tokenizer import load_tokenizer
from jaxrm.errors import UserError, flag, option
from jaxrm.experiment import RESUMABLE_FIELDS, Experiment
from jaxrm.inference import sharded_model, weights
from jaxrm.inference.load import save_shape_and_tokenizer
from jaxrm.inference.sampler import Sampler, answerable, prompt_room
from jaxrm.models import build
from jaxrm.runtime.checkpoint import Checkpoints
from jaxrm.runtime.preemption import EXIT_PREEMPTED
from jaxrm.runtime.progress import print_table
from jaxrm.runtime.run_folder import check_run, open_run
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import batch_shards, batch_share, build_mesh, check_batch, check_row_length
from jaxrm.stages import supervised
from jaxrm.stages.dpo.reference import dpo_examples, load_or_compute_reference, read_reference, with_reference
from jaxrm.stages.inputs.preferences import load_preferences
from jaxrm.stages.judge import check_judge, judge_response
from jaxrm.stages.report import print_held_out


def run(config: Experiment) -> int:
    """Run the stage, or what is left of it.

    Returns:
      Exit status: 0 when the run is complete, `EXIT_PREEMPTED` when it was asked to stop and saved.

    Raises:
      UserError: for what the user can mend, before anything is written wherever it can be known by then.
    """
    mesh = build_mesh(config.mesh)
    check_batch(mesh, "data.batch_size", config.data.batch_size, config.num_microbatches)
    check_row_length(mesh, "data.max_length", config.data.max_length)
    if config.optimizer.offload:
        partition.check_host_memory(mesh, "optimizer.offload")
    judge = config.evaluation.judge or (config.data.path if config.data.path.startswith(tasks.PREFIX) else None)
    check_judge(config.evaluation.judge)
    if config.model.path is None:
        raise UserError(
            f"{option('model.path')} is None, but DPO goes on from a policy, which is its reference too; give the "
            f"folder of "
            f"a run or published weights, e.g. {flag('model.path')}=runs/quickstart/sft"
        )
    if weights.is_run(config.model.path):
        weights.find_checkpoint(config.model.path, "model.path", weights.POLICIES)
    model = sharded_model.shard_model(config.model, mesh)
    build.check_length(model.config, "data.max_length", config.data.max_length)
    sampling = config.evaluation.sampling
    room = prompt_room(model.config, sampling, "evaluation.sampling.max_new_tokens")
    resolved = dicts.as_dict(config)
    if jax.process_count() == 1:  # several must refuse together, which only `open_run` sees to
        check_run(config.run_dir, resolved, on_existing=config.on_existing, may_differ=RESUMABLE_FIELDS)
    is_writer = jax.process_index() == 0
    show = is_writer and config.logging.progress

    with sharded_model.task_files(config.data, config.seed, records="pairs") as data:
        tokenizer_path = sharded_model.tokenizer_path(data, config.model)
        tokenizer = load_tokenizer(tokenizer_path)
        sharded_model.check_tokenizer(tokenizer, tokenizer_path, config.model, model.config)
        train = load_preferences(data, tokenizer, held_out=False, show_progress=show)
        held_out = load_preferences(data, tokenizer, held_out=True, show_progress=show)
    first_id = bos_id(tokenizer, config.data.template)
    examples, fitted = dpo_examples(train.pairs, config.data, first_id=first_id)
    held_out_examples, held_out_fitted = dpo_examples(
        held_out.pairs, config.data, first_id=first_id, first_pair=len(examples)
    )
    part, parts = batch_share(mesh)
    batching: dict[str, Any] = {
        "pad_id": tokenizer.pad_token_id or 0,  # never attended to and never a target: any id will do
        "process_index": part,
        "process_count": parts,
    }
    shuffling = {**batching, "seed": config.seed, "batch_unit": batch_shards(mesh) * config.num_microbatches}
    build_loader(examples, config.data, **shuffling)  # refuses too few pairs before anything is written
    rows, data_fingerprint = rows_per_epoch(examples, config.data), fingerprint(examples, config.data)
    num_steps = config.num_steps or math.ceil(config.num_epochs * rows / config.data.batch_size)
    asked = list(
        islice(
            (
                record
                for record in held_out.records.values()
                if any(answerable([record.prompt], tokenizer, config.data.template, room))
            ),
            config.evaluation.samples,
        )
    )
    check_judge(judge, asked)
    weights.check_weights(model.config, config.model)  # last, since a hub model is fetched for it

    folder = open_run(
        config.run_dir,
        resolved,
        on_existing=config.on_existing,
        may_differ=RESUMABLE_FIELDS,
        is_writer=is_writer,
        process_count=jax.process_count(),
    )
    if is_writer:
        print(folder.message)
        save_shape_and_tokenizer(model.config, tokenizer, folder)
        for name, report in (
            (f"Pairs in {config.data.path}", train.report.merge(fitted)),
            ("Held-out pairs", held_out.report.merge(held_out_fitted)),
        ):
            print_table(name, ["records", "number", "first at"], report.rows())
        print(
            f"{rows:,} rows of {config.data.max_length:,} tokens; {num_steps:,} steps of {config.data.batch_size} rows"
        )

    def first_params(key: jax.Array) -> Any:
        return weights.load_or_init_params(model.config, config.model, key, model.shapes, model.shardings)

    everything = [*examples, *held_out_examples]
    trained = Checkpoints(folder.checkpoints, read_only=True)
    # Its parameters are gone before those of the training are there: no two models are in memory.
    reference = load_or_compute_reference(
        folder.path / "reference_log_probs.npy",
        {
            "data": fingerprint(everything, config.data),
            "pairs": len(everything),
            "policy": weights.identity_of(config.model.path),
        },
        lambda: read_reference(
            everything,
            config.data,
            model,
            first_params(supervised.init_key(config.seed)),
            mesh,
            show_progress=show,
        ),
        has_trained=bool(trained.steps()),
        is_writer=is_writer,
    )
    trained.close()
    loss_fn = dpo.policy_loss(model.graphdef, config.dpo)
    held_out_batches = eval_batches(with_reference(held_out_examples, reference), config.data, **batching)
    state, finished = supervised.train(
        config,
        mesh=mesh,
        model=model,
        first_params=first_params,
        loss_fn=loss_fn,
        batch_type=DPOBatch,
        loader=build_loader(with_reference(examples, reference), config.data, **shuffling),
        data_fingerprint=data_fingerprint,
        evaluate=supervised.held_out_loss(loss_fn, DPOBatch, held_out_batches, mesh, model.shardings),
        num_steps=num_steps,
        folder=folder,
    )
    if not finished:
        if is_writer:
            print(f"Stopped and saved at step {int(state.step)} of {num_steps}; the same command continues from there.")
        return EXIT_PREEMPTED

    responder = Sampler(model, state.params, tokenizer, config.data.template, sampling)
    responses = responder.respond([record.prompt for record in asked], jax.random.key(config.seed))
    if is_writer:
        print_held_out(folder)
        _print_samples(asked, responses, judge)
        print(f"The run is in {folder.path}")
    return 0


def _print_samples(asked: Sequence[PreferenceRecord], responses: Sequence[str], judge: str | None) -> None:
    for record, response in zip(asked, responses, strict=True):
        mark = "" if judge is None else f"  (judge {judge_response(judge, record, response):.2f})"
        print(f"prompt    {record.prompt[-1].content}\nresponse  {response}{mark}\n")
