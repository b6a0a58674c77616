"""``adapter_config.json`` of a PEFT folder: what of it jaxrm reads, and what it refuses by name.

The fields are those of ``peft.LoraConfig`` in PEFT 0.21. One that changes what the model computes is either read or
refused; so is one that jaxrm does not know.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jaxrm.errors import UserError
from jaxrm.models.hub.locate import read_json
from jaxrm.models.lora import LoRAConfig

INSTEAD = "merge the adapter into its base with PEFT's merge_and_unload, and give that model"
_HEADS = ("score", "classifier")  # PEFT lists both, whichever of them the model has
_TASKS = (None, "CAUSAL_LM", "SEQ_CLS")
# Initializations that leave the base as it was. Others take the first adapters out of its weights.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_READ = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "use_rslora",
    "bias",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "init_lora_weights",
}
# Fields whose value changes nothing in a plain LoRA model that is not being trained by PEFT.
_NEUTRAL = {
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "lora_dropout",
    "layers_pattern",  # goes with layers_to_transform
    "megatron_core",  # goes with megatron_config
    "loftq_config",  # these go with init_lora_weights
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",  # goes with use_qalora
    "runtime_config",
    "ensure_weight_tying",  # of embeddings and heads, which are refused
}
# What else there is, and what it means in a few words.
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "biases of adapters",
    "fan_in_fan_out": "transposed weights",
    "rank_pattern": "ranks that differ between projections",
    "alpha_pattern": "alphas that differ between projections",
    "layers_to_transform": "adapters of some layers alone",
    "layer_replication": "layers that are repeated",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "adapters of parameters that are no projections",
    "megatron_config": "Megatron's layers",
    "velora_config": "VeLoRA",
    "alora_invocation_tokens": "activated LoRA",
    "monteclora_config": "Monte Carlo LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
}


@dataclass(frozen=True)
class PeftConfig:
    """What an ``adapter_config.json`` says.

    Attributes:
      rank: of the adapters.
      alpha: see `LoRAConfig`.
      rank_stabilized: see `LoRAConfig`.
      targets: ends of the names of modules that have adapters; None where the file has a pattern or nothing, so that
        its tensors decide.
      excluded: ends of the names of modules that have none although ``targets`` names them.
      scalar_head: whether the model is a classifier, whose head is beside the adapters.
      base: name or folder of the base, as the adapter's makers called it; None where they did not say.
    """

    rank: int
    alpha: float
    rank_stabilized: bool
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...]
    scalar_head: bool
    base: str | None

    def names(self, module: str) -> bool | None:
        """Whether a module, ``model.layers.0.mlp.up_proj``, has adapters; None where its tensors decide."""
        if self.targets is None:
            return None
        return _ends(module, self.targets) and not _ends(module, self.excluded)


def parse_peft_config(file: Path) -> PeftConfig:
    """Read an ``adapter_config.json``.

    Raises:
      UserError: naming the field that jaxrm does not do, or that is damaged.
    """
    fields = read_json(file)

    def refuse(name: str, required: str) -> NoReturn:
        raise UserError(f"{file}: {name} is {_short(fields.get(name))}; {required}")

    kind = fields.get("peft_type")
    if kind != "LORA":
        refuse("peft_type", f"jaxrm reads LORA alone; {INSTEAD}")
    for name, meaning in _REFUSED.items():
        if not _is_off(fields.get(name)):
            refuse(name, f"jaxrm does not do {meaning}; {INSTEAD}")
    for name in fields.keys() - _READ - _NEUTRAL - _REFUSED.keys():
        if not _is_off(fields[name]):
            refuse(name, f"jaxrm does not know this field, so what it changes; {INSTEAD}")
    if fields.get("bias", "none") != "none":
        refuse("bias", f"jaxrm reads adapters without trained biases, 'none'; {INSTEAD}")
    if fields.get("task_type") not in _TASKS:
        refuse("task_type", "jaxrm reads CAUSAL_LM, and SEQ_CLS of one label")
    if fields.get("init_lora_weights") not in _INITS:
        refuse("init_lora_weights", f"its adapters stand on a base that this changed; {INSTEAD}")
    rank, alpha = fields.get("r", 8), fields.get("lora_alpha", 8)
    if type(rank) is not int or rank < 1:
        refuse("r", "it must be a whole number of at least 1")
    if type(alpha) not in (int, float) or not 0 < alpha < 1e30:
        refuse("lora_alpha", "it must be a number above 0")
    if not isinstance(fields.get("use_rslora", False), bool):
        refuse("use_rslora", "it must be true or false")
    base = fields.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        refuse("base_model_name_or_path", "it must be a text or null")
    saved = _names(fields, "modules_to_save", refuse)
    if saved is None or any(name not in _HEADS for name in saved):
        refuse("modules_to_save", f"jaxrm reads the head of a classifier, score, and nothing else; {INSTEAD}")
    excluded = _names(fields, "exclude_modules", refuse)
    targets = _names(fields, "target_modules", refuse)
    embeddings = [name for name in targets or () if name.rpartition(".")[2] in ("embed_tokens", "lm_head")]
    if embeddings:
        refuse("target_modules", f"jaxrm has no adapters of {' and '.join(embeddings)}; {INSTEAD}")
    return PeftConfig(
        rank,
        float(alpha),
        fields.get("use_rslora", False),
        None if excluded is None else targets or None,
        excluded or (),
        bool(saved) or fields.get("task_type") == "SEQ_CLS",
        base or None,
    )


def to_peft_config(lora: LoRAConfig, *, scalar_head: bool, base: str | None) -> dict[str, Any]:
    """The fields of an ``adapter_config.json`` that PEFT, transformers and vLLM read."""
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scalar_head else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rank_stabilized,
        "target_modules": list(lora.targets),
        "modules_to_save": ["score"] if scalar_head else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _names(fields: dict[str, Any], name: str, refuse: Any) -> tuple[str, ...] | None:
    """A list of names; None for a pattern."""
    value = fields.get(name)
    if isinstance(value, str):
        return None
    if value is None:
        return ()
    if not isinstance(value, list) or any(not isinstance(item, str) or not item for item in value):
        refuse(name, "it must be a list of names, a pattern or null")
    return tuple(value)


def _ends(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
