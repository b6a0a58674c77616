"""Adapters in and out: a PEFT folder, ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT writes the adapters of a projection as ``base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight``, ``[rank,
in]``, and ``lora_B``, ``[out, rank]``; here they lie beside the projection's kernel, all layers in one array.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxrm.errors import UserError
from jaxrm.models.config import ModelConfig
from jaxrm.models.hub.export_folder import exporting, write_json
from jaxrm.models.hub.fetch import check_shapes, fetch_tensor
from jaxrm.models.hub.locate import locate_adapter
from jaxrm.models.hub.names import SCORE, NamedTensor, adapter_table
from jaxrm.models.hub.peft_config import INSTEAD, PeftConfig, parse_peft_config, to_peft_config
from jaxrm.models.hub.safetensors_file import StoredTensor, open_tensors, write_tensors
from jaxrm.models.lora import PROJECTIONS, LoRAConfig

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# The name of an adapter, with what PEFT puts before the layers of a decoder, of the decoder alone, and of the text part
# of a multimodal Gemma 3; "default" is the name of an adapter in a model that holds several.
_ADAPTER = re.compile(
    r"(?P<prefix>base_model\.model\.(?:model\.language_model\.|language_model\.model\.|model\.|))"
    r"(?P<module>layers\.(?P<layer>0|[1-9]\d{0,5})\.(?P<part>self_attn|mlp)\.(?P<target>[a-z]+_proj))"
    r"\.(?P<side>lora_[AB])(?:\.default)?\.weight"
)
_PARTS = {"attention": "self_attn", "mlp": "mlp"}
_VISION = (".vision_tower.", ".multi_modal_projector.")  # of a multimodal Gemma 3, of which the text part is read
# What else a file may hold, by what its name has in it.
_FEATURES = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding": "adapters of embeddings",
    "lora_A.bias": "biases of adapters",
    "lora_B.bias": "biases of adapters",
    "lm_head": "a trained output head",
    "embed_tokens": "trained embeddings",
    "trainable_tokens": "trained tokens",
    "modules_to_save": "whole modules that were trained",
    "base_layer": "weights of the base",
    "score": "a head with a bias",
    ".bias": "trained biases",
}


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder holds, without its tensors.

    Attributes:
      lora: rank, scaling and targets.
      scalar_head: whether a scalar head lies beside the adapters: they are of a scalar reward model.
      base: name or folder of the base, as the adapter's makers called it; None where they did not say.
      folder: where the files are.
    """

    lora: LoRAConfig
    scalar_head: bool
    base: str | None
    folder: Path

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the tensors: that of the adapter's training."""
        return any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def describe_adapter(path: str, config: ModelConfig) -> Adapter:
    """Read what a PEFT folder holds, by its headers alone, and check that it fits its base.

    Args:
      path: a PEFT folder, or the hub name of one.
      config: the base.

    Raises:
      UserError: naming the feature of PEFT that jaxrm does not do, or the tensors that are missing, extra, misshapen or
        of another base.
    """
    return _open(path, config)[0]


def read_adapter(path: str, config: ModelConfig) -> tuple[Adapter, dict[str, Any]]:
    """Read the adapters of a PEFT folder.

    Args:
      path: a PEFT folder, or the hub name of one.
      config: the base.

    Returns:
      What the folder holds, and its tensors as ``jaxrm.models.lora`` has them: a nested dict of float32 NumPy arrays,
      e.g. ``["layers"]["attention"]["query"]["lora_a"]`` of ``[L, D, rank]``. With a scalar head all is below
      ``decoder``, and the head is ``["scalar_head"]["kernel"]``, ``[D]``.

    Raises:
      UserError: as `describe_adapter`.
    """
    adapter, table, stored = _open(path, config)
    layers: dict[tuple[str, ...], list[np.ndarray]] = {}
    for tensor in table:
        array = tensor.from_file(stored[tensor.name].read())
        layers.setdefault(tensor.path, []).append(np.array(array, np.float32, order="C"))
    stacked = {tensor.path: tensor.layer is not None for tensor in table}
    tree: dict[str, Any] = {}
    for place, arrays in layers.items():
        node = tree
        for key in place[:-1]:
            node = node.setdefault(key, {})
        node[place[-1]] = np.stack(arrays) if stacked[place] else arrays[0]
    return adapter, tree


