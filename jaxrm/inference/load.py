"""A trained model from the folder of its run, which is all that is needed to read it."""

import dataclasses
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from jaxrm import atomic
from jaxrm.config import dicts
from jaxrm.data.tokenizer import load_tokenizer, save_tokenizer
from jaxrm.errors import UserError, option
from jaxrm.experiment import Experiment
from jaxrm.inference.sharded_model import ShardedModel, check_tokenizer, shard_model, shard_scalar_model
from jaxrm.inference.weights import LANGUAGE_MODELS, REWARD_MODELS, RunCheckpoint, find_checkpoint, is_run
from jaxrm.models import build
from jaxrm.models.build import ModelSource
from jaxrm.models.config import ModelConfig
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.sharding.mesh import MeshConfig, build_mesh

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Trained:
    """A model with its parameters.

    Attributes:
      model: the decoder.
      params: its parameters, on the devices.
      tokenizer: that it was trained with.
      template: chat template that it was trained with.
      name: where it came from, for people.
    """

    model: ShardedModel
    params: Any
    tokenizer: "PreTrainedTokenizerBase"
    template: str
    name: str


def save_shape_and_tokenizer(config: ModelConfig, tokenizer: "PreTrainedTokenizerBase", folder: RunFolder) -> None:
    """Save shape and tokenizer in the run's folder, once and whole, so that it can be read without its sources."""
    if not folder.model.exists():
        atomic.write_json(folder.model, dicts.to_dict(config))
    if not folder.tokenizer.exists():
        with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=folder.path) as name:
            save_tokenizer(tokenizer, Path(name) / "tokenizer")
            (Path(name) / "tokenizer").rename(folder.tokenizer)


def open_checkpoint(path: str, mesh: Mesh | None, dtype: str | None = None) -> Trained:
    """Language model of a run: a policy, or a seq2seq reward model.

    Args:
      path: see `jaxrm.inference.weights.find_checkpoint`.
      mesh: devices to put the parameters on; need not be those of the training. None: spread over as many as
        divide them.
      dtype: compute dtype, that of the training where it is None.

    Raises:
      UserError: where there is no run, no such checkpoint, or no language model in it.
    """
    found = find_checkpoint(path, algorithms=LANGUAGE_MODELS)
    model = shard_model(as_trained(found, dtype), mesh or _spread(found.shape), found.shape)
    params = found.restore(model.shapes, model.shardings)
    tokenizer = load_tokenizer(str(found.folder.tokenizer))
    return Trained(model, params, tokenizer, found.config.data.template, found.name)


@dataclass(frozen=True)
class TrainedRewardModel(Trained):
    """A reward model with its parameters.

    Attributes:
      config: of its run; ``config.algorithm`` says whether it is a seq2seq or a scalar one.
    """

    config: Experiment

    @property
    def is_seq2seq(self) -> bool:
        """Whether it answers in language."""
        return self.config.algorithm == "seq2seq_rm"


def open_reward_model(
    path: str,
    mesh: Mesh | None,
    dtype: str | None = None,
    *,
    field: str = "--checkpoint",
    attention: str = "auto",
) -> TrainedRewardModel:
    """Reward model of a run, of either sort.

    Arguments as for `open_checkpoint`; ``field`` is for messages, ``attention`` as in `ModelSource`.

    Raises:
      UserError: where there is no run, no such checkpoint, or no reward model in it.
    """
    found = find_checkpoint(path, field, REWARD_MODELS)
    is_seq2seq = found.config.algorithm == "seq2seq_rm"
    open_one = shard_model if is_seq2seq else shard_scalar_model
    source = dataclasses.replace(as_trained(found, dtype), attention=attention)
    model = open_one(source, mesh or _spread(found.shape), found.shape)
    params = found.restore(model.shapes, model.shardings)
    tokenizer = load_tokenizer(str(found.folder.tokenizer))
    return TrainedRewardModel(model, params, tokenizer, found.config.data.template, found.name, found.config)


def as_trained(found: RunCheckpoint, dtype: str | None = None) -> ModelSource:
    """How to compute with a run's model: in its dtype unless another is given, with this platform's attention."""
    return ModelSource(preset="as trained", dtype=dtype or found.config.model.dtype)


def open_weights(source: ModelSource, tokenizer_path: str | None, template: str, mesh: Mesh | None) -> Trained:
    """Published model, as it is; for ``mesh`` see `open_checkpoint`.

    Raises:
      UserError: where there is no such model or its tokenizer does not fit.
    """
    assert source.path is not None
    if is_run(source.path):
        raise UserError(
            f"{option('model.path')} is {source.path!r}, the folder of a run; required are published weights, so "
            f"give it as "
            f"--checkpoint={source.path}"
        )
    shape = build.read_shape(source)
    model = shard_model(source, mesh or _spread(shape), shape)
    path = tokenizer_path or source.path
    tokenizer = load_tokenizer(path)
    check_tokenizer(tokenizer, path, source, model.config)
    params = build.init_params(model.config, source, jax.random.key(0), model.shardings)
    return Trained(model, params, tokenizer, template, source.path)


def _spread(config: ModelConfig) -> Mesh:
    shards = math.gcd(jax.device_count(), config.hidden_size)
    return build_mesh(MeshConfig(data=-1, fsdp=shards))
