"""What every command of jaxrm shares: the config file, overrides of its fields, flags, and errors in one line.

    python -m jaxrm.train --config=configs/quickstart.py --config.optimizer.lr=3e-6

``--config=file.py[:argument]`` names a Python file whose ``get_config([argument])`` returns the config, a tree of
frozen dataclasses. ``--config.section.field=value`` overrides one field (``--noconfig.section.field`` switches off a
boolean), ``--config.*.section.field=value`` that of every stage of a pipeline which has it. A value is judged by its
field's type, an absent section is made by naming one of its fields, ``None`` can be typed, and every mistake is
answered in one line.

Exit status: what ``main`` returns (0 for None), 2 for a user's mistake, 74 for a disk that refuses a file, 130 for
Ctrl-C.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from absl import flags

from jaxrm.config import dicts, every_stage, field_names, field_types
from jaxrm.config.files import load_config_file
from jaxrm.config.named_sections import typed_names
from jaxrm.config.quiet import silence_libraries, silence_shutdown
from jaxrm.errors import StorageError, UserError, naming
from jaxrm.storage import failure_of

Config = TypeVar("Config")

EXIT_USER_ERROR = 2
EXIT_STORAGE = 74
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
_HELP = {"--help", "-help", "-h", "--helpfull", "--helpshort"}


def run(
    main: Callable[[Config, flags.FlagValues], int | None],
    config_class: type | tuple[type, ...] | None = None,
    *,
    define_flags: Callable[[flags.FlagValues], None] | None = None,
    config_required: bool = True,
    flag_of_field: Mapping[str, str] | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the command line, call ``main(config, flags)`` and return the exit status.

    A command line ends with ``sys.exit(command_line.run(main, StageConfig))``.

    Args:
        main: the command. It receives the frozen config (None if there is none) and the parsed flags; what it
            returns is the exit status, None meaning 0. A `UserError` that it raises becomes one line on
            stderr and status 2; any other exception is ours and keeps its traceback.
        config_class: the frozen dataclass that a config file may give, or several; None for a command without
            ``--config``.
        define_flags: defines the command's own flags on the values that it is given, as in
            ``flags.DEFINE_string("prompt", None, "the text to answer", flag_values=values)``.
        config_required: whether leaving out ``--config`` is a mistake; if not, `main` receives None.
        flag_of_field: for a command without ``--config``, which flag of its own stands for which field of the
            config, ``{"data.path": "--input"}``, since messages name fields.
        argv: the command line, program name first; ``sys.argv`` by default.
    """
    silence_libraries()
    arguments = list(sys.argv if argv is None else argv)
    values = flags.FlagValues()
    if define_flags is not None:
        define_flags(values)
    try:
        wants_help = not _HELP.isdisjoint(arguments)
        path = _config_path(arguments) if config_class is not None else None
        loaded = None if path is None else _Loaded(path, *load_config_file(path, config_class or ()))
        if wants_help:
            print(_help(main, config_class is not None, values, loaded, config_required))
            return 0
        overrides = _parse(arguments, config_class is not None, values, loaded)
        config = None
        if loaded is not None:
            config = dicts.with_changes(loaded.config, _changes(loaded.config, overrides))
        elif config_class is not None and config_required:
            raise UserError("--config is missing; required a config file; e.g. --config=configs/quickstart.py")
        with naming(flag_of_field or {}):
            return main(config, values) or 0  # type: ignore[arg-type]  # None only where it is not required
    except UserError as error:
        return _say(f"error: {error}", EXIT_USER_ERROR)
    except StorageError as error:
        silence_shutdown()
        return _say(f"error: {error}", EXIT_STORAGE)
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_BROKEN_PIPE
    except OSError as error:
        reason = failure_of(error)
        if reason is None:
            raise
        return _say(f"error: {reason}; mend that or make room, and give the same command again", EXIT_STORAGE)
    except KeyboardInterrupt:
        return _say("interrupted", EXIT_INTERRUPTED)


