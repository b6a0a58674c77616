"""Fields with text that no schema reads: they are named once, so that nobody thinks that they were used."""

from collections.abc import Iterable

from jaxrm.data.fields import Fields, texts
from jaxrm.data.prompt_columns import is_written, written_text
from jaxrm.data.records import Record

_MIN_WORDS = 4  # fewer are a name or a label
# Common fields that say something about a record rather than to the model, by the words of their names.
_QUIET = frozenset(
    {
        "id",
        "ids",
        "uid",
        "uuid",
        "key",
        "index",
        "hash",
        "source",
        "sources",
        "url",
        "link",
        "subset",
        "split",
        "dataset",
        "task",
        "type",
        "category",
        "categories",
        "topic",
        "domain",
        "style",
        "lang",
        "language",
        "label",
        "labels",
        "tag",
        "tags",
        "score",
        "scores",
        "rating",
        "ratings",
        "rank",
        "rankings",
        "margin",
        "agreement",
        "gap",
        "reward",
        "rewards",
        "metric",
        "metrics",
        "metadata",
        "meta",
        "info",
        "extra",
        "batch",
        "worker",
        "annotator",
        "annotations",
        "model",
        "models",
        "generator",
        "date",
        "time",
        "timestamp",
        "version",
        "license",
        "author",
        "title",
        "name",
        "reference",
        "references",
        "rationale",
        "explanation",
        "critique",
        "feedback",
        "comment",
        "comments",
        "note",
        "judgement",
        "judgment",
        "evaluation",
        "text",
        "formatted",
        "generations",
        "candidates",
        "completions",
        "responses",
        "messages",
        "chosen",
        "rejected",
        "response",
        "completion",
        "output",
        "summaries",
        "choice",
        "policy",
    }
)


def unread_fields(rows: Iterable[tuple[Fields, Record]]) -> list[str]:
    """Names of the fields that have sentences which are in no record, in the order in which they appear."""
    names: dict[str, None] = {}
    for fields, record in rows:
        written = None
        for name, value in fields.items():
            if name in names or _is_quiet(name):
                continue
            sentences = [text for text in texts(value) if len(text.split()) >= _MIN_WORDS]
            if sentences:
                written = written_text(record) if written is None else written
                if not all(is_written(text, written) for text in sentences):
                    names[name] = None
    return list(names)


def _is_quiet(name: str) -> bool:
    return name.lower() in _QUIET or any(word in _QUIET for word in name.lower().split("_"))
