"""The errors a user can cause or meet, each with the exit code the documentation promises.

Whatever is raised as a FedloraError is shown as one message and one hint, never as a traceback.
"""

from __future__ import annotations

from fedlora.results import Result


class FedloraError(Exception):
    """What went wrong and where (`str(error)`), what to do about it (`error.hint`), and what was found up to then."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", result: Result | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.result = result


class UsageError(FedloraError):
    """A flag, a mode, a configuration, a model or an adapter that does not fit."""

    exit_code = 2


class DataError(FedloraError):
    """A row, a file or a category that cannot be used."""

    exit_code = 3


class TrainingError(FedloraError):
    """No usable update: a quorum that was not reached, a loss that is not a number."""

    exit_code = 4


class OutOfMemoryError(TrainingError):
    """Not even one row fits into the memory that is free; at another moment it may."""


class StorageError(FedloraError):
    """The file system refused: no space, no permission, an input or output error."""

    exit_code = 5


class LockedError(FedloraError):
    """Another process works on the same run."""

    exit_code = 6


class JudgeError(FedloraError):
    """The judge's endpoint refused for good (key, model, address)."""

    exit_code = 7


class BudgetError(FedloraError):
    """The user's limit, on calls or on privacy, was reached before the work was done."""

    exit_code = 8
