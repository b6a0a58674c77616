"""Files that a command writes beside the one that it reads."""

from collections.abc import Mapping
from pathlib import Path

from jaxrm.config.command_line import check_output_file
from jaxrm.errors import UserError


def check_output_files(source: str, targets: Mapping[str, str | None], stem: str) -> None:
    """Refuse to write where nothing can be written, or over what is read or written otherwise.

    Args:
      source: the file or folder that ``--input`` names.
      targets: what each flag names, or None; the suffix of a good name is ``.html`` for the flag html, else ``.jsonl``.
      stem: a good name without its suffix.
    """
    source_path, written = Path(source).expanduser().resolve(), dict[Path, str]()
    paths = {}
    for flag, path in targets.items():
        if path is None:
            continue
        example = f"{stem}.{'html' if flag == 'html' else 'jsonl'}"
        target = check_output_file(f"--{flag}", path, example).resolve()
        if target in written:
            raise UserError(
                f"--{flag} is {path!r}, and so is --{written[target]}; name two files, e.g. --{flag}={example}"
            )
        written[target] = flag
        paths[flag] = path, target, example
    for flag, (path, target, example) in paths.items():
        if target == source_path or (target.exists() and source_path in target.parents):
            part = "" if target == source_path else "a file of "
            raise UserError(
                f"--{flag} is {path!r}, which is {part}--input and would be overwritten; name another file, "
                f"e.g. --{flag}={example}"
            )
