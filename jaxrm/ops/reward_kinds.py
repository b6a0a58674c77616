"""The table of kinds of token reward, and the kinds that users write."""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax

from jaxrm.errors import UserError, flag, option
from jaxrm.ops.token_rewards import (
    contrast,
    dpo,
    inside_mask,
    literal,
    margin,
    prefix,
    scalar,
    signed,
    soft,
    token_tags,
    value_difference,
)
from jaxrm.ops.vocab import TokenStatistics

Source = Literal["seq2seq", "scalar", "dpo", "text"]


Reads = Literal["tokens", "response", "prefixes", "alignment", "spans"]


# (reading, responses, mask, reference_log_probs) -> u_t
Values = Callable[[Any, jax.Array, jax.Array, jax.Array | None], jax.Array]


CustomKind = Callable[[TokenStatistics, jax.Array, jax.Array], jax.Array]


_Function = TypeVar("_Function", bound=CustomKind)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of token reward: where it comes from, how its values are computed, and whether they are centered.

    Attributes:
      name: as in ``config.reward.kind``.
      needs: the sort of reward model that it reads; ``dpo`` is a policy that DPO trained. A function of text counts as
        a scalar one; ``text`` is a kind that such a function alone can give.
      is_centered: whether the mean value of a token is taken off. Tags and soft values need it, since they pay for
        every token that is written; the other kinds have a zero of their own.
      values: ``(reading, responses, mask, reference_log_probs) -> u_t``, all ``[B, T]``, float32.
      reads: what the reading is: ``tokens``, the `TokenStatistics` of a seq2seq reward model or a policy; ``response``,
        the scores ``[B]`` of a scalar one or of a function of text; ``prefixes``, the scores ``[B, T + 1]`` that a
        scalar one gives to the first 0, 1, ... T tokens of a response; ``alignment``, True ``[B, T]`` on the tokens
        that a seq2seq model's own correction keeps; ``spans``, the numbers ``[B, T]`` of a
        function's spans.
      needs_reference: whether ``values`` reads the reference policy's log-probs ``[B, T]``; else they may be None.
      removes_length: whether the linear effect of length is taken off the score, on the last response token.
    """

    name: str
    needs: Source
    is_centered: bool
    values: Values
    reads: Reads = "tokens"
    needs_reference: bool = False
    removes_length: bool = False

    @property
    def needs_correction(self) -> bool:
        """Whether its reading costs a generation: a seq2seq model's correction of every response."""
        return self.reads == "alignment"


KINDS = {
    kind.name: kind
    for kind in (
        Kind("literal", "seq2seq", True, lambda q, y, mask, _: literal(token_tags(y, q.argmax, mask), mask)),
        Kind("signed", "seq2seq", True, lambda q, y, mask, _: signed(token_tags(y, q.argmax, mask), mask)),
        Kind("prefix", "seq2seq", True, lambda q, y, mask, _: prefix(token_tags(y, q.argmax, mask), mask)),
        Kind("soft", "seq2seq", True, lambda q, y, mask, _: soft(q.log_probs, mask)),
        Kind("margin", "seq2seq", False, lambda q, y, mask, _: margin(q.log_probs, q.max_log_prob, mask)),
        Kind(
            "contrast",
            "seq2seq",
            False,
            lambda q, y, mask, reference: contrast(q.log_probs, reference, mask),
            needs_reference=True,
        ),
        Kind("edit_aligned", "seq2seq", True, lambda stays, y, mask, _: signed(stays, mask), reads="alignment"),
        Kind("scalar", "scalar", False, lambda scores, y, mask, _: scalar(scores, mask), reads="response"),
        Kind(
            "scalar_length_residual",
            "scalar",
            False,
            lambda scores, y, mask, _: scalar(scores, mask),
            reads="response",
            removes_length=True,
        ),
        Kind(
            "value_difference",
            "scalar",
            False,
            lambda scores, y, mask, _: value_difference(scores, mask),
            reads="prefixes",
        ),
        Kind(
            "dpo", "dpo", False, lambda q, y, mask, reference: dpo(q.log_probs, reference, mask), needs_reference=True
        ),
        Kind("spans", "text", False, lambda numbers, y, mask, _: inside_mask(mask, numbers), reads="spans"),
    )
}


