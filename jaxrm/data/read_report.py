"""What became of the records of a data set, as a table and as the error where too few are left."""

from dataclasses import dataclass, field

from jaxrm.errors import UserError, flag, option

_MOST = 0.99  # of the records, which a shorter length may hold

# What helps where all records have the same fault: it is the file's.
_OF_ALL = {
    "invalid JSON": "write one JSON object a line, or name a table .csv or .tsv",
    "not UTF-8": "write it as UTF-8, e.g. iconv -f latin1 -t utf-8 pairs.jsonl",
    "not an object with fields": 'write each as an object with fields, e.g. {"prompt": "…"}',
}


@dataclass
class Count:
    """How many records something holds of.

    Attributes:
      count: how many.
      first: place of the first.
      lengths: where they were too long, the ``data.max_length`` that would hold each, in tokens.
    """

    count: int
    first: str
    lengths: list[int] = field(default_factory=list)


@dataclass
class ReadReport:
    """What became of the records.

    Attributes:
      total: records that were read.
      used: records that remain.
      other_side: records of the other side of the held-out split.
      cut_prompts: used records whose prompt was cut.
      cut_heads: those of them that lost system text or the first turn's header too.
      bad: unusable records, by reason.
      notes: further things that were seen: how many, and the first of them.
    """

    total: int = 0
    used: int = 0
    other_side: int = 0
    cut_prompts: int = 0
    cut_heads: int = 0
    bad: dict[str, Count] = field(default_factory=dict)
    notes: dict[str, Count] = field(default_factory=dict)

    def add_note(self, what: str, source: str) -> None:
        """Count something that was seen in a record."""
        self.notes.setdefault(what, Count(0, source)).count += 1

    def add_bad(self, reason: str, source: str, count: int = 1, *, length: int | None = None) -> None:
        """Count a record as unusable, or several.

        Args:
          reason: why.
          source: place of the first.
          count: how many.
          length: of one that is too long: the ``data.max_length`` that would hold it.
        """
        entry = self.bad.setdefault(reason, Count(0, source))
        entry.count += count
        entry.lengths += [] if length is None else [length]

    def merge(self, later: "ReadReport") -> "ReadReport":
        """This report and that of the next step, which saw the records used here, as one."""
        merged = ReadReport(self.total, later.used, self.other_side, self.cut_prompts + later.cut_prompts)
        merged.cut_heads = self.cut_heads + later.cut_heads
        merged.notes = {**self.notes, **later.notes}
        for report in (self, later):
            for reason, entry in report.bad.items():
                merged.add_bad(reason, entry.first, entry.count)
                merged.bad[reason].lengths += entry.lengths
        return merged

    def check(self, max_bad_share: float, path: str) -> None:
        """Check that enough is usable.

        Raises:
          UserError: more than ``max_bad_share`` is unusable, or nothing is left. It names the most frequent reason, its
            first record and what helps.
        """
        bad = sum(entry.count for entry in self.bad.values())
        if not bad or (bad <= max_bad_share * self.total and self.used):
            return
        reason, entry = max(self.bad.items(), key=lambda item: item[1].count)
        often = f"most often: {reason} ({entry.count}, first at {entry.first})"
        advice = f"e.g. {self._enough(entry)}" if entry.lengths else "mend them"
        advice = _OF_ALL.get(reason, advice) if entry.count == self.total else advice
        start = f"{path}: {bad} of {self.total} records are unusable"
        if not self.used:
            raise UserError(f"{start} and none is left; {often}; {advice}")
        share = f"{flag('data.max_bad_share')}={min(1.0, bad / self.total + 0.01):.2f}"
        raise UserError(
            f"{start}, more than {option('data.max_bad_share')} {max_bad_share:g}; {often}; {advice}, or "
            + (f"{share} to go on without them" if entry.lengths else f"e.g. {share}")
        )

    def rows(self) -> list[tuple[str, int, str]]:
        """Rows of a table: name, count, place of the first."""
        counts = [("read", self.total, ""), ("used", self.used, "")]
        counts += [("on the other side of the split", self.other_side, "")] if self.other_side else []
        counts += [("prompts whose beginning was cut", self.cut_prompts, "")] if self.cut_prompts else []
        counts += [("of them without their system text or first header", self.cut_heads, "")] if self.cut_heads else []
        counts += [(self._name(reason, entry), entry.count, entry.first) for reason, entry in self.bad.items()]
        return counts + [(what, entry.count, entry.first) for what, entry in self.notes.items()]

    def _name(self, reason: str, entry: Count) -> str:
        if not entry.lengths:
            return reason
        share = entry.count / (self.used + sum(bad.count for bad in self.bad.values()))
        return f"{reason}: {100 * share:.1f} % of them; {self._enough(entry)}"

    def _enough(self, entry: Count) -> str:
        """The length to type that holds all of ``entry``, and a shorter one for most of the records."""
        lengths, num_spared = sorted(entry.lengths, reverse=True), int((1 - _MOST) * self.total)
        most = lengths[num_spared] if num_spared < len(lengths) else lengths[0]
        shorter = f" ({most} holds {_MOST:.0%})" if most < lengths[0] else ""
        return f"{flag('data.max_length')}={lengths[0]} holds all{shorter}"
