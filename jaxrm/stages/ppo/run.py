"""The PPO stage: a policy learns from token rewards."""

import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrm import atomic
from jaxrm.algorithms import ppo, ppo_state
from jaxrm.algorithms.optimizer import learning_rate
from jaxrm.config import dicts
from jaxrm.data import tasks
from jaxrm.data.templates import end_ids
from jaxrm.data.tokenizer import load_tokenizer
from jaxrm.errors import UserError, flag, option
from jaxrm.experiment import RESUMABLE_FIELDS, Experiment
from jaxrm.inference import sharded_model, weights
from jaxrm.inference.load import save_shape_and_tokenizer
from jaxrm.inference.sampler import response_text
from jaxrm.models import build
from jaxrm.models.generate import check_on_policy
from jaxrm.runtime.checkpoint import Checkpoints
from jaxrm.runtime.metrics import open_metrics, read_rows, remove_rows_after
from jaxrm.runtime.preemption import EXIT_PREEMPTED, catch_signals
from jaxrm.runtime.progress import Progress, print_table
from jaxrm.runtime.run_folder import check_run, open_run
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import batch_shards, build_mesh, check_batch, check_row_length
from jaxrm.stages.inputs.prompts import (
    check_judgeable,
    fixed_batches,
    load_prompts,
    prompt_loader,
    prompt_width,
    prompts_to_devices,
)
from jaxrm.stages.judge import check_judge
from jaxrm.stages.ppo.critic import open_critic, zero_head
from jaxrm.stages.ppo.evaluation import PolicyEvaluation, print_samples
from jaxrm.stages.ppo.learner import open_learner
from jaxrm.stages.ppo.ptx import open_ptx
from jaxrm.stages.ppo.report import PPOReporter, closing_report
from jaxrm.stages.report import print_held_out
from jaxrm.stages.rewards.calibration import calibration_of, open_rewards, scorer
from jaxrm.stages.rewards.sources import open_function
from jaxrm.stages.stage import task_files
from jaxrm.stages.supervised.train import init_key
from jaxrm.types import TokenBatch


