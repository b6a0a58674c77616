"""The two sides of the held-out split: where the records of each are, and that they are not the same ones."""

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from jaxrm.data import split_names
from jaxrm.data.config import DataConfig
from jaxrm.data.fields import BadRecordError, Fields, given
from jaxrm.data.files import RawRecord, file_rows
from jaxrm.data.hub import hub_rows, is_hub_name
from jaxrm.data.sources import DataFile, Place, find_files, is_one_file
from jaxrm.errors import UserError, flag, option

_FIELD = "split"  # of a row, which says its split
_SHOWN = 5  # values in a message


@dataclass(frozen=True)
class Side:
    """Where one side is.

    Attributes:
      place: path and split.
      files: to read in their order; None of a data set of the hub.
      hub_split: of a data set of the hub.
      revision: of a data set of the hub.
      is_by_field: a field of the rows says which are meant, since the path is one file.
    """

    place: Place
    files: Sequence[DataFile] | None
    hub_split: str
    revision: str | None
    is_by_field: bool

    def rows(self) -> Generator[RawRecord, None, None]:
        """All rows, with their places.

        Raises:
          UserError: they cannot be read, or the rows of one file do not say their split.
        """
        if self.files is None:
            yield from hub_rows(self.place, self.hub_split, self.revision)
            return
        for file in self.files:
            yield from file_rows(file, self.place)

    def reads_row(self, row: Fields) -> bool:
        """Whether a row is of the split.

        Raises:
          BadRecordError: it does not say so.
        """
        if not self.is_by_field:
            return True
        if not isinstance(row.get(_FIELD), str):
            raise BadRecordError(f"missing field {_FIELD!r}")
        return split_names.is_split(row[_FIELD], self.place.split or "")

    def by_field(self, first_rows: Sequence[RawRecord]) -> "Side":
        """This side where its one file turns out to be of the split itself: rows say nothing more then.

        Raises:
          UserError: neither the file nor its rows say a split.
        """
        fields = [row for _, row in first_rows if isinstance(row, dict)]
        if not self.is_by_field or any(isinstance(row.get(_FIELD), str) for row in fields) or not fields:
            return self
        if re.search(r"\[.*\]:\d+$", first_rows[0][0]):  # a list in the file has the name of the split
            return Side(self.place, self.files, self.hub_split, self.revision, False)
        name = self.place.split_field
        raise UserError(
            f"{option(name)} is {self.place.split!r}, but {option(self.place.field)} {self.place.path!r} is one file, "
            f"whose records have no field {_FIELD!r}; leave {flag(name)} out, or give the file of that split, e.g. "
            f"{flag(self.place.file_field)}={self.place.split}.jsonl"
        )


def find_side(config: DataConfig, *, held_out: bool) -> Side:
    """One side of the split.

    Raises:
      UserError: its path is nothing, or could mean two things; a revision goes with no data set of the hub.
    """
    place = Place(config.path, config.split)
    is_by_field = config.split != DataConfig.split or (config.eval_split is not None and config.eval_path is None)
    if held_out and config.eval_path is not None:
        place = Place(config.eval_path, config.eval_split, "data.eval_path", "data.eval_path", "data.eval_split")
        is_by_field = config.eval_split is not None
    elif held_out and config.eval_split is not None:
        place = Place(config.path, config.eval_split, "data.path", "data.eval_path", "data.eval_split")
    if not place.path:
        name = place.field
        raise UserError(f"{option(name)} is empty; name a file, a folder or a data set, e.g. {flag(name)}=task:safety")
    files = find_files(place)
    if files is None and not is_hub_name(place.path):
        raise UserError(
            f"{option(place.field)} is {place.path!r}, which is no file, folder or data set (org/name); check the "
            f"spelling, e.g. {flag(place.field)}=pairs.jsonl"
        )
    is_own = place.field == "data.path"
    if files is not None and is_own and config.revision is not None:
        raise UserError(
            f"{option('data.revision')} is {config.revision!r}, but {option('data.path')} {place.path!r} is no data "
            f"set of the hub; leave it out, e.g. {flag('data.revision')}=None"
        )
    hub_split = place.split or config.split
    return Side(place, files, hub_split, config.revision if is_own else None, is_by_field and is_one_file(place))


def check_sides_differ(train: Side, held_out: Side) -> None:
    """Refuse a split to hold out that is the one to train on, or has a file of it.

    A path to hold out that is the one to train on says so itself; the table at the start counts what is in both.

    Raises:
      UserError: naming it, and the field that would mend it.
    """
    if held_out.place.split is None:
        return
    same = _split_of(train) == _split_of(held_out)
    if train.files is not None and held_out.files is not None:
        common = {file.path.resolve() for file in train.files} & {file.path.resolve() for file in held_out.files}
        same = bool(common) and (same or not (train.is_by_field and held_out.is_by_field))
    elif train.files is not None or held_out.files is not None:
        same = False
    if same:
        fields = " and ".join(
            option(name)
            for name in dict.fromkeys((train.place.field, held_out.place.field, held_out.place.split_field))
        )
        raise UserError(
            f"{fields}: the same records of {train.place.path!r} would be trained on and held out; name another file "
            f"or split, or leave them out, so that {option('data.eval_share')} of the prompts is held out, e.g. "
            f"{flag('data.eval_path')}=None {flag('data.eval_split')}=None"
        )


def split_values(rows: Sequence[Fields]) -> list[str]:
    """The values of the field that says a split, if there are several."""
    values = sorted({row[_FIELD] for row in rows if given(row, _FIELD) and isinstance(row[_FIELD], str)})
    return values[:_SHOWN] if len(values) > 1 else []


def _split_of(side: Side) -> tuple[str, str | None]:
    split = side.hub_split if side.files is None else side.place.split
    return (side.place.path, split)
