"""Keys of chat messages that say more than role and content: what they say would be lost, so a reason names them."""

from collections.abc import Mapping
from typing import Any

_TOOLS = ("tool_calls", "tool_call_id", "function_call", "tools", "functions")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
_OTHERS = ("documents", "images", "image", "audio", "videos", "video", "refusal", "prefix", "chat_template_kwargs")
_USUAL = {"weight": 1, "train": True, "trainable": True, "loss": True}  # whether a turn is trained on
_OF_RECORDS = ("tool_calls", "reasoning_content", "thinking", "chat_template_kwargs")
_NAMED_ROLES = ("tool", "function", "developer", "ipython", "human", "gpt", "model", "bot", "environment")


def unread_in_message(message: Mapping[str, Any], name: str) -> str | None:
    """Why a message cannot be used for a key that it has; None where it can.

    Args:
      message: the message.
      name: the field that it stands in.
    """
    for key in message:
        if not message[key] and key not in _USUAL:
            continue
        if key in (*_TOOLS, *_THOUGHTS, *_OTHERS):
            return _reason(f"a message of {name!r}", key)
        if key in _USUAL and message[key] is not None and message[key] != _USUAL[key]:
            return f"a message of {name!r} has {key!r}, which is not read; config.data.train_on says what is trained on"
    return None


def unread_in_record(fields: Mapping[str, Any]) -> str | None:
    """The same of a record, for what it has beside its messages."""
    for key in _OF_RECORDS:
        if fields.get(key) and isinstance(fields[key], str | list | dict):
            return _reason("a record", key)
    return None


def name_role(role: Any) -> str:
    """A role that is not known, as a reason names it; of few words, so that reasons are few whatever stands there."""
    return f" ({role!r})" if role in _NAMED_ROLES else ""


def _reason(place: str, key: str) -> str:
    if key in _THOUGHTS:
        return (
            f"{place} has {key!r}, which is not read; write the thought into the content as the model does, "
            "e.g. '<think>\\nthought\\n</think>\\n\\nresponse'"
        )
    if key in _TOOLS:
        return f"{place} has {key!r}, and tools are not read; leave such records out, or write calls into the content"
    return f"{place} has {key!r}, which is not read; leave it out"
