"""Sequence classifiers of one label, which are scalar reward models: their config, their head and their weights.

transformers' classes for it (``LlamaForSequenceClassification`` and those of the other families) call the head
``score`` and read it at the last token that is not padding by its id. Value heads that others put on a language model,
``v_head`` (TRL's is ``v_head.summary``) and ``reward_head``, are read at the last token. No code of a model's makers is
run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxrm.errors import UserError
from jaxrm.models import lora
from jaxrm.models.config import ModelConfig
from jaxrm.models.hub.hf_config import parse_hf_config
from jaxrm.models.hub.locate import locate, read_json
from jaxrm.models.hub.names import NamedTensor, scalar_table
from jaxrm.models.hub.read import Params, check_tensors, open_folder, read_tensors, tensor_naming
from jaxrm.models.hub.safetensors_file import StoredTensor

_SCORE = "score"
HEADS = (_SCORE, "v_head", "v_head.summary", "reward_head")
"""Names of heads that are read, without ``.weight`` and ``.bias``."""
_CLASSIFIER = "ForSequenceClassification"
_LANGUAGE_MODELS = ("ForCausalLM", "ForConditionalGeneration")  # which a value head may be on
_INSTEAD = f"give a model whose architectures end in {_CLASSIFIER} and that has one label"


@dataclass(frozen=True)
class ClassifierParams:
    """Weights of a classifier.

    Attributes:
      params: of a `jaxrm.models.heads.ScalarModel`.
      bias: of its head, which is added to every score.
      pad_id: the score is read at the last token that is not this one; None where it is read at the last token.
    """

    params: Params
    bias: float
    pad_id: int | None


def is_classifier(path: str) -> bool:
    """Whether published weights are no language model alone: a class for something else, or a head beside theirs.

    Args:
      path: a hub name, a model folder, or a ``.gguf`` file.

    Raises:
      UserError: as `locate` and `open_folder`.
    """
    source = locate(path)
    if source.is_file():
        return False
    architecture = _architecture(read_json(source / "config.json"))
    if architecture is not None and not architecture.endswith(_LANGUAGE_MODELS):
        return True
    return any(source.glob("*.safetensors")) and bool(_heads(open_folder(source)))


def read_classifier_config(path: str) -> ModelConfig:
    """Read the decoder's configuration of a classifier; of a hub name, nothing else is fetched.

    Raises:
      UserError: it is no classifier of one label, or needs something that jaxrm does not do, naming the field.
    """
    return _read_config(path, config_only=True)[0]


def check_classifier(path: str) -> None:
    """Refuse weights that `load_classifier` would refuse, by their headers alone.

    Raises:
      UserError: naming the missing, extra, misshapen or unreadable tensors.
    """
    _open(path)


def load_classifier(
    path: str, *, shardings: Params, dtype: Any = jnp.float32, quantize: str | None = None
) -> ClassifierParams:
    """Read a classifier's weights, a language head left out; norms and the scalar head stay in float32.

    Args:
      path: a hub name, or a model folder with safetensors.
      shardings: of a `jaxrm.models.heads.ScalarModel`.
      dtype: of kernels and embeddings.
      quantize: see `jaxrm.models.hub.load_params`.

    Raises:
      UserError: as `check_classifier`, or the config is refused.
    """
    table, stored, pad_id, bias = _open(path)

    def dtype_of(place: tuple[str, ...]) -> Any:
        return jnp.float32 if place[-1] == "scale" or place[0] == lora.SCALAR_HEAD else dtype

    params = read_tensors(table, stored, shardings=shardings, dtype_of=dtype_of, quantize=quantize)
    return ClassifierParams(params, 0.0 if bias is None else float(bias.read().reshape(())), pad_id)


def _read_config(path: str, *, config_only: bool) -> tuple[ModelConfig, dict[str, Any], Path]:
    source = locate(path, config_only=config_only)
    if source.is_file():
        raise UserError(f"{source} is a GGUF file, which holds a language model; {_INSTEAD}, as safetensors")
    file = source / "config.json"
    values = read_json(file)
    _check_class(values, str(file))
    _check_labels(values, str(file))
    return parse_hf_config(values, where=str(file)), values, source


def _architecture(values: Mapping[str, Any]) -> str | None:
    listed = values.get("architectures")
    return str(listed[0]) if isinstance(listed, list) and listed else None


def _check_class(values: Mapping[str, Any], where: str) -> None:
    architecture = _architecture(values)
    if architecture is not None and not architecture.endswith((_CLASSIFIER, "RewardModel", *_LANGUAGE_MODELS)):
        raise UserError(
            f"{where}: architectures is {architecture!r}, whose scores jaxrm cannot compute, since code of a model's "
            f"makers is never run; {_INSTEAD}"
        )


def _check_labels(values: Mapping[str, Any], where: str) -> None:
    count, names = values.get("num_labels"), values.get("id2label")
    if count is None and isinstance(names, dict):
        count = len(names)
    if count not in (None, 1):
        listed = f" ({', '.join(map(str, names.values()))})" if isinstance(names, dict) and names else ""
        raise UserError(f"{where} says that the classifier has {count} labels{listed}; {_INSTEAD}")
    problem = values.get("problem_type")
    if problem not in (None, "regression"):
        raise UserError(f"{where}: problem_type is {problem!r}; a reward is a number, regression, so {_INSTEAD}")


def _heads(stored: Mapping[str, StoredTensor]) -> list[str]:
    return [name for name in HEADS if f"{name}.weight" in stored]


def _open(
    path: str,
) -> tuple[list[NamedTensor], dict[str, StoredTensor], int | None, StoredTensor | None]:
    """Table and tensors of a classifier, which have been checked; its padding id, if that decides where its score is
    read; and the bias of its head."""
    config, values, source = _read_config(path, config_only=False)
    stored = open_folder(source)
    head = _choose_head(_architecture(values), stored, source)
    shape, D = stored[f"{head}.weight"].shape, config.hidden_size
    if shape != (1, D) and len(shape) == 2 and shape[1] == D:
        raise UserError(f"{source}: {head}.weight has {shape[0]} labels; a reward model has one; {_INSTEAD}")
    bias = None
    if head != _SCORE and (name := f"{head}.bias") in stored:
        bias = stored[name]
        if bias.shape != (1,) or bias.unreadable:
            raise UserError(f"{source}: {name} has shape {list(bias.shape)}; it must be one number")
        stored = {key: tensor for key, tensor in stored.items() if key != name}
    table = scalar_table(config, prefix=tensor_naming(stored)["prefix"], head=f"{head}.weight")
    check_tensors(table, stored, replace(config, tie_embeddings=True), source)  # a language head is left out
    return table, stored, _pad_id(values, source) if head == _SCORE else None, bias


def _choose_head(architecture: str | None, stored: Mapping[str, StoredTensor], source: Path) -> str:
    """The head that the weights have."""
    names = _heads(stored)
    if architecture is not None and architecture.endswith(_CLASSIFIER) and _SCORE not in names:
        raise UserError(
            f"{source} lacks score.weight, the head of {architecture}, which transformers would draw by chance"
            f"{_other_heads(stored)}; {_INSTEAD} and its head"
        )
    if not names:
        raise UserError(
            f"{source} holds no head of a reward model{_other_heads(stored)}; jaxrm reads those that are called "
            f"{', '.join(HEADS)}; {_INSTEAD}"
        )
    if len(names) > 1:
        raise UserError(f"{source} holds the heads {' and '.join(names)}; remove the one that is not the reward's")
    return names[0]


def _other_heads(stored: Mapping[str, StoredTensor]) -> str:
    """What may be a head of another name, in words."""
    others = [name for name in stored if "layers." not in name and ("head" in name or "score" in name)]
    others = [name for name in others if not name.endswith("lm_head.weight")]
    return f", though it holds {', '.join(others[:3])}" if others else ""


def _pad_id(values: Mapping[str, Any], source: Path) -> int | None:
    """The padding id that transformers would go by."""
    text = values.get("text_config")
    fields = text if isinstance(text, dict) else values
    default = 0 if str(values.get("model_type")).startswith("gemma") else None  # which config.json may leave out
    value = fields.get("pad_token_id", default)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise UserError(f"{source / 'config.json'}: pad_token_id is {value!r}; it must be a token id")
    return value
