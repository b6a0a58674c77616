"""How many texts a classifier did not read whole."""

from dataclasses import dataclass

import jax


@dataclass
class TextCounts:
    """How many of the texts that a classifier has scored were not read whole.

    Attributes:
      cut: those that were too long and lost a part.
      cut_share: of those that were scored last, together.
      changed: those of which the template dropped or changed something, in training alone.
      changed_share: of those that were scored last, together.
    """

    cut: int = 0
    cut_share: float = 0.0
    changed: int = 0
    changed_share: float = 0.0

    def add_cut(self, num_cut: int, total: int, name: str, max_length: int, side: str) -> None:
        """Count the texts that were cut, of ``total``, and warn of the first.

        Args:
          num_cut: how many.
          total: how many were scored.
          name: of the classifier, for people.
          max_length: most tokens of a text.
          side: that its tokenizer truncates, ``left`` or ``right``.
        """
        is_first = num_cut > 0 and not self.cut
        self.cut += num_cut
        self.cut_share = num_cut / max(total, 1)
        if is_first and jax.process_index() == 0:
            part = "the beginning" if side == "left" else "the end"
            print(
                f"warning: texts of more than {max_length} tokens lose {part} before {name} reads them, as "
                "its tokenizer truncates"
            )

    def add_changed(self, num_changed: int, total: int, name: str) -> None:
        """Count the texts that the template changed, of ``total``, and warn of the first."""
        is_first = num_changed > 0 and not self.changed
        self.changed += num_changed
        self.changed_share = num_changed / max(total, 1)
        if is_first and jax.process_index() == 0:
            print(
                f"warning: the chat template of {name} drops or changes some of a text, so that what it writes is "
                "scored; texts_changed is the share of such texts"
            )
