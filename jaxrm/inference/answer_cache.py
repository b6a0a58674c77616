"""Answers on disk by what decided them, so that a question which was answered is never sent, and paid for, again."""

import hashlib
import json
from pathlib import Path
from typing import Any

from jaxrm import atomic
from jaxrm.errors import UserError
from jaxrm.runtime.folders import why_unwritable


class AnswerCache:
    """One file an answer, which appears whole: a process may be killed at any time, and several may share the folder.

    Args:
      folder: made with the first answer.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder).expanduser()

    @staticmethod
    def key(body: bytes) -> str:
        """SHA-256 of all that decides an answer: the request without its headers, wherever it is sent."""
        return hashlib.sha256(body).hexdigest()

    def get(self, key: str) -> str | None:
        """The answer; None where there is none, or the file is damaged or may not be read."""
        try:
            answer = json.loads(self._file(key).read_text(encoding="utf-8"))["answer"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return answer if isinstance(answer, str) else None

    def put(self, key: str, answer: str, **others: Any) -> None:
        """Keep an answer, and beside it what helps whoever reads the file.

        Raises:
          OSError: it cannot be written.
        """
        text = json.dumps({**others, "answer": answer}, indent=2, ensure_ascii=False)
        with atomic.open_for_writing(self._file(key), "wb") as file:
            file.write(text.encode("utf-8", "backslashreplace"))  # half a surrogate pair, escaped as JSON does it

    def check(self, field: str) -> None:
        """Refuse a folder that answers cannot be written to.

        Raises:
          UserError: naming ``field``.
        """
        if (reason := why_unwritable(self._folder)) is not None:
            raise UserError(
                f"{field} is {str(self._folder)!r}, which cannot be written ({reason}); give a folder of your own, "
                "e.g. judge_answers"
            )

    def _file(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"  # 256 folders, since one of 10^6 files is slow to list
