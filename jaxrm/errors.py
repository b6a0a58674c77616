"""The one error that a person is meant to read, and how it names the options that the person can type.

A check names a field of the config as ``option("data.path")``, and what to type as ``flag("data.path")``. What these
return depends on where the check runs: ``config.data.path`` in a run of one stage, ``config.sft.data.path`` in a
pipeline, ``--input`` in a command that has a flag of its own for it. `naming` says so, once, around the work. In a
function that a person calls from Python both are the name of its argument, ``path``; `arguments` says so.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

_USUAL: Mapping[str, str] = MappingProxyType({"": "config"})
_names: ContextVar[Mapping[str, str]] = ContextVar("names", default=_USUAL)


class UserError(ValueError):
    """A mistake in what the user gave: shown as one line, without a traceback, with exit status 2.

    Either one text, or the four parts of one: ``UserError("config.clip", "2", "below 1", "--config.clip=0.2")`` reads
    ``config.clip is 2; it must be below 1, e.g. --config.clip=0.2``. It is raised before any device work and before
    anything is written.

    Attributes:
      where: the field, file or argument that is wrong, or the whole text.
      found: what it holds.
      required: what it must be.
      example: something to type that is right.
    """

    def __init__(self, where: str, found: str = "", required: str = "", example: str = "") -> None:
        self.where, self.found, self.required, self.example = where, found, required, example
        text = f"{where} is {found}" if found else where
        text += f"; it must be {required}" if required else ""
        super().__init__(text + (f", e.g. {example}" if example else ""))


class StorageError(Exception):
    """A disk that refused a file while the work went on: shown as one line, with exit status 74.

    The line says what could not be written or read, what is saved, and what to do.
    """


def option(name: str) -> str:
    """A field of the config, ``data.path``, as the person who reads the message knows it; flags pass unchanged."""
    if name.startswith("--"):
        return name
    names = _names.get()
    prefix = max((known for known in names if _is_prefix(known, name)), key=len)
    rest = name[len(prefix) :].lstrip(".")
    return ".".join(part for part in (names[prefix], rest) if part)


def flag(name: str) -> str:
    """The same as it is typed: ``--config.data.path``, in Python ``path``."""
    text = option(name)
    return text if _names.get()[""] == "" else f"--{text.removeprefix('--')}"


@contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Name options otherwise for a while.

    Args:
      names: prefixes of fields and what stands for them, ``{"": "config.sft"}`` in a stage of a pipeline, or
        ``{"data.path": "--input"}`` in a command that has such a flag. The longest prefix counts.
    """
    token = _names.set({**_names.get(), **names})
    try:
        yield
    finally:
        _names.reset(token)


@contextmanager
def arguments(names: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """Name options as the arguments of a Python function, unless a command or a stage has named them already.

    Args:
      names: fields and the arguments that stand for them, ``{"data.path": "path"}``.
    """
    if _names.get() is not _USUAL:
        yield
        return
    with naming({"": "", **names}):
        yield


def _is_prefix(prefix: str, name: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")
