"""The errors that a user can cause or meet, each with its documented exit code.

A FedloraError is shown as one message and one hint, never as a traceback.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora.results import Result


class FedloraError(Exception):
    """What went wrong and where (`str(error)`), what to do (`error.hint`), and the result so far (`error.result`)."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", result: Result | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.result = result


class UsageError(FedloraError):
    """A wrong flag, method, configuration, path, model, adapter or record."""

    exit_code = 2


class DataError(FedloraError):
    """A row, a file of rows or a category cannot be used."""

    exit_code = 3


class TrainingError(FedloraError):
    """Too few usable updates in a round, a loss that is not a number, or a method that breaks a law."""

    exit_code = 4


class OutOfMemoryError(TrainingError):
    """Not even one row fits into the free memory."""


class StorageError(FedloraError):
    """No space, no permission, an input or output error, or a fault that `verify` found."""

    exit_code = 5


class LockedError(FedloraError):
    """Another process works on the same run."""

    exit_code = 6


class JudgeError(FedloraError):
    """The judge's endpoint refused the key, the model or the address, or too few samples got a verdict."""

    exit_code = 7


class BudgetError(FedloraError):
    """The limit on calls, cost or epsilon was reached before the work was done."""

    exit_code = 8


class PendingError(FedloraError):
    """Requests are in a batch that an endpoint works on: the same command collects the replies later."""

    exit_code = 9


def error_of(code: int, message: str, hint: str = "") -> FedloraError:
    """The error with which another process of fedlora ended, from its exit code."""
    kinds = [UsageError, DataError, TrainingError, StorageError, LockedError, JudgeError, BudgetError, PendingError]
    kind = next((kind for kind in kinds if kind.exit_code == code), FedloraError)
    return kind(message, hint=hint)


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EIO, errno.ENAMETOOLONG)


def refusal_of(error: Exception) -> FedloraError | None:
    """What memory, the file system or an encoding refused, as an error of ours; None for any other error."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        hint = "take fewer tokens or rows at once (tokens_per_pass, batch sizes, cutoff_len), or a smaller model"
        return StorageError("out of memory", hint=hint)
    if isinstance(error, UnicodeEncodeError):
        what = ascii(error.object[error.start : error.end])
        hint = "rename the file or folder, or set PYTHONUTF8=1 where the locale is not UTF-8"
        return UsageError(f"a name or text with {what} cannot be written as {error.encoding}", hint=hint)
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return StorageError(f"{error.filename or 'disk'}: no space left", hint="free space, then run again")
    if isinstance(error, OSError) and error.errno in _REFUSED:
        place = error.filename or "file system"
        return StorageError(f"{place}: {error.strerror}", hint="fix the path or its permissions, then run again")
    return None
