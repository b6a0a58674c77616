"""The ``data`` section of the config: where the records are, how they become tokens, and how tokens become batches."""

from dataclasses import dataclass

from jaxrm.config.fields import above, at_least, at_most, below, bounded, check, one_of

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
    """What to read, how to write it as tokens, and how many rows make a batch.

    Attributes:
      path: a file, a folder, a pattern of files, a data set of the hub, or an embedded task. Of a folder, the files
        named after ``split`` are read, or all where no name says a split. A data set is ``org/name``,
        ``org/name:configuration`` or ``org/name/folder``; a task is ``task:name``.
      split: the split of a data set, a word in the names of a folder's files or folders, or the field ``split`` of the
        records of one file.
      schema: one of ``SCHEMAS``; ``auto`` recognizes it from the fields of the first records.
      preferred: the label of PKU-SafeRLHF that decides the chosen response.
      eval_path: held-out records. With neither this nor ``eval_split``, a hash of the prompt holds out ``eval_share``.
      eval_split: the split of the held-out records.
      eval_share: the share of ``path`` that is held out.
      max_records: most records to read.
      max_eval_records: most held-out records to read.
      tokenizer: hub name, folder or .gguf file; None is the tokenizer beside the model's weights.
      template: ``auto`` is the tokenizer's own chat template, ``tokenizer:NAME`` one of its several; else a name of
        ``named_templates.TEMPLATES``.
      max_length: tokens in a row: template, prompt, response and EOS.
      packing: put several examples into one row.
      train_on: ``last`` takes the loss on the last response of a dialogue, ``all`` on every assistant turn.
      too_long: ``drop`` or ``error``, for a response that does not fit. Prompts are cut, responses never.
      batch_size: rows in one optimizer step, over all devices and processes.
      max_bad_share: the run stops when a larger share of the records is unusable.
      revision: branch, tag or commit of a data set of the hub.
      max_notes: most notes in a prompt of ``task:summarize``, which has so many or one less; None for 7. The more, the
        harder.

    Raises:
      UserError: a value is out of its bounds.
    """

    path: str = ""
    split: str = "train"
    schema: str = bounded("auto", one_of(*SCHEMAS))
    preferred: str = bounded("better_response_id", one_of("better_response_id", "safer_response_id"))
    eval_path: str | None = None
    eval_split: str | None = None
    eval_share: float = bounded(0.05, above(0), below(1))
    max_records: int | None = bounded(None, at_least(1))
    max_eval_records: int | None = bounded(512, at_least(1))
    tokenizer: str | None = None
    template: str = "auto"
    max_length: int = bounded(1024, at_least(2))
    packing: bool = True
    train_on: str = bounded("last", one_of("last", "all"))
    too_long: str = bounded("drop", one_of("drop", "error"))
    batch_size: int = bounded(8, at_least(1))
    max_bad_share: float = bounded(0.05, at_least(0), at_most(1))
    revision: str | None = None
    max_notes: int | None = bounded(None, at_least(6), at_most(10))

    def __post_init__(self) -> None:
        check(self)
