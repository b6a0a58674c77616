"""Which files hold records, by the ends of their names, in any case of letters."""

_PACKED = ("", ".gz", ".bz2", ".xz", ".zst")
# Beside lines and tables, a lone .csv or .json holds settings and numbers rather than records.
RANKS = (
    (".parquet", ".arrow", *(form + end for form in (".jsonl", ".ndjson") for end in _PACKED)),
    tuple(form + end for form in (".csv", ".tsv") for end in _PACKED),
    (*(f".json{end}" for end in _PACKED), ".zip"),
)
_SUFFIXES = tuple(sorted((suffix for rank in RANKS for suffix in rank), key=len, reverse=True))
_METADATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_METADATA |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"}


def is_data(name: str) -> bool:
    """Whether a file's name is that of records."""
    return name.lower().endswith(_SUFFIXES)


def is_metadata(name: str) -> bool:
    """Whether a file beside data says something about them, or is left over; nobody names it in a pattern."""
    return name in _METADATA or name.startswith((".", "cache-"))


def stem(name: str) -> str:
    """The name without its suffixes."""
    return next((name[: -len(suffix)] for suffix in _SUFFIXES if name.lower().endswith(suffix)), name)
