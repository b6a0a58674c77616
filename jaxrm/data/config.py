"""The `data` section of the config: where the records are, how they become tokens, and how tokens become batches."""

from dataclasses import dataclass

from jaxrm.errors import UserError, flag, option

SCHEMAS = (
    "auto",
    "preference",
    "demonstration",
    "messages",
    "prompt",
    "hh",
    "pku_safe_rlhf",
    "tldr",
    "ultrafeedback",
)


@dataclass(frozen=True)
class DataConfig:
    """What to read, how to write it as tokens, and how many rows make a batch. Raises UserError on a bad value."""

    path: str = ""
    """`org/name`, `org/name:configuration` or `org/name/folder` on the hub; a .jsonl, .jsonl.gz, .json or .parquet
    file; a folder of those (files named after `split` only, where there are any); or `task:name`, embedded."""
    split: str = "train"
    schema: str = "auto"
    """One of `SCHEMAS`; `auto` recognises it from the fields of the first records."""
    preferred: str = "better_response_id"
    """Which label of PKU-SafeRLHF makes a response the chosen one: this, or `safer_response_id`."""
    eval_path: str | None = None
    """Held-out records. With neither this nor `eval_split`, `eval_share` of `path` is held out by a hash."""
    eval_split: str | None = None
    eval_share: float = 0.05
    max_records: int | None = None
    """Read no more than the first so many usable records."""
    max_eval_records: int | None = 512
    tokenizer: str | None = None
    """Hub name, folder or .gguf file; `None` is the tokenizer beside the model's weights."""
    template: str = "auto"
    """`auto` is the tokenizer's own chat template; else a name of `templates.TEMPLATES`."""
    max_length: int = 1024
    """Tokens in a row: template, prompt, response and EOS."""
    packing: bool = True
    train_on: str = "last"
    """`last`: the loss is on the last response of a dialogue; `all`: on every assistant turn."""
    too_long: str = "drop"
    """`drop` or `error`, for a response that does not fit. Prompts are cut on the left, responses never."""
    batch_size: int = 8
    """Rows in one optimizer step, over all devices and processes."""
    max_bad_share: float = 0.05
    """The run stops when more of the records than this are unusable."""

    def __post_init__(self) -> None:
        choices = {
            "schema": SCHEMAS,
            "preferred": ("better_response_id", "safer_response_id"),
            "train_on": ("last", "all"),
            "too_long": ("drop", "error"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise _wrong(field, getattr(self, field), "one of " + ", ".join(allowed), allowed[0])
        for field, least in (("max_length", 2), ("batch_size", 1), ("max_records", 1), ("max_eval_records", 1)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise _wrong(field, value, f"at least {least}", max(least, getattr(DataConfig, field) or least))
        if not 0 < self.eval_share < 1:
            raise _wrong("eval_share", self.eval_share, "between 0 and 1", 0.05)
        if not 0 <= self.max_bad_share <= 1:
            raise _wrong("max_bad_share", self.max_bad_share, "from 0 to 1", 0.05)


def _wrong(field: str, found: object, required: str, example: object) -> UserError:
    return UserError(
        f"{option(f'data.{field}')} is {found!r}, but must be {required}; e.g. {flag(f'data.{field}')}={example}"
    )
