"""Which tensor of a Hugging Face checkpoint is which parameter, and how their axes correspond."""

import math
from dataclasses import dataclass, replace

import numpy as np

from jaxrm.models.config import ModelConfig
from jaxrm.models.lora import PROJECTIONS, LoRAConfig

SCORE = "base_model.model.score.weight"  # of a classifier that PEFT saved


@dataclass(frozen=True)
class NamedTensor:
    """One tensor of a checkpoint: one layer's slice of a parameter, or the whole of an unstacked one.

    A checkpoint stores a projection as ``[out, in]`` with heads flattened; ``split`` is that shape with the
    heads unflattened and ``axes`` the transposition that then gives the parameter's order.
    """

    path: tuple[str, ...]  # of the parameter, e.g. ("layers", "attention", "query", "kernel")
    layer: int | None  # index on the parameter's leading axis; None: the parameter is not stacked
    name: str  # in the checkpoint
    file_shape: tuple[int, ...]
    split: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter, without the layer axis."""
        return tuple(self.split[axis] for axis in self.axes)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.file_shape)

    def from_file(self, array: np.ndarray) -> np.ndarray:
        """View a checkpoint's tensor as the parameter."""
        return array.reshape(self.split).transpose(self.axes)

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """View the parameter as the checkpoint's tensor; the inverse of ``from_file``."""
        inverse = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        return array.transpose(inverse).reshape(self.file_shape)


def tensor_table(config: ModelConfig, *, prefix: str = "model.", head: str = "lm_head.weight") -> list[NamedTensor]:
    """Every tensor of a checkpoint of this model, in the order in which checkpoints list them.

    Args:
      config: the model.
      prefix: what precedes ``embed_tokens`` and ``layers`` in the names.
      head: name of the output head, present only when embeddings are not tied.
    """
    V, D = config.vocab_size, config.hidden_size
    table = [_plain(("embedder", "embedding"), None, f"{prefix}embed_tokens.weight", (V, D))]
    for layer in range(config.num_layers):
        table += _layer_tensors(config, layer, f"{prefix}layers.{layer}.")
    table.append(_plain(("final_norm", "scale"), None, f"{prefix}norm.weight", (D,)))
    if not config.tie_embeddings:
        table.append(_plain(("head", "embedding"), None, head, (V, D)))
    return table


def scalar_table(config: ModelConfig, *, prefix: str = "model.", head: str = "score.weight") -> list[NamedTensor]:
    """Every tensor of a sequence classification checkpoint of one label: a ``jaxrm.models.heads.ScalarModel``.

    Args:
      config: the model.
      prefix: see `tensor_table`.
      head: name of the scalar head.
    """
    trunk = tensor_table(replace(config, tie_embeddings=True), prefix=prefix)
    return [*(replace(tensor, path=("decoder", *tensor.path)) for tensor in trunk), _score(config, head)]


def adapter_table(
    config: ModelConfig, lora: LoRAConfig, *, prefix: str = "base_model.model.model.", scalar_head: bool = False
) -> list[NamedTensor]:
    """Every tensor of a PEFT folder's adapters: ``lora_A`` ``[rank, in]`` and ``lora_B`` ``[out, rank]``.

    Args:
      config: the base.
      lora: rank and targets.
      prefix: what precedes ``layers`` in the names.
      scalar_head: of a sequence classification model of one label, which has its head beside the adapters.
    """
    contracted_axes = dict(PROJECTIONS.values())
    table = []
    for tensor in tensor_table(config, prefix=prefix):
        part, projection, name = tensor.path[-3:] if tensor.layer is not None else ("", "", "")
        if name == "kernel" and lora.has(part, projection):
            table += _adapters(tensor, lora.rank, contracted_axes[part, projection])
    if not scalar_head:
        return table
    return [*(replace(tensor, path=("decoder", *tensor.path)) for tensor in table), _score(config, SCORE)]


