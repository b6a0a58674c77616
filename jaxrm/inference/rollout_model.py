"""How a policy answers prompts: on the mesh that it lies on, or on another layout of the same devices."""

from jax.sharding import Mesh

from jaxrm.algorithms import rollout
from jaxrm.algorithms.rollout import BatchSampler
from jaxrm.inference import sharded_model
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.models.generate import SamplingConfig
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import check_batch, reshape_mesh
from jaxrm.stage_config import PPO


def shard_rollout_model(config: PPO, mesh: Mesh, policy: ShardedModel) -> ShardedModel:
    """The policy as it lies while it answers: on ``config.rollout.mesh``, where that is another mesh than its own.

    Nothing is allocated.

    Args:
      config: the whole config.
      mesh: that the policy lies on.
      policy: its decoder.

    Raises:
      UserError: where model or batch do not fit ``config.rollout.mesh``.
    """
    rollout, batch_size = config.rollout, config.data.batch_size
    field = "mesh" if rollout.mesh is None else "rollout.mesh"
    other = mesh if rollout.mesh is None else reshape_mesh(mesh, rollout.mesh, field)
    check_batch(
        other,
        "data.batch_size",
        batch_size,
        rollout.num_microbatches,
        mesh_field=field,
        microbatches_field="rollout.num_microbatches",
    )
    if other.shape == mesh.shape:
        return policy
    return sharded_model.shard_model(config.model, other, policy.config, lora=policy.lora, field=field)


def build_sampler(
    policy: ShardedModel,
    rollout_model: ShardedModel,
    *,
    dtype: str,
    sampling: SamplingConfig,
    end_ids: tuple[int, ...],
    num_microbatches: int = 1,
) -> BatchSampler:
    """The programs by which a policy answers.

    Args:
      policy: the decoder as it lies in training.
      rollout_model: from `shard_rollout_model`.
      dtype: compute dtype.
      sampling: see `jaxrm.models.generate.generate`.
      end_ids: ids that end a response.
      num_microbatches: parts of a batch of prompts that are answered one after another.
    """
    rows = partition.batch_sharding(rollout_model.mesh)
    sample = rollout.build_sample(
        rollout_model.graphdef,
        sampling=sampling,
        end_ids=end_ids,
        params_sharding=rollout_model.shardings,
        batch_sharding=rows,
        num_microbatches=num_microbatches,
    )
    if rollout_model is policy:
        return BatchSampler(sample)
    reshard = rollout.build_reshard(
        dtype,
        params_sharding=policy.shardings,
        batch_sharding=partition.batch_sharding(policy.mesh),
        to_params=rollout_model.shardings,
        to_batch=rows,
    )
    return BatchSampler(sample, reshard)
