"""By which kind of token reward a reward model is read, and which kinds it can give."""

import difflib
from typing import TYPE_CHECKING

from jaxrm.errors import UserError, flag, option
from jaxrm.ops import reward_kinds
from jaxrm.ops.reward_kinds import Source

if TYPE_CHECKING:
    from jaxrm.inference.run_checkpoint import RunCheckpoint


def sort_of(run: "RunCheckpoint") -> Source:
    """The sort of the reward model that a run holds."""
    sorts: dict[str, Source] = {"seq2seq_rm": "seq2seq", "scalar_rm": "scalar", "dpo": "dpo"}
    return sorts[run.config.algorithm]


def kind_of(run: "RunCheckpoint") -> str:
    """Kind that the reward model of a run is read by where nothing else is said."""
    sort = sort_of(run)
    return default_kind(sort, None if sort == "dpo" else run.config.reward.kind)


def default_kind(sort: Source, recorded: str | None = None) -> str:
    """Kind that a reward model is read by where nothing else is said: that of its run, if it can give it."""
    kinds = reward_kinds.names_for(sort)
    return recorded if recorded in kinds else kinds[0]


def choose_kind(name: str, sort: Source, kind: str, field: str) -> str:
    """Refuse a kind of token reward that is none, or that a reward model cannot give.

    Args:
      name: of the reward model.
      sort: its own.
      kind: the kind.
      field: argument or field that says it.

    Raises:
      UserError: with the kinds that it can give.
    """
    kinds = reward_kinds.names_for(sort)
    if kind in kinds or (sort == "seq2seq" and reward_kinds.is_custom(str(kind))):
        return kind
    if field == "kind" and kind not in reward_kinds.KINDS:
        near = difflib.get_close_matches(str(kind), kinds, n=1)
        advice = f"did you mean {flag(field)}={near[0]}?" if near else f"e.g. {flag(field)}={kinds[0]}"
        raise UserError(f"{option(field)} is {kind!r}; use one of {', '.join(kinds)}; {advice}")
    raise UserError(
        f"{option(field)} is {kind!r}, but {name} is a {sort} reward model, whose kinds are "
        f"{', '.join(kinds)}; e.g. {flag('kind')}={kinds[0]}"
    )


def check_needs_reference(kind: str, reference: object) -> None:
    """Refuse ``contrast`` and ``dpo`` without a reference policy, and a reference policy with another kind."""
    is_needed = reward_kinds.find_kind(kind).needs_reference
    if is_needed != (reference is not None):
        name = getattr(reference, "name", reference)
        example = f"{flag('kind')}={kind if is_needed else 'contrast'} {flag('reference')}=runs/quickstart/sft"
        raise UserError(
            f"the kind is {kind}, and {option('reference')} is {name}; contrast and dpo compare with a reference "
            f"policy and the other kinds with none, so give both, e.g. {example}, or neither"
        )
