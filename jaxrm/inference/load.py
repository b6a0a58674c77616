"""Open a model: the run of one, or published weights."""

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from jaxrm import atomic
from jaxrm.algorithms.reward_config import ClassifierConfig
from jaxrm.config import dicts
from jaxrm.data.tokenizer import load_tokenizer, save_tokenizer
from jaxrm.errors import UserError, arguments, flag, option
from jaxrm.inference import parameters, weights
from jaxrm.inference.classifier import Classifier
from jaxrm.inference.open_classifier import open_classifier
from jaxrm.inference.policy import Policy
from jaxrm.inference.reward_kind import default_kind, kind_of, sort_of
from jaxrm.inference.reward_model import RewardModel
from jaxrm.inference.run_checkpoint import RunCheckpoint, find_checkpoint, is_run
from jaxrm.inference.sharded_model import check_tokenizer, shard_model, shard_scalar_model, with_tokens
from jaxrm.models import build, hub
from jaxrm.models.build import ModelSource
from jaxrm.models.config import ModelConfig
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import LANGUAGE_MODELS, REWARD_MODELS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Fields of a config and the arguments here that stand for them.
_ARGUMENTS = {"model": "", "data": "", "reward.model": "path", "reward.classifier": ""}


@arguments(_ARGUMENTS)
def load_policy(
    path: str,
    *,
    adapter: str | None = None,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
    template: str | None = None,
    quantize: str | None = None,
) -> Policy:
    """Load a language model: a policy, or a seq2seq reward model as the decoder that it is.

    Args:
      path: folder of a run of jaxrm, for its latest checkpoint; ``RUN_DIR/checkpoints/STEP``, or ``/best``; or
        published weights: a hub name, a folder with config.json and safetensors, or a GGUF file.
      adapter: adapters that stand on those weights: the folder of a run, or a PEFT folder. A run with adapters may be
        given as ``path`` alone, and then finds its base where it was.
      mesh: devices to put the parameters on, which need not be those of the training; all of them, each with the
        whole model, without it.
      dtype: compute dtype, ``float32`` or ``bfloat16``. By default that of the training, or float32.
      tokenizer: for published weights without one: hub name, folder or GGUF file.
      template: chat template of published weights: a name of `jaxrm.data.named_templates.TEMPLATES`. By default the
        tokenizer's own.
      quantize: how weights that are not adapters are stored, ``int8`` or ``nf4``, see
        `jaxrm.models.build.ModelSource`. By default as in the training, or as they are.

    Raises:
      UserError: where there is no such model, or the tokenizer is not that of the weights.
    """
    path, mesh = _checked_path(path), mesh or build_mesh(MeshConfig())
    if not is_run(adapter or path):
        source = ModelSource(path=path, adapter=adapter, dtype=dtype or "float32", quantize=quantize)
        return _load_weights(source, mesh, tokenizer, template)
    _check_has_own(adapter or path, tokenizer, template)
    run = find_checkpoint(adapter or path, algorithms=LANGUAGE_MODELS)
    run_tokenizer = run.load_tokenizer()
    shape = with_tokens(run.shape, run_tokenizer)
    model = shard_model(as_trained(run, dtype, quantize), mesh, shape, lora=run.lora)
    params = parameters.read_run(run, model, path if adapter else None)
    return Policy(model, params, run_tokenizer, run.config.data.template, run.name)


