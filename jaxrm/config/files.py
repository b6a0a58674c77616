"""Reading a config file: a Python file whose ``get_config()`` returns the config."""

import dataclasses
import difflib
import inspect
import re
import sys
import traceback
import types
from pathlib import Path
from typing import Any

from jaxrm.config import dicts
from jaxrm.config.named_sections import check_repeated_names
from jaxrm.errors import UserError

_GONE = re.compile("ml_collections|to_config_dict|jaxrm.experiment")  # what config files of before import
_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "configs"  # in a wheel; a checkout has them beside the package
_CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"


def load_config_file(name: str, config_class: type | tuple[type, ...] = object) -> tuple[Any, str | None]:
    """Run a config file and return its config and its docstring.

    Args:
      name: ``path/to/file.py``, or ``path/to/file.py:argument`` for a ``get_config`` that takes an argument; for a
        config that comes with jaxrm ``quickstart`` is enough.
      config_class: the frozen dataclass that ``get_config`` may return, or several.

    Returns:
      The config with its fields checked, and the file's docstring.

    Raises:
      UserError: no such file, no ``get_config`` in it, an argument too many or too few, a result that is no
        config, or anything that goes wrong while the file runs, with its line.
    """
    path, colon, argument = name.partition(":")
    if not path:
        raise UserError(f"--config is {name!r}; required a Python file; e.g. --config=configs/quickstart.py")
    path = find_config_file(path)
    module = types.ModuleType("jaxrm_config_file", None)
    sys.modules[module.__name__] = module  # dataclasses of the file look up their string annotations here
    try:
        # a config file is a program; run here, since an import would write a __pycache__ beside it
        module.__file__ = path
        source = _source(path)
        program = compile(source, path, "exec")
        check_repeated_names(source)
        exec(program, module.__dict__)  # noqa: S102  # the user's own program
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError("there is no get_config; required a function get_config() that returns the config")
        arguments = (argument,) if colon else ()
        _check_arguments(get_config, arguments, path)
        config = get_config(*arguments)
    except UserError as error:
        raise UserError(f"{_where(error, path)}: {error}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if Path(frames[-1].filename).resolve().is_relative_to(_PACKAGE) and not isinstance(error, SyntaxError):
            raise  # went wrong inside jaxrm: ours, with its traceback
        advice = (
            "; get_config() returns the config itself, e.g. SFT(...) of jaxrm.stage_config"
            if _GONE.search(str(error))
            else ""
        )
        unknown = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        explain = getattr(module.__dict__.get(unknown[1]), "explain_unknown", None) if unknown else None
        if unknown and explain is not None and (explanation := explain(unknown[2])) is not None:
            raise UserError(f"{_where(error, path)}: {unknown[1]}.{unknown[2]} {explanation}") from error
        raise UserError(f"{_where(error, path)}: {type(error).__name__}: {error}{advice}") from error
    if not isinstance(config, config_class) or not dataclasses.is_dataclass(config):
        classes = config_class if isinstance(config_class, tuple) else (config_class,)
        raise UserError(
            f"{path}: get_config() returns {type(config).__name__}; required the config itself, "
            f"return {' or '.join(each.__name__ for each in classes)}(...)"
        )
    return dicts.checked(config), module.__doc__


def find_config_file(name: str) -> str:
    """The path of a config file.

    Args:
      name: a path, or the bare name of a config that comes with jaxrm, ``quickstart``; a file or folder of that name
        goes first.

    Returns:
      The path as it was given, or that of the config in the checkout or in the installed package.

    Raises:
      UserError: a bare name that is none of these; the message has the nearest ones.
    """
    path = Path(name)
    if path.exists() or path.suffix or path.name != name:
        return name
    files = {file.stem: file for file in sorted(_CONFIGS.glob("*.py"))}
    if name not in files:
        nearest = difflib.get_close_matches(name, files, n=3, cutoff=0.5)
        advice = f"did you mean {' or '.join(nearest)}?" if nearest else f"required a Python file or {', '.join(files)}"
        raise UserError(f"--config is {name!r}, neither a file nor a config that comes with jaxrm; {advice}")
    file, here = files[name], Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


def _source(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except IsADirectoryError:
        raise UserError(f"it is a folder; required a Python file in it, e.g. --config={path}/….py") from None
    except OSError as error:
        folder = Path(path).parent
        files = [str(p) for p in sorted(folder.glob("*.py"))] if folder.is_dir() else []
        nearest = difflib.get_close_matches(path, files, n=1, cutoff=0.5)
        advice = f"did you mean --config={nearest[0]}?" if nearest else "required a Python file with get_config()"
        raise UserError(f"--config cannot be read: {error.strerror}; {advice}") from None


def _check_arguments(get_config: Any, arguments: tuple[str, ...], path: str) -> None:
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        advice = f"--config={path}" if arguments else f"--config={path}:argument"
        raise UserError(f"get_config() does not take what --config gives it: {error}; use {advice}") from None


def _where(error: BaseException, path: str) -> str:
    """``path:line`` of the config file's last line that took part, or ``path``."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"{path}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"{path}:{lines[-1]}" if lines else path