def check_output_file(flag: str, path: str, example: str) -> Path:
    """Where a command may write a file that a flag names.

    Raises:
      UserError: where it is a folder, or in none that can be written to.
    """
    target = Path(path).expanduser()
    folder = target.parent
    reason = None
    if target.is_dir():
        reason = "is a folder"
    elif not folder.is_dir():
        reason = f"cannot be written, since {folder} is no such folder"
    elif not os.access(folder, os.W_OK):
        reason = f"cannot be written, since there is no permission to write in {folder}"
    if reason is not None:
        raise UserError(f"{flag} is {path!r}, which {reason}; give a file, e.g. {flag}={example}")
    return target


def _say(message: str, status: int) -> int:
    with contextlib.suppress(OSError):  # stderr may be a file on the disk that is full
        print(f"jaxrm: {' '.join(message.splitlines())}", file=sys.stderr)
    return status


class _Loaded(NamedTuple):
    """A config file that has been run: its path, what it gave, and its docstring."""

    path: str
    config: Any
    docstring: str | None


def _config_path(arguments: list[str]) -> str | None:
    """What ``--config`` names; None where it is absent, or the line too mistaken to tell, which `_parse` reports."""
    only_config = flags.FlagValues()
    flags.DEFINE_string("config", None, "the config file", flag_values=only_config)
    only_config.set_gnu_getopt(True)
    try:
        only_config(arguments, known_only=True)
    except flags.Error:
        return None
    return only_config.config


def _parse(
    arguments: list[str], takes_config: bool, values: flags.FlagValues, loaded: _Loaded | None
) -> dict[str, str]:
    """Parse the whole command line: own flags land in `values`, overrides are returned as text by name."""
    overrides: dict[str, str] = {}
    names: dict[str, Any] = {}
    if loaded is not None:
        config_class, named = type(loaded.config), _named_sections(loaded.config, arguments)
        every = every_stage.fields_of_stages(config_class, named)
        names = {name: next(iter(types.values())) for name, types in every.items()}
        names |= field_names.field_names(config_class, named=named)
    if takes_config:
        flags.DEFINE_string("config", None, "the config file", flag_values=values)
    for name, annotation in names.items():
        flags.DEFINE_flag(_Override(name, annotation, overrides), values)
    values.set_gnu_getopt(True)  # flags may follow a stray word, which is reported below
    try:
        rest = values(arguments)[1:]
    except flags.UnrecognizedFlagError as error:
        if takes_config and loaded is None and error.flagname.startswith(("config.", "noconfig.")):
            name = error.flagname.split("=")[0]
            raise UserError(f"--{name} overrides nothing; give its file too, --config=configs/….py") from None
        raise _unknown_flag(error.flagname.split("=")[0], values, loaded) from None
    except (flags.Error, ValueError) as error:
        raise _wrong_flag(str(error), values) from None
    if rest:
        raise UserError(f"{rest[0]!r} stands alone on the command line; flags are written --name=value")
    return overrides


def _unknown_flag(name: str, values: flags.FlagValues, loaded: _Loaded | None) -> UserError:
    fields = [known for known in values if known.startswith("config.")]
    if loaded is not None and re.match(r"(no)?config\.", name):
        is_off, name = name.startswith("no"), name.removeprefix("no")
        if is_off and name in values:
            return UserError(f"--no{name} switches off a bool, and {name} is none; give a value, --{name}=…")
        if name.startswith(every_stage.PREFIX):
            return every_stage.unknown_field(name, type(loaded.config), loaded.path)
        return field_names.unknown_field(name, type(loaded.config))
    own = [f"--{known}" for known in values if known not in fields]
    advice = field_names.did_you_mean(f"--{name}", own)
    advice = advice or field_names.did_you_mean(f"--config.{name}", [f"--{field}" for field in fields])
    return UserError(f"--{name} is no flag of this command; {advice or '--help lists the flags'}")


