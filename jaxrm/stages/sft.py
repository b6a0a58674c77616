"""The SFT stage: fine-tune a model on demonstrations, or on the chosen responses of pairs."""

import math
from itertools import islice
from typing import Any

import jax

from jaxrm.algorithms import sft
from jaxrm.config import dicts
from jaxrm.data.loader import build_loader, eval_batches, fingerprint, rows_per_epoch
from jaxrm.data.tokenizer import load_tokenizer
from jaxrm.experiment import RESUMABLE_FIELDS, Experiment
from jaxrm.inference import sharded_model, weights
from jaxrm.inference.load import save_shape_and_tokenizer
from jaxrm.inference.sampler import Sampler, answerable, prompt_room
from jaxrm.models import build
from jaxrm.runtime.preemption import EXIT_PREEMPTED
from jaxrm.runtime.progress import print_table
from jaxrm.runtime.run_folder import check_run, open_run
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import batch_shards, batch_share, build_mesh, check_batch, check_row_length
from jaxrm.stages import supervised
from jaxrm.stages.inputs.demonstrations import load_demonstrations
from jaxrm.stages.report import print_held_out
from jaxrm.types import TokenBatch


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
    model = sharded_model.shard_model(config.model, mesh)
    build.check_length(model.config, "data.max_length", config.data.max_length)
    sampling = config.evaluation.sampling
    room = prompt_room(model.config, sampling, "evaluation.sampling.max_new_tokens")
    resolved = dicts.as_dict(config)
    if jax.process_count() == 1:  # several must refuse together, which only `open_run` sees to
        check_run(config.run_dir, resolved, on_existing=config.on_existing, may_differ=RESUMABLE_FIELDS)
    is_writer = jax.process_index() == 0
    show = is_writer and config.logging.progress

    with sharded_model.task_files(config.data, config.seed) as data:
        tokenizer_path = sharded_model.tokenizer_path(data, config.model)
        tokenizer = load_tokenizer(tokenizer_path)
        sharded_model.check_tokenizer(tokenizer, tokenizer_path, config.model, model.config)
        train = load_demonstrations(data, tokenizer, held_out=False, show_progress=show)
        held_out = load_demonstrations(data, tokenizer, held_out=True, show_progress=show)

    part, parts = batch_share(mesh)
    batching: dict[str, Any] = {
        "pad_id": tokenizer.pad_token_id or 0,  # never attended to and never a target: any id will do
        "process_index": part,
        "process_count": parts,
    }
    batch_unit = batch_shards(mesh) * config.num_microbatches
    loader = build_loader(train.examples, config.data, seed=config.seed, batch_unit=batch_unit, **batching)
    held_out_batches = eval_batches(held_out.examples, config.data, **batching)
    rows = rows_per_epoch(train.examples, config.data)
    num_steps = config.num_steps or math.ceil(config.num_epochs * rows / config.data.batch_size)
    asked = (record.prompt for record in held_out.records)
    prompts = list(islice(answerable(asked, tokenizer, data.template, room), config.evaluation.samples))
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
        print_table(f"Data in {config.data.path}", ["records", "number", "first at"], train.report.rows())
        print(
            f"{rows:,} rows of {config.data.max_length:,} tokens; {num_steps:,} steps of {config.data.batch_size} rows"
        )

    loss_fn = sft.sft_loss(model.graphdef)
    state, finished = supervised.train(
        config,
        mesh=mesh,
        model=model,
        first_params=lambda key: weights.load_or_init_params(
            model.config, config.model, key, model.shapes, model.shardings
        ),
        loss_fn=loss_fn,
        batch_type=TokenBatch,
        loader=loader,
        data_fingerprint=fingerprint(train.examples, config.data),
        evaluate=supervised.held_out_loss(loss_fn, TokenBatch, held_out_batches, mesh, model.shardings),
        num_steps=num_steps,
        folder=folder,
    )
    if not finished:
        if is_writer:
            print(f"Stopped and saved at step {int(state.step)} of {num_steps}; the same command continues from there.")
        return EXIT_PREEMPTED

    responder = Sampler(model, state.params, tokenizer, config.data.template, sampling)
    responses = responder.respond(prompts, jax.random.key(config.seed))
    if is_writer:
        print_held_out(folder)
        for prompt, response in zip(prompts, responses, strict=True):
            print(f"prompt    {prompt[-1].content}\nresponse  {response}\n")
        print(f"The run is in {folder.path}")
    return 0
