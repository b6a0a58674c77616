"""The reward model stage: sequence MLE on both mappings, or the scalar Bradley-Terry baseline, from the same pairs."""

import math
from typing import Any

import jax

from jaxrm import atomic
from jaxrm.algorithms import scalar_rm, scoring, seq2seq_rm
from jaxrm.algorithms.train_step import LossFn
from jaxrm.config import dicts
from jaxrm.data.pairs import correction_request, readable_pairs
from jaxrm.data.templates import bos_id, end_ids
from jaxrm.data.tokenizer import load_tokenizer
from jaxrm.errors import UserError, flag, option
from jaxrm.experiment import RESUMABLE_FIELDS, Experiment
from jaxrm.inference import sharded_model, weights
from jaxrm.inference.corrections import Corrector, check_room
from jaxrm.inference.load import save_shape_and_tokenizer
from jaxrm.inference.token_scores import policy_log_probs
from jaxrm.models import build, heads
from jaxrm.runtime.preemption import EXIT_PREEMPTED
from jaxrm.runtime.progress import print_table
from jaxrm.runtime.run_folder import check_run, open_run
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import build_mesh, check_batch, check_row_length
from jaxrm.stages import supervised
from jaxrm.stages.inputs.preferences import load_preferences, prepare
from jaxrm.stages.judge import check_judge, judge_pairs
from jaxrm.stages.report import print_held_out
from jaxrm.stages.reward_model.corrections import print_corrections
from jaxrm.stages.reward_model.evaluation import (
    HeldOutPairs,
    PairScores,
    metrics,
    print_divergence,
    print_ranking,
    print_reliability,
    with_centered,
    with_length_residual,
)
from jaxrm.types import ComparisonBatch, MappingBatch