def run(config: Experiment) -> int:
    """Run the stage, or what is left of it.

    Returns:
      Exit status: 0 when the run is complete, `EXIT_PREEMPTED` when it was asked to stop and saved.

    Raises:
      UserError: for what the user can mend, before anything is written wherever it can be known by then.
    """
    mesh = build_mesh(config.mesh)
    sampling = config.rollout.sampling
    check_on_policy(sampling, "rollout.sampling")
    _check(config, mesh)
    policy = sharded_model.shard_model(config.model, mesh)
    build.check_length(policy.config, "data.max_length", config.data.max_length)
    resolved = dicts.as_dict(config)
    if jax.process_count() == 1:  # several must refuse together, which only `open_run` sees to
        check_run(config.run_dir, resolved, on_existing=config.on_existing, may_differ=RESUMABLE_FIELDS)
    is_writer = jax.process_index() == 0
    show = is_writer and config.logging.progress
    judge = config.evaluation.judge or (config.data.path if config.data.path.startswith(tasks.PREFIX) else None)

    with task_files(config.data, config.seed, records="prompts") as data:
        tokenizer_path = sharded_model.tokenizer_path(data, config.model)
        tokenizer = load_tokenizer(tokenizer_path)
        sharded_model.check_tokenizer(tokenizer, tokenizer_path, config.model, policy.config)
        load = functools.partial(load_prompts, data, tokenizer, max_new_tokens=sampling.max_new_tokens)
        train, held_out = (load(held_out=side, show_progress=show) for side in (False, True))
    template = config.data.template
    ends = tuple(sorted(end_ids(tokenizer, template)))
    if judge is not None:
        check_judgeable(held_out.examples, judge, "evaluation.judge")
    pad_id = tokenizer.pad_token_id or 0  # never attended to: any id will do
    room = config.data.max_length - sampling.max_new_tokens
    width = prompt_width([*train.examples, *held_out.examples], room, max(16, sharded_model.pad_to_multiple_of(mesh)))
    prompts, fingerprint = prompt_loader(train.examples, config.data, width, mesh, seed=config.seed, pad_id=pad_id)
    ptx = None
    if config.ptx is not None:
        ptx, of_ptx = open_ptx(config, config.ptx, policy.config, tokenizer, mesh, show_progress=show)
        fingerprint = f"{fingerprint}, SFT data {of_ptx[:12]}"
    num_steps = config.num_steps or math.ceil(config.num_epochs * len(train.examples) / config.data.batch_size)

    text = functools.partial(response_text, tokenizer, ends)
    everyone = (*train.examples, *held_out.examples)
    source, reward_name = open_rewards(config, mesh, tokenizer, everyone, text)
    critic, first_critic, critic_from = None, None, "the policy, on one trunk"
    if not config.ppo.shared_trunk:
        critic, first_critic, critic_from = open_critic(config, policy, mesh, tokenizer)
    weights.check_weights(policy.config, config.model)  # last, since a hub model is fetched for it
    policy_from = weights.name_of(config.model)
    learner = open_learner(config, mesh, policy, critic, num_steps=num_steps, end_ids=ends)
    models = (config.model.path, config.reward.model or config.reward.function, config.critic.path)
    identity = f"prompts {fingerprint}; {'; '.join(weights.identity_of(path) for path in models if path)}"

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
        save_shape_and_tokenizer(policy.config, tokenizer, folder)
        print_table(f"Prompts in {config.data.path}", ["records", "number", "first at"], train.report.rows())
        print_table("Held-out prompts", ["records", "number", "first at"], held_out.report.rows())
        print(
            f"{num_steps:,} steps of {config.data.batch_size} responses of up to {sampling.max_new_tokens} tokens to "
            f"prompts of up to {width}; policy from {policy_from}, critic from {critic_from}, "
            f"{config.reward.kind} rewards from {reward_name}"
        )

    def first_decoder() -> Any:
        key = init_key(config.seed)
        return weights.load_or_init_params(policy.config, config.model, key, policy.shapes, policy.shardings)

    reference = sharded_model.in_compute_dtype(first_decoder(), config.model.dtype)
    programs = learner.programs(source)
    run_key, held_out_key, calibration_key, step_key = jax.random.split(jax.random.key(config.seed), 4)
    respond = programs.respond
    if config.evaluation.sampling != sampling:
        respond = learner.respond(config.evaluation.sampling)
    evaluation = PolicyEvaluation(
        examples=held_out.examples,
        batches=fixed_batches(held_out.examples, config.data.batch_size, width, mesh),
        respond=respond,
        read=programs.read,
        reward=source,
        networks=learner.networks,
        reference_params=reference,
        mesh=mesh,
        key=held_out_key,
        tokenizer=tokenizer,
        text=text,
        judge=None if judge is None else judge.removeprefix(tasks.PREFIX),
        samples=config.evaluation.samples,
        folder=folder,
    )

    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
    if checkpoints.steps():
        state = ppo_state.restore(
            learner.abstract, checkpoints, learner.networks, config.ppo, prompts, ptx, identity, step_key
        )
    else:
        params, critic_params = first_decoder(), None
        if first_critic is None:
            params = {"decoder": params, "scalar_head": zero_head(learner.policy)}
        else:
            critic_params = first_critic(init_key(config.seed))
        state = learner.init_state(params, critic_params, step_key)
        draw = functools.partial(programs.respond, learner.networks.decoder_params(state.policy.params))
        score = scorer(config, mesh, policy, reference, source)
        state = learner.calibrated(
            state, calibration_of(config, mesh, train.examples, width, draw, score, calibration_key, show)
        )
    first = ppo_state.steps_of(state, config.ppo)
    if is_writer:
        found = jax.device_get(state.initial_calibration)
        print(f"Token rewards: scale {found.scale:.4g}, centre {found.center:.4g} (from responses of the SFT policy)")
        remove_rows_after(folder.samples, first or -1)
    every = config.evaluation.every
    evaluated = {row["step"] for row in read_rows(folder.metrics) if "eval_reward" in row}
    evaluated |= {first} if first % every and first != num_steps else set()  # none is due

    updates = num_steps * config.ppo.num_epochs * config.ppo.num_minibatches
    rate, updates_a_step = learning_rate(config.optimizer, updates), updates // num_steps
    with (
        open_metrics(folder, config.logging, after_step=first or None, run_config=resolved) as writer,
        Progress("ppo", num_steps, done=first, enabled=show) as progress,
        catch_signals() as stop,
    ):
        state, finished = ppo.fit(
            state,
            config=config.ppo,
            num_steps=num_steps,
            networks=learner.networks,
            programs=programs,
            reference_params=reference,
            prompts=prompts,
            place=prompts_to_devices(mesh),
            ptx=ptx,
            place_ptx=sharded_model.to_devices(mesh, TokenBatch),
            data_fingerprint=identity,
            evaluate=lambda step, state: evaluation(
                step,
                state.policy.params,
                None if state.critic is None else state.critic.params,
                state.initial_calibration,
                stop,
            ),
            evaluation_owed=first > 0 and first not in evaluated,
            eval_every=config.evaluation.every,
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint.every,
            reporter=PPOReporter(
                writer,
                progress,
                every=config.logging.every,
                num_steps=num_steps,
                learning_rate=lambda step: rate(step * updates_a_step),
            ),
            stop=stop,
            key=run_key,
        )
    checkpoints.close()
    if not finished:
        if is_writer:
            step = ppo_state.steps_of(state, config.ppo)
            print(f"Stopped and saved at step {step} of {num_steps}; the same command continues from there.")
        return EXIT_PREEMPTED
    if is_writer:
        print_held_out(folder)
        report = closing_report(folder, config.reward.kind, len(held_out.examples))
        atomic.write_json(folder.path / "evaluation.json", report)
        print_samples(folder)
        print(f"The run is in {folder.path}; samples are in {folder.samples}")
    return 0