@arguments(_ARGUMENTS)
def load_reward_model(
    path: str,
    *,
    adapter: str | None = None,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
    template: str | None = None,
    attention: str = "auto",
    quantize: str | None = None,
) -> RewardModel | Classifier:
    """Load a reward model of any sort: published weights are a classifier, where they have its head, or a seq2seq one.

    Args:
      path: see `load_policy`.
      adapter: see `load_policy`.
      mesh: see `load_policy`.
      dtype: see `load_policy`.
      tokenizer: see `load_policy`.
      template: see `load_policy`; of a classifier also a file of Jinja.
      attention: kernel, as in `jaxrm.models.build.ModelSource`.
      quantize: see `load_policy`.

    Raises:
      UserError: where there is no such model, or it is no reward model.
    """
    path, mesh = _checked_path(path), mesh or build_mesh(MeshConfig())
    if adapter is None and not is_run(path) and hub.is_classifier(path):
        options = ClassifierConfig(template=template, dtype=dtype, quantize=quantize)
        return open_classifier(path, options, mesh=mesh, attention=attention, tokenizer=tokenizer)
    if not is_run(adapter or path):
        source = ModelSource(
            path=path, adapter=adapter, dtype=dtype or "float32", attention=attention, quantize=quantize
        )
        peft = weights.peft_adapter(source)
        if peft is not None and peft.scalar_head:
            return _load_scalar_adapter(source, peft, mesh, tokenizer, template)
        return _load_weights(source, mesh, tokenizer, template).as_reward_model("seq2seq")
    _check_has_own(adapter or path, tokenizer, template)
    model = describe_reward_model(adapter or path, mesh=mesh, dtype=dtype, attention=attention, quantize=quantize)
    run = find_checkpoint(adapter or path)
    return model.with_params(parameters.read_run(run, model.model, path if adapter else None))


def describe_reward_model(
    path: str, *, mesh: Mesh, dtype: str | None, attention: str, quantize: str | None = None
) -> RewardModel:
    """The reward model of a run without its parameters, which are None; arguments and errors as `load_reward_model`."""
    run = find_checkpoint(path, algorithms=REWARD_MODELS)
    sort = sort_of(run)
    source = dataclasses.replace(as_trained(run, dtype, quantize), attention=attention)
    tokenizer = run.load_tokenizer()
    return RewardModel(
        (shard_scalar_model if sort == "scalar" else shard_model)(
            source, mesh, with_tokens(run.shape, tokenizer), lora=run.lora
        ),
        None,
        tokenizer,
        run.config.data.template,
        run.name,
        sort=sort,
        instruction=run.config.mapping.instruction if sort == "seq2seq" else "",
        kind=kind_of(run),
    )


def shape_and_tokenizer(path: str) -> tuple[ModelConfig, "PreTrainedTokenizerBase", str]:
    """Shape, tokenizer and chat template of the model that `load_policy` would load; no weights are read.

    Args:
      path: see `load_policy`.

    Raises:
      UserError: as `load_policy`, but for what is wrong with the weights.
    """
    if not is_run(path):
        return _shape_and_tokenizer(ModelSource(path=path), None, None)
    run = find_checkpoint(path, algorithms=LANGUAGE_MODELS)
    tokenizer = run.load_tokenizer()
    return with_tokens(run.shape, tokenizer), tokenizer, run.config.data.template


def check_flags(run: str | None, published: str | None, adapter: str | None = None) -> str:
    """What a command loads: the run that one of its flags names, or the published weights that the other names.

    Args:
      run: ``--checkpoint``.
      published: ``--weights``.
      adapter: ``--adapter``, which stands on published weights or on those of a run.

    Raises:
      UserError: not one of both, the one is no run, the other is one, or an adapter has nothing to stand on.
    """
    if (run is None) == (published is None):
        raise UserError(f"give one of {flag('path')}=RUN_DIR and {flag('model.path')}=MODEL")
    if run is not None:
        if adapter is not None:
            raise UserError(
                f"{option('model.adapter')} goes with {option('model.path')}, not with {option('path')}: give what the "
                f"adapter stands on, {flag('model.path')}=BASE {flag('model.adapter')}={adapter}"
            )
        find_checkpoint(run)
        return run
    assert published is not None
    if is_run(published) and adapter is None:
        raise UserError(
            f"{option('model.path')} is {published!r}, the folder of a run; required are published weights, so give "
            f"it as {flag('path')}={published}"
        )
    return published


