"""Data sets of the hub, through the ``datasets`` library."""

import re
from collections.abc import Iterator
from typing import Any

from jaxrm.data.file_names import is_data
from jaxrm.data.files import RawRecord, import_module, one_line
from jaxrm.data.sources import Place
from jaxrm.errors import UserError, flag, option


def is_hub_name(path: str) -> bool:
    """Whether a path may be ``org/name``, ``org/name:configuration`` or ``org/name/folder``."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+)?(:[\w.-]+)?", path)) and not is_data(path)


def hub_rows(place: Place, split: str, revision: str | None) -> Iterator[RawRecord]:
    """The rows of one split, with their places.

    Args:
      place: whose ``path`` is the name.
      split: as the library takes it.
      revision: branch, tag or commit; None is the main branch.

    Raises:
      UserError: it could not be had.
    """
    datasets = import_module("datasets", "read data sets from the hub")
    name, _, configuration = place.path.partition(":")
    repository, folder = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        rows = datasets.load_dataset(repository, configuration or None, data_dir=folder or None, split=split, **pinned)
    except Exception as error:  # datasets raises whatever its storage, parsers and the network raise
        reason = one_line(error)
        raise UserError(
            _message(place, split, reason, f"{repository}/{configuration or folder or 'FOLDER'}")
        ) from error
    index = -1
    try:
        for index, row in enumerate(rows):
            yield f"{name}[{split}]:{index}", row
    except Exception as error:  # a column of images or sounds is decoded as it is read
        reason = one_line(error)
        raise UserError(
            f"{option(place.field)} {place.path!r} cannot be read behind record {index}: {reason}; write its text to a "
            f"file, e.g. {flag(place.field)}=pairs.jsonl"
        ) from error


def _message(place: Place, split: str, reason: str, folder: str) -> str:
    where, use = f"{option(place.field)} {place.path!r}", flag(place.field)
    if "script" in reason.lower():
        return (
            f"{where} is made by a loading script, which the datasets library no longer runs ({reason}); give the "
            f"hub's copy of it as tables, e.g. {use}={folder} {flag('data.revision')}=refs/convert/parquet, or "
            f"its files, e.g. {use}=pairs.jsonl"
        )
    if match := re.search(r"Unknown split .*?\[(.*?)\]", reason):
        first = match[1].split(",")[0].strip(" '\"")
        return (
            f"{where} has no split {split!r}, but {match[1]}; name one that is meant for this, e.g. "
            f"{flag(place.split_field)}={first}"
        )
    if "onfig name is missing" in reason:
        names = re.findall(r"['\"]([\w.-]+)['\"]", reason) or ["NAME"]
        return f"{where} has several configurations ({reason}); name one, e.g. {use}={place.path}:{names[0]}"
    return (
        f"{where} is no file or folder here, and as a data set of the hub (split {split!r}) it could not be had: "
        f"{reason}; check the name and the network, or give a file, e.g. {use}=pairs.jsonl"
    )