def run(config: Experiment) -> int:
    """Run the stage, or what is left of it.

    Returns:
      Exit status: 0 when the run is complete, `EXIT_PREEMPTED` when it was asked to stop and saved.

    Raises:
      UserError: for what the user can mend, before anything is written wherever it can be known by then.
    """
    is_seq2seq = config.algorithm == "seq2seq_rm"
    mesh = build_mesh(config.mesh)
    check_batch(mesh, "data.batch_size", config.data.batch_size, config.num_microbatches)
    check_row_length(mesh, "data.max_length", config.data.max_length)
    if config.optimizer.offload:
        partition.check_host_memory(mesh, "optimizer.offload")
    check_judge(config.evaluation.judge)
    decoder = sharded_model.shard_model(config.model, mesh)
    build.check_length(decoder.config, "data.max_length", config.data.max_length)
    model = decoder if is_seq2seq else sharded_model.shard_scalar_model(config.model, mesh, decoder.config)
    resolved = dicts.as_dict(config)
    if jax.process_count() == 1:  # several must refuse together, which only `open_run` sees to
        check_run(config.run_dir, resolved, on_existing=config.on_existing, may_differ=RESUMABLE_FIELDS)
    is_writer = jax.process_index() == 0
    show = is_writer and config.logging.progress

    with sharded_model.task_files(config.data, config.seed, records="pairs") as data:
        tokenizer_path = sharded_model.tokenizer_path(data, config.model)
        tokenizer = load_tokenizer(tokenizer_path)
        sharded_model.check_tokenizer(tokenizer, tokenizer_path, config.model, decoder.config)
        train = load_preferences(data, tokenizer, held_out=False, show_progress=show)
        held_out = load_preferences(data, tokenizer, held_out=True, show_progress=show)
    template = config.data.template
    request = tuple(correction_request(tokenizer, template, config.mapping.instruction))
    first_id = bos_id(tokenizer, template)
    prepared = prepare(config, mesh, train, held_out, request, first_id, tokenizer.pad_token_id or 0)
    scored, unread = readable_pairs(
        held_out.pairs,
        config.data.max_length,  # no longer than what it was trained on, and no larger in memory
        config.data,
        request=request if is_seq2seq else None,
        first_id=first_id,
    )
    corrected = scored[: config.evaluation.corrections] if is_seq2seq else []
    judged = [held_out.records[pair.source] for pair in scored]
    judge = config.evaluation.judge
    check_judge(judge, judged)
    longest = config.evaluation.sampling.max_new_tokens
    check_room(
        decoder.config,
        request,
        longest,
        [response for pair in corrected for response in (pair.chosen, pair.rejected)],
        [pair.source for pair in corrected for _ in range(2)],
        field="evaluation.sampling.max_new_tokens",
    )
    num_steps = config.num_steps or math.ceil(config.num_epochs * prepared.rows / config.data.batch_size)
    if config.mapping.identity_warmup_steps >= num_steps and is_seq2seq:
        raise UserError(
            f"{option('mapping.identity_warmup_steps')} is {config.mapping.identity_warmup_steps}, but the run has "
            f"{num_steps} steps in all, so that it would learn no correction; e.g. "
            f"{flag('mapping.identity_warmup_steps')}={num_steps // 4}"
        )
    weights.check_weights(decoder.config, config.model)  # last, since a hub model is fetched for it

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
        save_shape_and_tokenizer(decoder.config, tokenizer, folder)
        print_table(f"Pairs in {config.data.path}", ["records", "number", "first at"], prepared.report.rows())
        for name, held_out_report in (("", prepared.held_out_report), (", to be ranked", unread)):
            print_table(f"Held-out pairs{name}", ["records", "number", "first at"], held_out_report.rows())
        print(
            f"{prepared.rows:,} rows of {config.data.max_length:,} tokens; {num_steps:,} steps of "
            f"{config.data.batch_size} rows"
        )

    def first_params(key: jax.Array) -> Any:
        key, head_key = jax.random.split(key)
        params = weights.load_or_init_params(decoder.config, config.model, key, decoder.shapes, decoder.shardings)
        if is_seq2seq:
            return params
        head = build.init_scalar_head(decoder.config, head_key, model.shardings["scalar_head"])
        return heads.from_decoder_params(params, head)

    pairs = HeldOutPairs(scored, config.data.batch_size, mesh)
    pad_to_multiple_of = sharded_model.pad_to_multiple_of(mesh)
    ends = tuple(sorted(end_ids(tokenizer, template)))
    diagnostics = scoring.build_diagnostics(
        "seq2seq" if is_seq2seq else "scalar",
        model.graphdef,
        request=tuple(request),
        end_ids=ends,
        pad_to_multiple_of=pad_to_multiple_of,
    )
    loss_fn: LossFn
    if is_seq2seq:
        loss_fn = seq2seq_rm.seq2seq_rm_loss(
            model.graphdef,
            correction_weight=config.mapping.correction_weight,
            identity_weight=config.mapping.identity_weight if config.mapping.identity else 0.0,
        )
        if config.model.path is not None:  # the policy that the reward model starts from is its reference
            pairs.keep_reference(
                folder.path / "reference_log_probs.npy",
                lambda: policy_log_probs(decoder, first_params(supervised.init_key(config.seed)), mesh, whole=True),
                is_writer=is_writer,
            )
    else:
        loss_fn = scalar_rm.scalar_rm_loss(model.graphdef, config.scalar_rm)
    batch_type = MappingBatch if is_seq2seq else ComparisonBatch
    held_out_loss = supervised.held_out_loss(loss_fn, batch_type, prepared.eval_batches, mesh, model.shardings)
    read = pairs.reader(diagnostics, model.shardings)

    sides: PairScores | None = (
        None  # of the latest evaluation, which is that of the last parameters once they are there
    )

    def all_kinds(params: Any) -> PairScores:
        found = read(params)
        return with_centered(found if is_seq2seq else with_length_residual(found), config.reward.center)

    def evaluate(params: Any) -> dict[str, float]:
        nonlocal sides
        sides = all_kinds(params)
        return held_out_loss(params) | metrics(sides, config.reward.kind)

    state, finished = supervised.train(
        config,
        mesh=mesh,
        model=model,
        first_params=first_params,
        loss_fn=loss_fn,
        batch_type=batch_type,
        loader=prepared.loader,
        data_fingerprint=prepared.fingerprint,
        evaluate=evaluate,
        num_steps=num_steps,
        folder=folder,
    )
    if not finished:
        if is_writer:
            print(f"Stopped and saved at step {int(state.step)} of {num_steps}; the same command continues from there.")
        return EXIT_PREEMPTED

    sides = sides or all_kinds(state.params)
    corrections = None
    if corrected:
        corrector = Corrector(model, state.params, tokenizer, template, request, longest)
        written = corrector.correct_pairs(corrected, show_progress=show)  # by all processes together
        corrections = corrector, corrected, written
    if is_writer:
        print_held_out(folder)
        kinds = print_ranking(sides, None if judge is None else judge_pairs(judge, judged))
        report: dict[str, Any] = {"step": int(state.step), "pairs": len(scored), "kinds": kinds}
        if is_seq2seq:
            report["divergence"] = print_divergence(sides)
        else:
            report["calibration"] = print_reliability(sides)
        if corrections is not None:
            report["corrections"] = print_corrections(
                *corrections, held_out.records, judge=judge, samples=config.evaluation.samples
            )
        atomic.write_json(folder.path / "evaluation.json", report)
        print(f"The run is in {folder.path}; these numbers are in {folder.path / 'evaluation.json'}")
    return 0