def names_for(needs: Source, reads: Reads | None = None) -> tuple[str, ...]:
    """Names of the kinds in the table that one sort of reward model can give, in the table's order.

    Args:
      needs: the sort.
      reads: only those of one reading; of a scalar reward model ``response`` has the kinds that a function of text can
        give too.
    """
    return tuple(name for name, kind in KINDS.items() if kind.needs == needs and reads in (None, kind.reads))


def tags_tokens(name: str) -> bool:
    """Whether a kind comes with tags of tokens, which a seq2seq reward model alone gives."""
    return is_custom(name) or KINDS[name].needs == "seq2seq"


def is_custom(name: str) -> bool:
    """Whether a name is that of a user's own kind, ``package.module:function``. It reads a seq2seq reward model."""
    return ":" in name


def reward_kind(*, is_centered: bool) -> Callable[[_Function], _Function]:
    """Marks a function as a reward kind, and says whether its values are centered.

    The function takes the statistics of a seq2seq reward model (`jaxrm.ops.vocab.TokenStatistics`), the responses and
    their mask, all ``[B, T]``, and returns ``u_t [B, T]``. It is named by ``config.reward.kind=my_kinds:doubt``::

        @jaxrm.reward_kind(is_centered=False)
        def doubt(statistics, responses, mask):
            return statistics.log_probs - statistics.max_log_prob  # how much less likely than the best token

    Args:
      is_centered: True for values that pay for every token that is written, such as tags: their mean is taken off.
        False for values with a zero of their own.
    """

    def mark(function: _Function) -> _Function:
        function.is_centered = is_centered  # type: ignore[attr-defined]  # a mark on the function
        return function

    return mark


def find_kind(name: str) -> Kind:
    """The row of a kind; that of a user's own, ``package.module:function``, is made from the function.

    Raises:
      UserError: where there is no such kind, or the function cannot be imported or does not say whether its values
        are centered.
    """
    if not is_custom(name):
        if name not in KINDS:
            raise UserError(
                option("reward.kind"),
                repr(name),
                f"one of {', '.join(KINDS)}, or package.module:function",
                f"{flag('reward.kind')}=literal",
            )
        return KINDS[name]
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever the user's module raises
        raise UserError(
            f"{option('reward.kind')} is {name!r}, but importing it raised {type(error).__name__}: {error}; required "
            f"package.module:function of a module that python finds from here, e.g. {flag('reward.kind')}=literal"
        ) from error
    is_centered = getattr(function, "is_centered", None)
    if not isinstance(is_centered, bool):
        raise UserError(
            f"{option('reward.kind')} is {name!r}, a function that does not say whether its values are centered; "
            f"write @jaxrm.reward_kind(is_centered=True) on the line above it, or False where its zero means something"
        )
    return Kind(name, "seq2seq", is_centered, functools.partial(_custom_values, name, function))


def _custom_values(
    name: str,
    function: CustomKind,
    statistics: TokenStatistics,
    responses: jax.Array,
    mask: jax.Array,
    reference_log_probs: jax.Array | None,
) -> jax.Array:
    """What a user's function returns, as values; it is refused where that is no array of the mask's shape."""
    del reference_log_probs
    values = function(statistics, responses, mask)
    if getattr(values, "shape", None) != mask.shape:
        raise UserError(
            f"{option('reward.kind')} is {name!r}, whose function returned "
            f"{getattr(values, 'shape', type(values))}; "
            f"required one number for each response token, an array of shape {mask.shape}"
        )
    return inside_mask(mask, values)
