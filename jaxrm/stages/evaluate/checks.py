"""What the evaluation stage refuses of a config alone."""

from typing import Any

import jax
from jax.sharding import Mesh

from jaxrm.algorithms.reward_config import has_rewards
from jaxrm.data import tasks
from jaxrm.errors import UserError, flag, option
from jaxrm.inference import run_checkpoint, weights
from jaxrm.inference.rollout_model import check_is_exact, check_one_response_a_prompt
from jaxrm.sharding.mesh import check_batch
from jaxrm.stages.judge import check_judge
from jaxrm.stages.rewards.sources import check_origins
from jaxrm.stages.stage import check_is_policy


def check(config: Any, mesh: Mesh) -> None:
    """Refuse a config without a policy, with prompts that are not there, or with answers that cannot be measured.

    Raises:
      UserError: naming the field.
    """
    if config.model.path is None:
        raise UserError(
            f"{option('model.path')} is None; give the policy that is to answer, the folder of a run or published "
            f"weights, e.g. {flag('model.path')}=runs/quickstart/sft"
        )
    if jax.process_count() > 1:
        raise UserError("evaluating a policy is the work of one process; run it on one host")
    known = tasks.SPLITS if config.data.path.startswith(tasks.PREFIX) else ("heldout",)
    for split in config.evaluate.splits:
        if split not in known:
            raise UserError(
                f"{option('evaluate.splits')} has {split!r}; the prompts of {config.data.path} are {', '.join(known)}, "
                f"e.g. {flag('evaluate.splits')}=heldout"
            )
    if config.evaluate.best_of > 1 and not has_rewards(config):
        raise UserError(
            f"{option('evaluate.best_of')} is {config.evaluate.best_of}, but {option('reward')} has no model, function "
            f"or endpoint that would say which is best; e.g. {flag('reward.model')}=runs/quickstart/rm_seq2seq"
        )
    check_one_response_a_prompt(config, "evaluate.best_of")
    check_is_exact(config)
    if has_rewards(config):
        check_origins(config)
    if config.evaluate.evaluate_checkpoints:
        _check_checkpoints(config)
    check_batch(mesh, "data.batch_size", config.data.batch_size, config.num_microbatches)
    check_judge(config.evaluation.judge)
    check_is_policy(config)


def _check_checkpoints(config: Any) -> None:
    """Refuse to evaluate checkpoints of what is no run, or without the policy where its training began."""
    if config.evaluate.reference is None or "sampled" not in config.evaluate.decodings:
        raise UserError(
            f"{option('evaluate.evaluate_checkpoints')} is True, which needs a {option('evaluate.reference')}, where "
            f"training began, and sampled answers; e.g. {flag('evaluate.reference')}=runs/quickstart/sft"
        )
    field, path = weights.trained_place(config.model)
    if not run_checkpoint.is_run(path):
        raise UserError(
            f"{option('evaluate.evaluate_checkpoints')} is True, but {option(field)} is {path!r}, "
            f"which is no run and has no checkpoints; use {flag('evaluate.evaluate_checkpoints')}=False"
        )
