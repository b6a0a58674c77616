"""Low-rank adapters, trained in place of the weights that they stand on (LoRA, Hu et al. 2021, arXiv 2106.09685).

    y = x W + scale (x A) B        A [inputs, rank], B [rank, outputs], B = 0 at first

The adapters of a projection lie beside its kernel as ``lora_a`` and ``lora_b``. So the parameters of a model are one
tree, and what is trained of it is another: the frozen part, the *base*, may be shared by any number of models. What is
here works on such trees, of a decoder or of a decoder with a scalar head, which is trained whole.
"""

import difflib
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxrm.config.fields import above, at_least, bounded, check, finite, wrong

A, B = "lora_a", "lora_b"
SCALAR_HEAD = "scalar_head"
# Name of a projection, as Hugging Face and PEFT have it: its place in a layer, and the axes that its kernel contracts.
PROJECTIONS: dict[str, tuple[tuple[str, str], int]] = {
    "q_proj": (("attention", "query"), 1),
    "k_proj": (("attention", "key"), 1),
    "v_proj": (("attention", "value"), 1),
    "o_proj": (("attention", "output"), 2),
    "gate_proj": (("mlp", "gate"), 1),
    "up_proj": (("mlp", "up"), 1),
    "down_proj": (("mlp", "down"), 1),
}


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters, which are trained in place of the weights that they stand on.

    Attributes:
      rank: of the adapters; 0 trains all weights.
      alpha: the adapters' part is multiplied by ``alpha / rank``.
      rank_stabilized: by ``alpha / sqrt(rank)`` instead (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732), with which
        large ranks learn as fast as small ones.
      targets: projections that have adapters, by the names of Hugging Face. All of them by default, which learns more
        than attention alone at the same number of parameters (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).
    """

    rank: int = bounded(0, at_least(0), meaning=" (0 trains all weights)")
    alpha: float = bounded(16.0, above(0), finite)
    rank_stabilized: bool = False
    targets: tuple[str, ...] = tuple(PROJECTIONS)

    def __post_init__(self) -> None:
        check(self)
        for name in self.targets:
            if name not in PROJECTIONS:
                near = difflib.get_close_matches(name, PROJECTIONS, n=1)
                raise wrong(
                    self,
                    "targets",
                    f"projections of the model, and {name!r} is none; they are {', '.join(PROJECTIONS)}",
                    tuple(near) or ("q_proj", "v_proj"),
                )
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise wrong(self, "targets", "each projection once, at least one", ("q_proj", "v_proj"))
        # In one order, since the same targets in another are the same adapters.
        object.__setattr__(self, "targets", tuple(name for name in PROJECTIONS if name in self.targets))

    @property
    def is_on(self) -> bool:
        """Whether there are adapters at all."""
        return self.rank > 0

    @property
    def scale(self) -> float:
        """What the adapters' part is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def has(self, part: str, projection: str) -> bool:
        """Whether a projection has adapters, e.g. ``has("attention", "query")``."""
        return self.is_on and any(PROJECTIONS[name][0] == (part, projection) for name in self.targets)

    def __str__(self) -> str:
        kind = "rsLoRA" if self.rank_stabilized else "LoRA"
        where = "all projections" if set(self.targets) == set(PROJECTIONS) else ", ".join(self.targets)
        return f"{kind} of rank {self.rank}, alpha {self.alpha:g}, on {where}"


NO_LORA = LoRAConfig()


def is_adapter(path: tuple[Any, ...]) -> bool:
    """Whether a leaf of a parameter tree is one that an adapter run trains."""
    return path[-1].key in (A, B) or any(step.key == SCALAR_HEAD for step in path)


