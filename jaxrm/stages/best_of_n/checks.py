"""What best-of-n refuses of a config alone."""

from typing import Any

from jax.sharding import Mesh

from jaxrm.errors import UserError, flag, option
from jaxrm.inference.rollout_model import check_is_exact, check_one_response_a_prompt
from jaxrm.sharding.mesh import check_batch
from jaxrm.stages.judge import check_judge
from jaxrm.stages.rewards.sources import check_has_rewards, check_origins
from jaxrm.stages.stage import check_is_policy


def check(config: Any, mesh: Mesh) -> None:
    """Refuse a config that could draw nothing, or choose nothing.

    Raises:
      UserError: no policy, no reward, responses that are all the same, or a batch that does not fit the mesh.
    """
    if config.model.path is None:
        raise UserError(
            f"{option('model.path')} is None; best-of-n draws from a policy, so give the folder of a run or published "
            f"weights, e.g. {flag('model.path')}=runs/quickstart/sft"
        )
    check_one_response_a_prompt(config, "best_of_n.n")
    check_is_exact(config)
    check_has_rewards(config, "no response is the best")
    check_origins(config)
    n, sampling = config.best_of_n.n, config.rollout.sampling
    if n > 1 and (sampling.temperature == 0 or sampling.top_k == 1):
        name = "temperature" if sampling.temperature == 0 else "top_k"
        raise UserError(
            f"{option(f'rollout.sampling.{name}')} is {getattr(sampling, name)}, with which all {n} responses to a "
            f"prompt are the same; e.g. {flag(f'rollout.sampling.{name}')}={1.0 if name == 'temperature' else 0}, or "
            f"{flag('best_of_n.n')}=1"
        )
    check_batch(mesh, "data.batch_size", config.data.batch_size, config.num_microbatches)
    check_judge(config.evaluation.judge)
    check_is_policy(config)