def _check(config: Experiment, mesh: Mesh) -> None:
    """What can be said of the config alone."""
    field, parts = "data.batch_size", config.num_microbatches
    check_batch(mesh, field, config.data.batch_size, parts)
    minibatches = config.ppo.num_minibatches
    unit = batch_shards(mesh) * parts * minibatches
    if config.data.batch_size % unit:
        raise UserError(
            f"{option(field)} is {config.data.batch_size}, which does not divide into {minibatches} minibatches of "
            f"{parts} "
            f"microbatches on {batch_shards(mesh)} devices; use a multiple of {unit}, e.g. {flag(field)}={unit}"
        )
    if config.ppo.kl_target is not None and config.ppo.kl_horizon < config.data.batch_size:
        raise UserError(
            f"{option('ppo.kl_horizon')} is {config.ppo.kl_horizon}, less than the {config.data.batch_size} "
            f"responses of a "
            f"step, for which the controller would leap; e.g. {flag('ppo.kl_horizon')}=10000"
        )
    for field, optimizer in (
        ("optimizer", config.optimizer),
        ("critic.optimizer", config.critic.optimizer),
    ):
        if optimizer.offload:
            partition.check_host_memory(mesh, f"{option(f'{field}.offload')}")
    if config.ptx is not None:
        check_batch(mesh, "ptx.batch_size", config.ptx.batch_size, parts)
        check_row_length(mesh, "ptx.max_length", config.ptx.max_length)
    check_judge(config.evaluation.judge)
    answer, longest = config.evaluation.sampling.max_new_tokens, config.rollout.sampling.max_new_tokens
    if answer > longest:
        raise UserError(
            f"{option('evaluation.sampling.max_new_tokens')} is {answer}, but rows have room for responses of "
            f"{option('rollout.sampling.max_new_tokens')} {longest}; e.g. "
            f"{flag('evaluation.sampling.max_new_tokens')}={longest}"
        )
    if config.critic.path is not None and config.ppo.shared_trunk:
        raise UserError(
            f"{option('critic.path')} is {config.critic.path!r}, but {option('ppo.shared_trunk')} gives the critic "
            f"the policy's "
            f"trunk; use {flag('critic.path')}=None or {flag('ppo.shared_trunk')}=False"
        )
    if config.reward.model is None and config.reward.function is None:
        raise UserError(
            f"{option('reward')} has neither model nor function, so there is nothing to learn from; give the run of "
            f"a reward "
            f"model, e.g. {flag('reward.model')}=runs/quickstart/rm_seq2seq"
        )
    if config.reward.function is not None:
        open_function(config.reward.function)
    if weights.is_run(config.model.path):
        weights.find_checkpoint(str(config.model.path), "model.path", weights.POLICIES)
