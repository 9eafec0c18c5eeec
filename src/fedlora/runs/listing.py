"""The runs under a model_dir at a glance, each from its record, its metrics and the folders of its rounds.

Nothing is hashed: `damaged` here means that a record cannot be read or a round is missing; `fedlora verify` looks at
every byte. The time of the last change is for people only, nothing is decided by it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedlora.errors import FedloraError
from fedlora.paths import RunPaths
from fedlora.runs.checking import read_manifest
from fedlora.runs.lock import find_holder
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.run_folder import read_run
from fedlora.runs.run_records import RunRecord


@dataclass(frozen=True)
class RunLine:
    """What there is to say of one run; what is not known is empty, zero or None."""

    name: str
    state: str
    mode: str
    base_model: str
    rounds_done: int
    rounds: int
    best_round: int | None
    best_loss: float | None
    changed: float | None
    """Seconds since 1970."""
    num_bytes: int | None


def list_runs(model_dir: Path) -> list[RunLine]:
    """Every folder with a run.json, by name; one that cannot be looked at is listed with the reason."""
    if not model_dir.is_dir():
        return []
    found = (_look(RunPaths(model_dir, entry.name), entry) for entry in sorted(model_dir.iterdir()))
    return [line for line in found if line is not None]


def _look(paths: RunPaths, entry: Path) -> RunLine | None:
    """The line of a folder, None of one that is no run's. Whatever lies in it, it must not hide the others."""
    try:
        return describe_run(paths) if (entry / "run.json").is_file() else None
    except FedloraError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error.filename or entry}: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"its files are not those of a run ({type(error).__name__}: {error})"
    return RunLine(entry.name, f"unreadable: {reason}", "", "", 0, 0, None, None, None, None)


def describe_run(paths: RunPaths) -> RunLine:
    """One run; a record that cannot be read makes it a damaged one, not an error."""
    record, problem = None, ""
    try:
        record = read_run(paths)
    except FedloraError:
        problem = "damaged: run.json"
    done = paths.committed_rounds()
    lost = [n for n in range(1, max(done, default=0) + 1) if read_manifest(paths.round_folder(n)) is None]
    if lost and not problem:
        problem = f"damaged: round {lost[0]}"
    best_round, best_loss = _find_best(paths)
    sizes = _sizes(paths.root)
    return RunLine(
        name=paths.exp_name,
        state=state_of(paths, record, len(done), problem),
        mode=record.mode if record else "",
        base_model=record.base_model if record else "",
        rounds_done=len(done),
        rounds=record.num_rounds if record else 0,
        best_round=best_round,
        best_loss=best_loss,
        changed=max(path.stat().st_mtime for path in (paths.run_file, paths.metrics_file) if path.exists()),
        num_bytes=sum(sizes.values()),
    )


def state_of(paths: RunPaths, record: RunRecord | None, done: int, problem: str = "") -> str:
    """Who trains a run at this moment, what is wrong with it, or whether it is `finished` or `interrupted`."""
    if (holder := find_holder(paths)) is not None:
        return f"training: {holder}"
    if problem or record is None:
        return problem
    if record.reaggregated_from is not None:
        return f"what-if of {record.reaggregated_from['exp_name']}"
    is_all = record.state == "finished" and done >= record.num_rounds
    return "finished" if is_all else "interrupted"


def _find_best(paths: RunPaths) -> tuple[int | None, float | None]:
    """The round with the lowest held-out loss; without held-out rows nothing says which is best."""
    measured = [
        (float(row["val_loss"]), row["round"])
        for row in MetricsLog(paths.metrics_file).rows()
        if row["kind"] == "round" and row["round"] > 0 and isinstance(row.get("val_loss"), float)
    ]
    if not measured:
        return None, None
    loss, number = min(measured)
    return number, loss


def _sizes(root: Path) -> dict[tuple[int, int], int]:
    """Device and inode -> bytes: an adapter that is carried forward as a hard link is there once."""
    return {(fact.st_dev, fact.st_ino): fact.st_size for fact in _walk(root)}


def _walk(folder: Path) -> Iterator[os.stat_result]:
    for place, _, names in os.walk(folder):
        for name in names:
            yield (Path(place) / name).lstat()
