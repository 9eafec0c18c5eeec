"""What is kept of judging one baseline: verdicts, batches, the first reply that could not be used; for one process."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from fedlora.errors import LockedError, StorageError, UsageError
from fedlora.evaluation.judge.batch_state import BatchState
from fedlora.evaluation.judge.verdict_log import VerdictLog
from fedlora.files import make_folder
from fedlora.paths import OutputName, ResultPaths
from fedlora.plain_text import counted


@dataclass(frozen=True)
class Desk:
    """The files of one baseline."""

    log: VerdictLog
    batches: BatchState
    unusable_file: Path

    def forget(self, keys: Collection[str]) -> None:
        """Forget verdicts; UsageError while batches may bring new ones, which would be paid for twice."""
        if waiting := self.batches.batches:
            raise UsageError(
                f"{self.batches.path}: {counted(len(waiting), 'batch', 'batches')} not collected",
                hint="run without --overwrite to collect, or delete the file to give them up",
            )
        self.log.forget(keys)


@contextlib.contextmanager
def open_desk(target: ResultPaths, baseline: OutputName) -> Iterator[Desk]:
    """The desk of a baseline, which no other process has meanwhile. LockedError where one has it."""
    with _hold(target.judge_lock(baseline)):
        yield Desk(
            VerdictLog(target.verdicts(baseline)),
            BatchState(target.beside_verdicts(baseline, "batches.json")),
            target.beside_verdicts(baseline, "unusable_reply.txt"),
        )


@contextlib.contextmanager
def _hold(lock_file: Path) -> Iterator[None]:
    """Keep a second judge of the same baseline out: both would pay for the same verdicts, and one log lose lines."""
    make_folder(lock_file.parent)
    lock = FileLock(lock_file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise LockedError(
            f"{lock_file.parent}: another process judges this baseline",
            hint="wait until it has ended, or choose another --evaluation_dir",
        ) from None
    except OSError as error:
        raise StorageError(f"{lock_file}: {error.strerror}", hint="fix permissions, then run again") from error
    try:
        yield
    finally:
        lock.release()