def write_adapter(
    folder: str | os.PathLike[str],
    adapters: dict[str, Any],
    config: ModelConfig,
    lora: LoRAConfig,
    *,
    base: str | None,
    tokenizer: Any = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Path:
    """Write adapters as a PEFT folder; it appears at once, complete, or not at all.

    With several processes, all must call this; process 0 writes, so ``folder`` must be visible to it.

    Args:
      folder: made if absent; its parents too.
      adapters: their tree, of JAX (sharded or not) or NumPy arrays, as `read_adapter` returns it.
      config: the base.
      lora: rank, scaling and targets.
      base: name or folder of the base, for those who open the adapter.
      tokenizer: saved with its ``save_pretrained``, with its chat template; or a folder whose tokenizer files are
        copied.
      dtype: ``float32``, ``bfloat16`` or ``float16``.
      overwrite: replace ``folder`` if it holds an earlier export.

    Returns:
      The folder.

    Raises:
      UserError: if the folder is in use; raised before anything is written.
    """
    scalar_head = "scalar_head" in adapters
    table = adapter_table(config, lora, scalar_head=scalar_head)
    check_shapes(table, adapters)
    # All processes take part in the gathering; adapters are small enough to be held at once.
    with exporting(folder, tokenizer, overwrite=overwrite) as partial_folder:
        arrays = {tensor.name: fetch_tensor(adapters, tensor) for tensor in table}
        if partial_folder is not None:
            write_json(partial_folder / CONFIG, to_peft_config(lora, scalar_head=scalar_head, base=base))
            entries = [(tensor.name, tensor.file_shape) for tensor in table]
            write_tensors(partial_folder / TENSORS, entries, np.dtype(dtype), arrays.__getitem__)
    return Path(folder).expanduser().absolute()


def _open(path: str, config: ModelConfig) -> tuple[Adapter, list[NamedTensor], dict[str, StoredTensor]]:
    folder = locate_adapter(path)
    peft = parse_peft_config(folder / CONFIG)
    file = folder / TENSORS
    if not file.is_file():
        pickles = sorted(file.name for file in folder.glob("adapter_model*.bin"))
        raise UserError(
            f"{folder} holds its adapters only as {pickles[0]}, a pickle, which can run code when read; convert it to "
            "safetensors with PEFT's save_pretrained"
            if pickles
            else f"{folder} has no {TENSORS}; an adapter's folder needs it beside {CONFIG}"
        )
    stored = _with_plain_names(file, open_tensors(file), config)
    prefix, targets = _targets(file, stored, peft, config)
    lora = LoRAConfig(peft.rank, peft.alpha, peft.rank_stabilized, targets)
    table = adapter_table(config, lora, prefix=prefix, scalar_head=peft.scalar_head)
    _check(file, table, stored, peft)
    return Adapter(lora, peft.scalar_head, peft.base, folder), table, stored


def _with_plain_names(file: Path, stored: dict[str, StoredTensor], config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors by the names that PEFT writes today; what is neither an adapter nor a scalar head is refused."""
    plain: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if config.family == "gemma3_text" and any(part in name for part in _VISION):
            continue
        match = _ADAPTER.fullmatch(name)
        if match is None and name != SCORE:
            feature = next((meaning for part, meaning in _FEATURES.items() if part in name), "")
            what = f", {feature}" if feature else ""
            raise UserError(f"{file} holds {name!r}{what}; jaxrm reads adapters of projections alone; {INSTEAD}")
        key = SCORE if match is None else f"{match['prefix']}{match['module']}.{match['side']}.weight"
        if key in plain:
            raise UserError(f"{file} holds {key} twice, with and without .default; remove the one that is wrong")
        plain[key] = tensor
    return plain


def _targets(
    file: Path, stored: dict[str, StoredTensor], peft: PeftConfig, config: ModelConfig
) -> tuple[str, tuple[str, ...]]:
    """What precedes the layers in the names, and the projections that have adapters, which all layers must have."""
    matches = [match for name in stored if (match := _ADAPTER.fullmatch(name)) is not None]
    if not matches:
        raise UserError(f"{file} holds no adapters; save them with PEFT's save_pretrained")
    prefixes = sorted({match["prefix"] for match in matches})
    if len(prefixes) > 1:
        raise UserError(f"{file} holds adapters of {' and of '.join(prefixes)}; jaxrm reads those of one decoder")
    last = max(matches, key=lambda match: int(match["layer"]))
    if int(last["layer"]) >= config.num_layers:
        raise UserError(
            f"{file} holds {last['module']}, but the base has {config.num_layers} layers{_whose(peft)}; give that base"
        )
    for match in matches:
        if match["target"] not in PROJECTIONS or _PARTS[PROJECTIONS[match["target"]][0][0]] != match["part"]:
            raise UserError(f"{file} holds {match[0]!r}, a projection that the base has not{_whose(peft)}")
    present = {match["target"] for match in matches}
    modules = {match["module"] for match in matches}
    inner = prefixes[0].removeprefix("base_model.model.")
    unnamed = sorted(module for module in modules if peft.names(inner + module) is False)
    if unnamed:
        raise UserError(
            f"{file} holds adapters of {unnamed[0]}, which target_modules in {CONFIG} does not name, so PEFT would not "
            "apply them; correct target_modules"
        )
    for layer in range(config.num_layers):
        for name, ((part, _), _) in PROJECTIONS.items():
            module = f"layers.{layer}.{_PARTS[part]}.{name}"
            if module not in modules and (name in present or peft.names(inner + module)):
                raise UserError(
                    f"{file} lacks adapters of {module}; jaxrm needs those of a projection in all {config.num_layers} "
                    f"layers or in none; {INSTEAD}"
                )
    return prefixes[0], tuple(name for name in PROJECTIONS if name in present)


def _check(file: Path, table: list[NamedTensor], stored: dict[str, StoredTensor], peft: PeftConfig) -> None:
    expected = {tensor.name: tensor for tensor in table}
    missing = next((name for name in expected if name not in stored), None)
    if missing == SCORE:
        raise UserError(f"{file} lacks {SCORE}, the head of a classifier, though {CONFIG} says that it is one")
    if missing is not None:
        raise UserError(f"{file} lacks {missing}; save the adapter again with PEFT's save_pretrained")
    if SCORE in stored and SCORE not in expected:
        raise UserError(f"{file} holds {SCORE}, though {CONFIG} has no modules_to_save; correct {CONFIG}")
    for name, tensor in expected.items():
        shape = stored[name].shape
        if shape == tensor.file_shape:
            continue
        if name == SCORE and len(shape) == 2 and shape[1:] == tensor.file_shape[1:]:
            raise UserError(f"{file}: {name} has {shape[0]} labels; jaxrm reads a classifier of one label")
        rank_axis = 1 if ".lora_B." in name else 0
        if name != SCORE and len(shape) == 2 and shape[rank_axis] != peft.rank:
            raise UserError(
                f"{file}: {name} has rank {shape[rank_axis]}, but r in {CONFIG} is {peft.rank}; correct the wrong one"
            )
        raise UserError(
            f"{file}: {name} has shape {list(shape)}, but the base asks for {list(tensor.file_shape)}: the adapter is "
            f"of another base{_whose(peft)}"
        )
    unreadable = next((problem for name in expected if (problem := stored[name].unreadable)), None)
    if unreadable:
        raise UserError(f"{file}: {unreadable}")


def _whose(peft: PeftConfig) -> str:
    return f"; the adapter says that its base is {peft.base!r}" if peft.base else ""