def split(tree: Any) -> tuple[Any, Any]:
    """The trained and the frozen part of a tree like the parameters; all is trained where it has no adapters."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    if not any(path[-1].key in (A, B) for path in paths):
        return tree, {}
    return _only(tree, True), _only(tree, False)


def join(frozen: Any, trained: Any) -> Any:
    """The whole tree from its frozen and its trained part; arrays are shared, not copied."""
    if not isinstance(frozen, dict) or not isinstance(trained, dict):
        raise AssertionError("a parameter is both frozen and trained")
    both = {name: join(frozen[name], trained[name]) for name in frozen.keys() & trained.keys()}
    # In one order whatever the parts are, as JAX sorts the keys of a dict anyway.
    return {
        name: both.get(name, frozen.get(name, trained.get(name))) for name in sorted(frozen.keys() | trained.keys())
    }


def merge(params: Any, config: LoRAConfig) -> Any:
    """Parameters of the model without adapters that computes the same: ``W + scale A B``, in float32."""

    def one(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        if A not in tree:
            return {name: one(part) for name, part in tree.items()}
        rest = {name: part for name, part in tree.items() if name not in (A, B)}
        merged = jax.vmap(functools.partial(merged_kernel, scale=config.scale))(rest["kernel"], tree[A], tree[B])
        return rest | {"kernel": merged}

    return one(params)


def merged_kernel(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """``W + scale A B`` of one layer, float32."""
    return kernel.astype(jnp.float32) + scale * jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)


def merging_is_less_work(x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array) -> bool:
    """Whether `merged_product` has fewer multiplications than two narrow products: for many rows, and in float32.

    A merged kernel of 16 bits would round the adapters away.
    """
    num_inputs, num_outputs = math.prod(a.shape[:-1]), math.prod(b.shape[1:])
    num_rows = x.size // num_inputs
    return x.dtype == kernel.dtype == jnp.float32 and num_rows * (num_inputs + num_outputs) > num_inputs * num_outputs


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def merged_product(
    x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float, contracted: int
) -> jax.Array:
    """``x (kernel + scale a b)``, whose gradients of ``a`` and ``b`` are those of ``scale (x a) b``.

    Beside less work than that of two narrow products, it is one pass over the result and over the gradient of ``x``
    instead of two.

    Args:
      x: ``[..., *contracted]``.
      kernel: ``[*contracted, *outputs]``; where it is not trained it has no gradient.
      a: ``[*contracted, rank]``.
      b: ``[rank, *outputs]``.
      scale: of the adapters.
      contracted: how many axes are summed over.

    Returns:
      ``[..., *outputs]``.
    """
    return jnp.tensordot(x, merged_kernel(kernel, a, b, scale), axes=contracted)


def _merged_product_forward(
    x: Any, kernel: Any, a: Any, b: Any, scale: float, contracted: int
) -> tuple[jax.Array, tuple[Any, ...]]:
    values = (x.value, kernel.value, a.value, b.value)
    return merged_product(*values, scale, contracted), (*values, () if kernel.perturbed else None)


def _merged_product_backward(
    scale: float, contracted: int, residuals: tuple[Any, ...], dy: jax.Array
) -> tuple[jax.Array | None, ...]:
    x, kernel, a, b, is_trained = residuals  # the last is () or None, since a flag would come back as an array
    num_rows = x.ndim - contracted
    rows, outputs = tuple(range(num_rows)), tuple(range(num_rows, dy.ndim))
    over_rows = ((rows, rows), ((), ()))
    low = scale * jnp.tensordot(x, a, axes=contracted)
    d_low = jax.lax.dot_general(dy, scale * b, ((outputs, tuple(range(1, b.ndim))), ((), ())))
    kernel_outputs = tuple(range(contracted, kernel.ndim))
    return (
        jax.lax.dot_general(dy, merged_kernel(kernel, a, b, scale), ((outputs, kernel_outputs), ((), ()))),
        None if is_trained is None else jax.lax.dot_general(x, dy, over_rows),
        jax.lax.dot_general(x, d_low, over_rows),
        jax.lax.dot_general(low, dy, over_rows),
    )


merged_product.defvjp(_merged_product_forward, _merged_product_backward, symbolic_zeros=True)


def init_adapters(shapes: Any, key: jax.Array, shardings: Any) -> Any:
    """First adapters: A uniform within ``1 / sqrt(inputs)`` as PEFT draws it, B zero; each with a key of its name.

    Args:
      shapes: tree of the adapters' `jax.ShapeDtypeStruct`, without a scalar head.
      key: typed PRNG key.
      shardings: the same tree of shardings.
    """

    def draw(key: jax.Array) -> Any:
        leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(structure, [_first(path, x, k) for (path, x), k in zip(leaves, keys, strict=True)])

    return jax.jit(draw, out_shardings=shardings)(key)


def _first(path: tuple[Any, ...], shape: Any, key: jax.Array) -> jax.Array:
    if path[-1].key == B:
        return jnp.zeros(shape.shape, shape.dtype)
    bound = math.prod(shape.shape[1:-1]) ** -0.5
    return jax.random.uniform(key, shape.shape, shape.dtype, -bound, bound)


def _only(tree: Any, trained: bool) -> Any:
    """The trained or the frozen leaves of a tree of dicts."""

    def one(tree: Any, path: tuple[Any, ...]) -> Any:
        if not isinstance(tree, dict):
            return tree if is_adapter(path) == trained else None
        parts = {name: one(part, (*path, jax.tree_util.DictKey(name))) for name, part in tree.items()}
        return {name: part for name, part in parts.items() if part is not None} or None

    return one(tree, ()) or {}
