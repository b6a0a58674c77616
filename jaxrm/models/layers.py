"""The parts of a decoder layer. Given a leading ``stack`` they hold the parameters of all layers at once.

Every parameter carries the names of its logical axes; a leading ``layers`` axis is the stack, and is gone inside
the scan over layers.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxrm.models import quantized, rope
from jaxrm.models.config import ModelConfig
from jaxrm.models.lora import NO_LORA, LoRAConfig, merged_kernel, merged_product, merging_is_less_work

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
# What the projections of a part give, before their bias, for policies of what the backward pass keeps: once, with
# adapters too.
PROJECTED = {"attention": "projected_attention", "mlp": "projected_mlp"}

# Pins an activation, given the logical name of each of its axes, to devices; single-device code leaves it alone.
Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]


def unconstrained(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """The ``Constrain`` of a single device."""
    del axes
    return x


def _identity(x: jax.Array) -> jax.Array:
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(x: jax.Array, kernel: jax.Array, contracted: int) -> jax.Array:
    """``tensordot(x, kernel, contracted)`` in the dtype of ``x``, with a cheaper gradient of the kernel.

    JAX writes that gradient as ``(dy^T x)^T``, for which XLA on CPU transposes ``dy``, the larger of the two, and all
    that is fused into it; here it is ``x^T dy``, in the dtype of the kernel whatever that of ``x`` is. A kernel that is
    not trained has none, and its inputs are not saved for one.
    """
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=contracted)


def _project_forward(x: Any, kernel: Any, contracted: int) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array]]:
    saved = x.value if kernel.perturbed else None
    return jnp.tensordot(x.value, kernel.value.astype(x.value.dtype), axes=contracted), (saved, kernel.value)


def _project_backward(
    contracted: int, residuals: tuple[jax.Array | None, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    x, kernel = residuals
    num_rows = dy.ndim - (kernel.ndim - contracted)
    out_of_dy, out_of_kernel = tuple(range(num_rows, dy.ndim)), tuple(range(contracted, kernel.ndim))
    dx = jax.lax.dot_general(dy, kernel.astype(dy.dtype), ((out_of_dy, out_of_kernel), ((), ())))
    if x is None:
        return dx, None
    rows = tuple(range(num_rows))
    return dx, jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=kernel.dtype)


_project.defvjp(_project_forward, _project_backward, symbolic_zeros=True)


@dataclass(frozen=True)
class ProjectionOptions:
    """What all projections of a decoder have in common.

    Attributes:
      dtype: compute dtype.
      lora: adapters.
      quantize: how kernels are stored, one of ``jaxrm.models.quantized.KINDS``; None as they are.
      on_cpu: whether the devices are CPUs. Their float32 products do not round, so adapters may be added to kernels
        before one: in bfloat16 or TF32, small adapters are lost beside a kernel. In decoding gate and up stay apart.
    """

    dtype: jnp.dtype | type = jnp.float32
    lora: LoRAConfig = NO_LORA
    quantize: str | None = None
    on_cpu: bool = False


PLAIN = ProjectionOptions()


class Projection(nnx.Module):
    """Matrix product over the first ``contracted`` axes of the kernel, and a bias over the rest.

    With adapters (`jaxrm.models.lora`) it adds their part. A quantized one (`jaxrm.models.quantized`) has codes and
    scales in place of the kernel. Decoding uses the kernel transposed, see ``transpose``.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        options: ProjectionOptions,
        place: tuple[str, str],
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        contracted: int = 1,
        bias: bool,
        stddev: float,
    ):
        assert axes[0] == "layers", axes
        self.contracted, self.dtype, self.name = contracted, options.dtype, PROJECTED[place[0]]
        self.output_shape: tuple[int, ...] | None = None  # set once the kernel is transposed
        kernel = stddev * jax.random.normal(rngs.params(), shape)
        self.is_quantized = options.quantize is not None
        if options.quantize is None:
            self.kernel = nnx.Param(kernel, logical_axes=axes)
        else:
            one_layer = functools.partial(quantized.quantize, kind=options.quantize, contracted=contracted)
            codes, scales = jax.vmap(one_layer)(kernel)
            self.codes = nnx.Param(codes, logical_axes=axes)
            self.scales = nnx.Param(scales, logical_axes=("layers", *quantized.scales_axes(axes[1:], contracted)))
        first_output = 1 + contracted
        zeros = jnp.zeros((shape[0], *shape[first_output:]))
        self.bias = nnx.Param(zeros, logical_axes=("layers", *axes[first_output:])) if bias else None
        lora = options.lora
        self.adapter_scale = lora.scale if lora.has(*place) else None
        self.merges_adapters = options.on_cpu and not self.is_quantized
        if self.adapter_scale is not None:
            # Shapes and axes alone: first values are drawn by `jaxrm.models.lora.init_adapters`, apart from the base.
            a, b = (*shape[:first_output], lora.rank), (shape[0], lora.rank, *shape[first_output:])
            self.lora_a = nnx.Param(jnp.zeros(a), logical_axes=(*axes[:first_output], "rank"))
            self.lora_b = nnx.Param(jnp.zeros(b), logical_axes=("layers", "rank", *axes[first_output:]))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply to ``x [B, T, *contracted]``."""
        if self.output_shape is None:
            y = checkpoint_name(self._product(x), self.name)
        else:
            rows = x.shape[: x.ndim - self.contracted]
            y = self._transposed_product(x.reshape(*rows, -1))
            y = y.reshape(*rows, *self.output_shape)
        if self.bias is None:
            return y
        bias = self.bias[...].astype(self.dtype)
        return y + jnp.expand_dims(bias, tuple(range(y.ndim - bias.ndim)))

    def _product(self, x: jax.Array) -> jax.Array:
        """Of the input with the kernel, and with the adapters in whichever way is less work."""
        if self.adapter_scale is None:
            return self._base_product(x)
        a, b = self.lora_a[...], self.lora_b[...]
        if self.merges_adapters and merging_is_less_work(x, self.kernel[...], a, b):
            return merged_product(x, self.kernel[...], a, b, self.adapter_scale, self.contracted)
        low = _project(x, a, self.contracted)
        return self._base_product(x) + self.adapter_scale * _project(low, b, 1)

    def _base_product(self, x: jax.Array) -> jax.Array:
        if self.is_quantized:
            return quantized.product(x, self.codes[...], self.scales[...], self.contracted)
        return _project(x, self.kernel[...], self.contracted)

    def _transposed_product(self, x: jax.Array) -> jax.Array:
        if self.is_quantized:
            return quantized.int8_product(x, quantized.Int8Array(self.codes[...], self.scales[...]), x.dtype)
        return jnp.tensordot(x, self.kernel[...].astype(x.dtype), axes=(-1, -1))

    def transpose(self, weights: str = "compute") -> None:
        """Store the kernel of one layer, without the stack, as a matrix with a row for each output.

        Products of a few rows then read it along its memory: on CPU, at 32 rows, in four fifths of the time. With
        its axes kept apart, XLA there copies the kernel that comes after attention at every token. Adapters are added
        to it, and codes dequantized, since it is a copy anyway.

        Args:
          weights: ``compute`` stores it in the compute dtype, ``int8`` as codes with a scale for each output.
        """
        assert self.output_shape is None
        if self.is_quantized:
            kernel = quantized.dequantize(self.codes[...], self.scales[...], jnp.float32)
            del self.codes, self.scales
            self.kernel, self.is_quantized = nnx.Param(kernel), False
        kernel = self.kernel[...]
        if self.adapter_scale is not None:
            merged = merged_kernel(kernel, self.lora_a[...], self.lora_b[...], self.adapter_scale)
            kernel = merged.astype(kernel.dtype)
        inputs, self.output_shape = kernel.shape[: self.contracted], kernel.shape[self.contracted :]
        matrix = kernel.reshape(math.prod(inputs), -1).T
        if weights == "int8":
            stored = quantized.to_int8(matrix, axis=1)
            del self.kernel
            self.codes, self.scales, self.is_quantized = nnx.Param(stored.codes), nnx.Param(stored.scales), True
        else:
            self.kernel.set_value(matrix.astype(self.dtype))

    def take_in(self, other: "Projection") -> None:
        """Compute another projection of the same input as well: outputs get a first axis of the two.

        Both are transposed, and have as many outputs.
        """
        assert self.output_shape is not None and self.output_shape == other.output_shape
        names = ["codes", "scales"] if self.is_quantized else ["kernel"]
        for name in names if self.bias is None else [*names, "bias"]:
            mine, theirs = getattr(self, name), getattr(other, name)
            mine.set_value(jnp.stack([mine[...], theirs[...]]))
        self.output_shape = (2, *self.output_shape)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, config: ModelConfig, stack: tuple[int, ...], dim: int, axis: str = "norm"):
        self.eps, self.unit_offset = config.norm_eps, config.unit_offset_norm
        fill = jnp.zeros if self.unit_offset else jnp.ones
        self.scale = nnx.Param(fill((*stack, dim)), logical_axes=("layers",) * len(stack) + (axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize ``x [..., dim]``."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32) + (1.0 if self.unit_offset else 0.0)
        return (wide * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; the kernel that attends is given by the caller."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, stack: tuple[int, ...], options: ProjectionOptions):
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        project = functools.partial(Projection, rngs, options)
        into = functools.partial(project, bias=config.qkv_bias, stddev=D**-0.5)
        self.query = into(("attention", "query"), (*stack, D, N, H), ("layers", "embed", "heads", "head_dim"))
        self.key = into(("attention", "key"), (*stack, D, K, H), ("layers", "embed", "kv_heads", "head_dim"))
        self.value = into(("attention", "value"), (*stack, D, K, H), ("layers", "embed", "kv_heads", "head_dim"))
        self.output = project(
            ("attention", "output"),
            (*stack, N, H, D),
            ("layers", "heads", "head_dim", "embed"),
            contracted=2,
            bias=config.output_bias,
            stddev=(2 * config.num_layers * N * H) ** -0.5,
        )
        self.query_norm = RMSNorm(config, stack, H, "head_dim") if config.qk_norm else None
        self.key_norm = RMSNorm(config, stack, H, "head_dim") if config.qk_norm else None

    def qkv(self, x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries ``[B, T, N, H]``, keys and values ``[B, T, K, H]`` of ``x [B, T, D]``, rotated."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return rope.rotate(query, *rotation), rope.rotate(key, *rotation), value


class MLP(nnx.Module):
    """Gated MLP: ``down(act(gate(x)) * up(x))`` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, stack: tuple[int, ...], options: ProjectionOptions):
        D, F = config.hidden_size, config.intermediate_size
        project = functools.partial(Projection, rngs, options, bias=config.mlp_bias)
        self.gate = project(("mlp", "gate"), (*stack, D, F), ("layers", "embed", "mlp"), stddev=D**-0.5)
        self.up = project(("mlp", "up"), (*stack, D, F), ("layers", "embed", "mlp"), stddev=D**-0.5)
        down_stddev = (2 * config.num_layers * F) ** -0.5
        self.down = project(("mlp", "down"), (*stack, F, D), ("layers", "mlp", "embed"), stddev=down_stddev)
        self.activation = _ACTIVATIONS[config.activation]
        self.may_join, self.is_joined = not options.on_cpu, False

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply to ``x [B, T, D]``."""
        gate = self.gate(x)
        gate, up = (gate[..., 0, :], gate[..., 1, :]) if self.is_joined else (gate, self.up(x))
        return self.down(self.activation(gate) * up)

    def join(self) -> None:
        """Read the input once for gate and up, whose kernels are transposed.

        XLA does so by itself on GPU, but then it copies both kernels into one at every token. On CPU it would copy the
        joined kernel at every token, a sixth of the time, so there they stay apart.
        """
        if not self.may_join:
            return
        self.gate.take_in(self.up)
        del self.up
        self.is_joined = True


class Layer(nnx.Module):
    """One decoder layer, or a stack of them when its parameters carry the leading ``layers`` axis."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, stack: tuple[int, ...], options: ProjectionOptions):
        norm = functools.partial(RMSNorm, config, stack, config.hidden_size)
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = Attention(rngs, config, stack, options)
        self.mlp = MLP(rngs, config, stack, options)
        self.post_attention_norm = norm() if config.post_norms else _identity
        self.post_mlp_norm = norm() if config.post_norms else _identity

    def output_and_mlp(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """The rest of the layer after attention: ``x [B, T, D]``, ``attended [B, T, N, H]`` -> ``[B, T, D]``."""
        x = x + self.post_attention_norm(self.attention.output(attended))
        return x + self.post_mlp_norm(self.mlp(self.mlp_norm(x)))


class Embedding(nnx.Module):
    """A table ``[V, D]`` of token embeddings."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig):
        shape = (config.vocab_size, config.hidden_size)
        table = config.hidden_size**-0.5 * jax.random.normal(rngs.params(), shape)
        self.embedding = nnx.Param(table, logical_axes=("vocab", "embed"))
