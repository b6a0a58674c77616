"""Refuses a reference policy that reads other token ids, or writes dialogues otherwise, than a reward model."""

from jaxrm.data.template_comparison import Template, write_alike
from jaxrm.data.tokenizer import Vocabulary, unreadable_by
from jaxrm.errors import UserError, flag, option


def check_reference_template(own: Template, name: str, theirs: Template, path: str) -> None:
    """Refuse a reference policy that was trained with another template than a reward model.

    Args:
      own: of the reward model.
      name: what it is called.
      theirs: of the reference.
      path: what ``reference`` names.

    Raises:
      UserError: naming both templates.
    """
    if not write_alike(own, theirs):
        raise UserError(
            f"{option('reference')} is {path!r}, trained with the chat template {theirs[1]!r}, but {name} with "
            f"{own[1]!r}, which writes a dialogue differently; required a policy that was trained with the same"
        )


def check_reference(own: Vocabulary, path: str, theirs: Vocabulary, example: str | None = None) -> None:
    """Refuse a reference policy to which a reward model's token ids mean something else, or nothing.

    Args:
      own: what they mean to the reward model.
      path: what ``reference`` names.
      theirs: what they mean to the reference.
      example: a reference that fits.
    """
    conflict = unreadable_by(theirs, own)
    if conflict is not None:
        advice = f"e.g. {flag('reference')}={example}" if example else "such as the run that it started from"
        raise UserError(
            f"{option('reference')} is {path!r}, which has another vocabulary than {own.name}: {conflict}; "
            f"required a policy that reads the same ids, {advice}"
        )
