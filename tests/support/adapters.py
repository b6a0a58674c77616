"""Adapters of tiny models: random trees, PEFT folders of them, and our own logits with or without them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxrm.models import build, heads
from jaxrm.models.build import ModelSource
from jaxrm.models.config import ModelConfig
from jaxrm.models.hub.names import adapter_table
from jaxrm.models.hub.peft import CONFIG, TENSORS, write_adapter
from jaxrm.models.lora import NO_LORA, LoRAConfig

SOURCE = ModelSource(preset="given")
LLAMA = ModelConfig(
    family="llama",
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_position=64,
)


def random_adapters(config: ModelConfig, lora: LoRAConfig, *, scalar_head: bool = False) -> dict:
    """A tree of adapters, B too, none of which is zero."""
    rng = np.random.default_rng(7)
    tree: dict = {}
    for tensor in adapter_table(config, lora, scalar_head=scalar_head):
        node = tree
        for key in tensor.path[:-1]:
            node = node.setdefault(key, {})
        stack = () if tensor.layer is None else (config.num_layers,)
        if tensor.path[-1] not in node:
            node[tensor.path[-1]] = rng.normal(size=(*stack, *tensor.shape), scale=0.1).astype(np.float32)
    return tree


def random_params(config: ModelConfig, *, scalar_head: bool = False) -> dict:
    """Parameters of a base."""
    rng = np.random.default_rng(3)
    _, shapes, _ = build.abstract_decoder(config, SOURCE)
    decoder = jax.tree.map(lambda shape: rng.normal(size=shape.shape, scale=0.3).astype(np.float32), shapes)
    if not scalar_head:
        return decoder
    return heads.from_decoder_params(decoder, {"kernel": rng.normal(size=config.hidden_size).astype(np.float32)})


def our_logits(params: dict, config: ModelConfig, tokens: np.ndarray, lora: LoRAConfig = NO_LORA) -> np.ndarray:
    """Logits ``[B, T, V]`` of a decoder, or a scalar model's numbers ``[B, T]``; with adapters where ``lora`` has."""
    is_scalar = "scalar_head" in params
    make = build.abstract_scalar_model if is_scalar else build.abstract_decoder
    graphdef, _, _ = make(config, SOURCE, lora=lora)

    @jax.jit
    def forward(params, tokens):
        model = nnx.merge(graphdef, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = model(tokens, positions=positions, segment_ids=jnp.ones_like(tokens))
        return hidden if is_scalar else model.logits(hidden)

    return np.asarray(forward(params, jnp.asarray(tokens)))


def adapter_folder(
    folder: Path, *, scalar_head: bool = False, lora: LoRAConfig | None = None, **fields: object
) -> Path:
    """A PEFT folder of `LLAMA`, with fields of its ``adapter_config.json`` changed."""
    lora = lora or LoRAConfig(rank=4, targets=("q_proj", "down_proj"))
    tree = random_adapters(LLAMA, lora, scalar_head=scalar_head)
    write_adapter(folder, tree, LLAMA, lora, base="some/base")
    change_config(folder, **fields)
    return folder


def change_config(folder: Path, **fields: object) -> None:
    """Change fields of an ``adapter_config.json``."""
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change_tensors(folder: Path, change) -> None:
    """Change the dict of tensors of a PEFT folder."""
    tensors = load_file(folder / TENSORS)
    save_file(change(tensors), folder / TENSORS)
