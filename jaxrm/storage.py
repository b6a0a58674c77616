"""What a disk refused, in a few words, whichever library met it."""

import errno
import os
import re

_CODES = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENODEV,
    errno.ENXIO,
    errno.ETIMEDOUT,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENAMETOOLONG,
)
_IN_TEXT = re.compile(r"os_error_code='(\d+)'|\[Errno (\d+)\]")  # of tensorstore, and of an OSError as text


def failure_of(error: BaseException) -> str | None:
    """The file and the reason, where an exception or what it came from is that a disk refused; None for any other."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, OSError) and cause.errno in _CODES:
            where = "" if cause.filename is None else f"{_name(cause.filename)}: "
            return f"{where}{os.strerror(cause.errno or 0)}"
        if isinstance(cause, BaseExceptionGroup):
            inner = [failure_of(one) for one in cause.exceptions]
            if any(inner):
                return next(reason for reason in inner if reason)
        number = _IN_TEXT.search(str(cause))  # tensorstore, which writes the arrays, has no OSError
        code = int(number[1] or number[2]) if number is not None else None
        if code in _CODES:
            file = re.search(r'"(/[^"]+)"', str(cause))
            return f"{f'{file[1]}: ' if file else ''}{os.strerror(code or 0)}"
        cause = cause.__cause__
    return None


def _name(filename: object) -> str:
    return os.fsdecode(filename) if isinstance(filename, bytes | str | os.PathLike) else str(filename)