def spread_mesh(path: str) -> Mesh:
    """All devices, with the parameters of the model at ``path`` spread over as many as divide them."""
    shape = find_checkpoint(path).shape if is_run(path) else build.read_shape(ModelSource(path=path))
    return build_mesh(MeshConfig(data=-1, fsdp=math.gcd(jax.device_count(), shape.hidden_size)))


def as_trained(run: RunCheckpoint, dtype: str | None = None, quantize: str | None = None) -> ModelSource:
    """How to compute with a run's model: in its dtype and quantized as it was, unless another is given, with this
    platform's attention."""
    trained = run.config.model
    return ModelSource(preset="as trained", dtype=dtype or trained.dtype, quantize=quantize or trained.quantize)


def save_shape_and_tokenizer(config: ModelConfig, tokenizer: "PreTrainedTokenizerBase", folder: RunFolder) -> None:
    """Save shape and tokenizer in the run's folder, once and whole, so that it can be read without its sources."""
    if not folder.model.exists():
        atomic.write_json(folder.model, dicts.to_dict(config))
    if not folder.tokenizer.exists():
        with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=folder.path) as name:
            save_tokenizer(tokenizer, Path(name) / "tokenizer")
            (Path(name) / "tokenizer").rename(folder.tokenizer)


def _load_weights(source: ModelSource, mesh: Mesh, tokenizer_path: str | None, template: str | None) -> Policy:
    shape, tokenizer, template = _shape_and_tokenizer(source, tokenizer_path, template)
    model = shard_model(source, mesh, shape, lora=weights.lora_of(source))
    params = parameters.init_params(model, jax.random.key(0), 0)
    return Policy(model, params, tokenizer, template, weights.name_of(source))


def _load_scalar_adapter(
    source: ModelSource, adapter: hub.Adapter, mesh: Mesh, tokenizer_path: str | None, template: str | None
) -> RewardModel:
    """A scalar reward model whose adapters and head are a PEFT folder of SEQ_CLS."""
    shape, tokenizer, template = _shape_and_tokenizer(source, tokenizer_path, template)
    model = shard_scalar_model(source, mesh, shape, lora=adapter.lora)
    params = parameters.read_adapted(model)
    name, kind = weights.name_of(source), default_kind("scalar")
    return RewardModel(model, params, tokenizer, template, name, sort="scalar", instruction="", kind=kind)


def _shape_and_tokenizer(
    source: ModelSource, tokenizer_path: str | None, template: str | None
) -> tuple[ModelConfig, "PreTrainedTokenizerBase", str]:
    """Of published weights, of an adapter on them, or of an adapter on a run: shape, tokenizer, chat template."""
    own = weights.tokenizer_of(source)
    path = tokenizer_path or own
    assert path is not None, source
    run = find_checkpoint(source.path) if source.path is not None and is_run(source.path) else None
    if template is None and run is not None and own == str(run.folder.tokenizer):
        template = run.config.data.template  # an adapter without a tokenizer of its own
    template = template or "auto"
    shape = weights.read_shape(source)
    tokenizer = load_tokenizer(path)
    check_tokenizer(tokenizer, path, template, source, shape)
    return with_tokens(shape, tokenizer), tokenizer, template


def _checked_path(path: object) -> str:
    if not isinstance(path, str | Path) or not str(path):
        raise UserError(
            f"{option('path')} is {path!r}; it must be the folder of a run, or published weights, "
            f"e.g. {flag('path')}='runs/quickstart/sft'"
        )
    return str(path)


def _check_has_own(path: str, tokenizer: str | None, template: str | None) -> None:
    for name, value in (("tokenizer", tokenizer), ("template", template)):
        if value is not None:
            raise UserError(
                f"{option(f'data.{name}')} is {value!r}, but {path} is a run, which has its own; leave it out"
            )
