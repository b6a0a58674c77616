"""Opening a sequence classifier of the hub: checks of its config, tokenizer, template and lengths, then its weights."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrm.algorithms.reward_config import ClassifierConfig
from jaxrm.data import templates
from jaxrm.data.records import Message
from jaxrm.data.tokenizer import first_without_row, load_tokenizer
from jaxrm.errors import UserError, flag, naming, option
from jaxrm.inference import sharded_model
from jaxrm.inference.classifier import Classifier
from jaxrm.models import hub
from jaxrm.models.build import ModelSource
from jaxrm.models.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def describe_classifier(
    path: str,
    config: ClassifierConfig,
    *,
    mesh: Mesh,
    dtype: str = "float32",
    attention: str = "auto",
    tokenizer: str | None = None,
    rows: int = 16,
) -> Classifier:
    """A classifier without its weights, after checks of all else; of a hub name, config and tokenizer are fetched.

    Args:
      path: folder or hub name.
      config: how it reads.
      mesh: the devices.
      dtype: compute dtype, where ``config`` names none.
      attention: kernel, as in `jaxrm.models.build.ModelSource`.
      tokenizer: folder or hub name, where it is not beside the weights.
      rows: dialogues that are scored at once.

    Raises:
      UserError: no classifier of one label, no tokenizer that fits it, no chat template, a length that it cannot read,
        or it does not fit the mesh.
    """
    names = {"model.path": "reward.model", "data.template": "reward.classifier.template"}
    with naming({name: option(place) for name, place in names.items()}):
        shape = hub.read_classifier_config(path)
        if Path(path).expanduser().exists():
            hub.check_classifier(path)  # those of the hub are not fetched for it
        read = _read_tokenizer(path, tokenizer)
        template = _read_template(read, config.template)
        jinja = templates.write_dialogue(read, [Message("user", "x"), Message("assistant", "x")], template)
        outside = first_without_row(read, shape.vocab_size, "".join(jinja.parts))
        if outside is not None:
            raise UserError(
                f"the tokenizer of {path} has {outside[1]!r} with id {outside[0]}, but the classifier has embeddings "
                f"for {shape.vocab_size} tokens; use the tokenizer that belongs to it"
            )
        source = classifier_source(path, config, dtype=dtype, attention=attention)
        model = sharded_model.shard_scalar_model(source, mesh, shape)
        return Classifier(model, None, read, template, _max_length(config, read, shape), path, rows)


def classifier_source(path: str, config: ClassifierConfig, *, dtype: str, attention: str) -> ModelSource:
    """How a classifier computes, as `describe_classifier` says."""
    return ModelSource(path=path, dtype=config.dtype or dtype, attention=attention, quantize=config.quantize)


def open_classifier(path: str, config: ClassifierConfig, *, mesh: Mesh, **options: Any) -> Classifier:
    """A classifier with its weights; arguments and errors as for `describe_classifier`."""
    classifier = describe_classifier(path, config, mesh=mesh, **options)
    return dataclasses.replace(classifier, weights=read_weights(classifier))


def read_weights(classifier: Classifier) -> hub.ClassifierParams:
    """The weights of a classifier that `describe_classifier` has described.

    Raises:
      UserError: naming what is wrong with them.
    """
    source = classifier.model.source
    with naming({"model.path": option("reward.model")}):
        return hub.load_classifier(
            str(source.path),
            shardings=classifier.model.shardings,
            dtype=jnp.dtype(source.dtype),
            quantize=source.quantize,
        )


def _read_tokenizer(path: str, tokenizer: str | None) -> "PreTrainedTokenizerBase":
    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    try:
        return load_tokenizer(path)
    except UserError as error:
        reason = str(error).split("; ")[0]
        raise UserError(
            f"{option('reward.model')} is {path!r}, but {reason}; a classifier is read by its own tokenizer, so put "
            "it beside the weights with the tokenizer's save_pretrained"
        ) from error


def _read_template(tokenizer: "PreTrainedTokenizerBase", template: str | None) -> str:
    """The name of the template; one of a file becomes the tokenizer's own."""
    if template is None or ("/" not in template and not template.endswith((".jinja", ".jinja2", ".j2"))):
        return template or "auto"
    try:
        tokenizer.chat_template = Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{option('data.template')} is {template!r}, which cannot be read ({error}); required is a file of Jinja "
            f"or the name of a template, e.g. {flag('data.template')}=chatml"
        ) from error
    return "auto"


def _max_length(config: ClassifierConfig, tokenizer: "PreTrainedTokenizerBase", shape: ModelConfig) -> int:
    """Most tokens that are read: as configured, or what tokenizer and positions allow."""
    positions = shape.max_position
    if config.max_length is None:
        return min(int(tokenizer.model_max_length), positions)  # a tokenizer that knows none says a huge number
    if config.max_length > positions:
        name = "reward.classifier.max_length"
        raise UserError(
            f"{option(name)} is {config.max_length}, but the classifier reads at most {positions} tokens; e.g. "
            f"{flag(name)}={positions}"
        )
    return config.max_length
