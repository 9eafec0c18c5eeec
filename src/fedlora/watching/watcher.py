"""Looks at the files of a run again and again; nothing is written, and the process that trains is not asked."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from fedlora.errors import FedloraError
from fedlora.paths import RunPaths
from fedlora.runs.listing import state_of
from fedlora.runs.lock import find_holder
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.progress_file import read_progress
from fedlora.runs.run_folder import read_run
from fedlora.runs.run_records import RunRecord
from fedlora.runs.step_log import StepTail
from fedlora.watching.snapshot import Snapshot

STEPS_SHOWN = 600


class Watcher:
    """Watches one run, from another process or after its end."""

    def __init__(self, paths: RunPaths, *, is_drawn_only: bool = False) -> None:
        self.paths = paths
        self.is_drawn_only = is_drawn_only
        self._tail = StepTail(paths.beside("steps.jsonl"))
        self._losses: deque[float] = deque(maxlen=STEPS_SHOWN)
        self._last_loss: dict[int, float] = {}
        self._progress: Mapping[str, Any] = {}
        self._lines: tuple[Any, list[dict[str, Any]]] = (None, [])

    def look(self) -> Snapshot:
        """The run as it is now. Raises StorageError where the lock cannot be looked at."""
        paths = self.paths
        holder = find_holder(paths)
        record, problem = self._read_record()
        # an open round is neither half-measured nor lost: the holder was asked first
        lines = self._read_lines()
        for step in self._tail.look():
            if step["loss"] is not None:
                self._losses.append(step["loss"])
                self._last_loss[step["client_id"]] = step["loss"]
        common = {"name": paths.exp_name, "folder": str(paths.root), "taken": time.monotonic()}
        if record is None:
            state = problem or ("starting" if holder else "not begun")
            return Snapshot(**common, state=state, holder=str(holder or ""), is_drawn_only=self.is_drawn_only)
        if holder is not None:
            self._progress = read_progress(paths.beside(".progress.json")) or self._progress
        done = len(paths.committed_rounds())
        return Snapshot(
            **common,
            state="training" if holder else state_of(paths, record, done),
            holder=str(holder or ""),
            method=record.mode,
            base_model=record.base_model,
            rounds=record.num_rounds,
            lines=lines,
            files={facts.client_id: facts.file for facts in record.clients},
            progress=self._progress if holder else {},
            losses=tuple(self._losses),
            last_loss=dict(self._last_loss),
            is_drawn_only=self.is_drawn_only,
        )

    def _read_record(self) -> tuple[RunRecord | None, str]:
        if not self.paths.run_file.is_file():
            return None, ""
        try:
            return read_run(self.paths), ""
        except FedloraError:
            return None, "damaged: run.json"

    def _read_lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; read again only where the file has changed."""
        try:
            fact = self.paths.metrics_file.stat()
        except OSError:
            return []
        key = (fact.st_size, fact.st_mtime_ns)
        if self._lines[0] != key:
            rows = MetricsLog(self.paths.metrics_file).rows()
            self._lines = (key, [row for row in rows if row["kind"] != "update"])
        return self._lines[1]