def _wrong_flag(message: str, values: flags.FlagValues) -> UserError:
    """Absl's message about a flag's value in our form."""
    match = re.match(r"flag --(.+?)=(.*?): (.*)$", message, re.DOTALL)
    if match is None or match[1] not in values:
        return UserError(f"{message}; flags are written --name=value")
    flag = values[match[1]]
    if flag.value is None and match[2] == "None":
        return UserError(f"--{flag.name} is missing; required {flag.help}")
    required = f"required {flag.parser.syntactic_help}" if flag.parser.syntactic_help else match[3]
    good = flag.default
    if isinstance(flag.parser, flags.EnumParser):
        required, good = f"use one of {', '.join(flag.parser.enum_values)}", good or flag.parser.enum_values[0]
    example = "" if good is None else f"; e.g. --{flag.name}={field_types.as_text(good)}"
    return UserError(f"--{flag.name} is {match[2]!r}; {required}{example}")


class _Override(flags.Flag):
    """``--config.section.field=text``: kept as text until the config file's own values are known."""

    def __init__(self, name: str, annotation: Any, overrides: dict[str, str]) -> None:
        super().__init__(flags.ArgumentParser(), None, name, None, "a field of the config")
        self.boolean = bool in field_types.kinds_of(annotation)
        self._overrides = overrides

    def parse(self, argument: str) -> None:
        super().parse(argument)
        self._overrides.pop(self.name, None)  # the last one counts, and stands last
        self._overrides[self.name] = argument


def _changes(config: Any, overrides: Mapping[str, str]) -> dict[str, Any]:
    """What was typed as values of the fields' types, by name without ``config.``."""
    named = _named_sections(config, [f"--{name}=" for name in overrides])
    names = field_names.field_names(type(config), named=named)
    every = every_stage.fields_of_stages(type(config), named)
    changes: dict[str, Any] = {}
    for name in sorted(overrides, key=lambda name: name not in every):  # what is said of one stage stands last
        for own_name, annotation in (every.get(name) or {name: names[name]}).items():
            field = own_name.removeprefix("config.")
            changes.pop(field, None)
            changes[field] = dicts.parse_text(
                overrides[name], annotation, name, example=field_names.value_at(config, field)
            )
    return changes


def _named_sections(config: Any, arguments: Sequence[str]) -> list[str]:
    """Dotted names of the named sections that the config has or the command line adds."""
    given = field_names.names_given(config)
    typed = typed_names(arguments, field_names.named_fields(type(config)))
    return list(dict.fromkeys([*given, *every_stage.added_sections(arguments, type(config), given), *typed]))


def _help(
    main: Callable, takes_config: bool, values: flags.FlagValues, loaded: _Loaded | None, config_required: bool
) -> str:
    """Usage, the command's flags, and the fields of the config with the values of the file, if one is given."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = spec.name if spec is not None and spec.name.startswith("jaxrm.") else "jaxrm.…"
    usage = " --config=configs/….py [--config.section.field=value …]" if takes_config else ""
    usage = usage if config_required or not usage else f" [{usage.strip()}]"
    lines = [f"usage: python -m {name}{usage}{' [flags]' if len(values) else ''}"]
    lines += ["", *(sys.modules[main.__module__].__doc__ or "").strip().splitlines()]
    if len(values):
        lines += ["", "Flags:"]
        lines += [f"  --{n}={field_types.as_text(values[n].default)}  {values[n].help}" for n in values]
    if not takes_config:
        return "\n".join(lines)
    if loaded is None:
        return "\n".join([*lines, "", "--config=configs/….py --help lists the fields of the config too."])
    lines += ["", f"{loaded.path}:", *(f"  {line}" for line in (loaded.docstring or "").strip().splitlines())]
    lines += ["", f"Fields of the config, with the values of {loaded.path}:"]
    lines += [f"  {line}" for line in every_stage.help_lines(type(loaded.config))]
    lines += [f"  --{line}" for line in field_names.describe(type(loaded.config), loaded.config)]
    return "\n".join(lines)