def _adapters(kernel: NamedTensor, rank: int, contracted: int) -> list[NamedTensor]:
    """The two adapters of a projection, whose kernel contracts its first axes."""
    inputs, outputs = kernel.shape[:contracted], kernel.shape[contracted:]
    place, module = kernel.path[:-1], kernel.name.removesuffix(".weight")
    into, out = len(inputs), len(outputs)
    a = NamedTensor(
        (*place, "lora_a"),
        kernel.layer,
        f"{module}.lora_A.weight",
        (rank, math.prod(inputs)),
        (rank, *inputs),
        (*range(1, into + 1), 0),
    )
    b = NamedTensor(
        (*place, "lora_b"),
        kernel.layer,
        f"{module}.lora_B.weight",
        (math.prod(outputs), rank),
        (*outputs, rank),
        (out, *range(out)),
    )
    return [a, b]


def _score(config: ModelConfig, name: str) -> NamedTensor:
    D = config.hidden_size
    return NamedTensor(("scalar_head", "kernel"), None, name, (1, D), (D,), (0,))


def _plain(path: tuple[str, ...], layer: int | None, name: str, shape: tuple[int, ...]) -> NamedTensor:
    return NamedTensor(path, layer, name, shape, shape, tuple(range(len(shape))))


def _layer_tensors(config: ModelConfig, layer: int, prefix: str) -> list[NamedTensor]:
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    N, K = config.num_heads, config.num_kv_heads

    def vector(path: str, name: str, size: int) -> NamedTensor:
        return _plain(("layers", *path.split("/")), layer, prefix + name, (size,))

    def heads(part: str, name: str, count: int) -> list[NamedTensor]:
        path = ("layers", "attention", part)
        kernel = NamedTensor(
            (*path, "kernel"), layer, f"{prefix}{name}.weight", (count * H, D), (count, H, D), (2, 0, 1)
        )
        if not config.qkv_bias:
            return [kernel]
        bias = NamedTensor((*path, "bias"), layer, f"{prefix}{name}.bias", (count * H,), (count, H), (0, 1))
        return [kernel, bias]

    def linear(part: str, name: str, inputs: int, outputs: int) -> list[NamedTensor]:
        path = ("layers", "mlp", part)
        shape = (outputs, inputs)
        kernel = NamedTensor((*path, "kernel"), layer, f"{prefix}{name}.weight", shape, shape, (1, 0))
        bias = [vector(f"mlp/{part}/bias", f"{name}.bias", outputs)] if config.mlp_bias else []
        return [kernel, *bias]

    table = [vector("attention_norm/scale", "input_layernorm.weight", D)]
    table += heads("query", "self_attn.q_proj", N)
    table += heads("key", "self_attn.k_proj", K)
    table += heads("value", "self_attn.v_proj", K)
    output = ("layers", "attention", "output", "kernel")
    table.append(NamedTensor(output, layer, f"{prefix}self_attn.o_proj.weight", (D, N * H), (D, N, H), (1, 2, 0)))
    if config.output_bias:
        table.append(vector("attention/output/bias", "self_attn.o_proj.bias", D))
    if config.qk_norm:
        table.append(vector("attention/query_norm/scale", "self_attn.q_norm.weight", H))
        table.append(vector("attention/key_norm/scale", "self_attn.k_norm.weight", H))
    if config.post_norms:
        table.append(vector("post_attention_norm/scale", "post_attention_layernorm.weight", D))
        table.append(vector("mlp_norm/scale", "pre_feedforward_layernorm.weight", D))
    else:
        # The name is historical: in families without post-norms this is the norm before the MLP.
        table.append(vector("mlp_norm/scale", "post_attention_layernorm.weight", D))
    table += linear("gate", "mlp.gate_proj", D, F)
    table += linear("up", "mlp.up_proj", D, F)
    table += linear("down", "mlp.down_proj", F, D)
    if config.post_norms:
        table.append(vector("post_mlp_norm/scale", "post_feedforward_layernorm.weight", D))
    return table
