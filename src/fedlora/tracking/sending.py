"""Sends what metrics.jsonl has of a run to a tracker: round by round while it trains, or all of it afterwards.

A round that was sent is noted in the run's folder after it was sent. So a process that is killed in between sends one
round twice, and none is left out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedlora.config.evaluate import ReportConfig
from fedlora.config.track import TrackFields, tracking_folder
from fedlora.console import collect_lines, say
from fedlora.paths import RunPaths
from fedlora.redaction import redact
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.run_folder import read_run
from fedlora.runs.run_records import RunRecord
from fedlora.runs.tracked_ids import TrackedId, read_ids, write_id
from fedlora.stopping import stop_if_asked
from fedlora.tracking.tracker import Tracked, Tracker, make_tracker
from fedlora.tracking.values import table_of, values_by_round


class Sender:
    """One run on its way to one tracker. Raises whatever the tracker's library raises."""

    def __init__(self, name: str, paths: RunPaths, config: TrackFields) -> None:
        self.name = name
        self.paths = paths
        self.config = config
        self._tracker: Tracker | None = None
        self._known = read_ids(paths).get(name, TrackedId(""))

    def send(self) -> int:
        """Send the rounds that are measured and were not sent; how many there were."""
        record = read_run(self.paths)
        tracker = self._open(record)
        new = {number: each for number, each in self._values(record).items() if number > self._known.last_round}
        for number, values in sorted(new.items()):
            tracker.log(number, values)
            self._note(replace(self._known, last_round=number))
        return len(new)

    def finish(self) -> None:
        """Send the table of all rounds and the report, once."""
        if self._known.is_finished:
            return
        record = read_run(self.paths)
        tracker = self._open(record)
        with tempfile.TemporaryDirectory() as folder:
            is_closed = record.privacy is not None and not self.config.track_private
            # the report has the numbers of single clients
            files = [] if is_closed else _make_report(self.paths, Path(folder))
            tracker.finish(table_of(self._values(record)), files)
        self._note(replace(self._known, is_finished=True))

    def close(self) -> None:
        """Leave the run as it is there."""
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None

    def _values(self, record: RunRecord) -> dict[int, dict[str, float]]:
        rows = MetricsLog(self.paths.metrics_file).rows()
        closed = {row["round"] for row in rows if row["kind"] == "round"}
        rows = [row for row in rows if row["round"] in closed]
        return values_by_round(record, rows, shares_private=self.config.track_private)

    def _open(self, record: RunRecord) -> Tracker:
        if self._tracker is None:
            tracker = make_tracker(self.name)
            folder = tracking_folder(self.config.track_dir, self.name)
            run = Tracked(self.paths.exp_name, self.config.track_project, _describe(record), folder)
            # closed also where it opens half
            self._tracker = tracker
            self._note(replace(self._known, id=tracker.open(run, self._known.id)))
        return self._tracker

    def _note(self, known: TrackedId) -> None:
        if known != self._known:
            write_id(self.paths, self.name, known)
            self._known = known


class LiveTracking:
    """The trackers of a run that trains: one that fails is named once, and the run continues without it."""

    def __init__(self, paths: RunPaths, config: TrackFields) -> None:
        self._senders = [Sender(name, paths, config) for name in config.track]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._each("close")

    def send(self) -> None:
        """Send what is new in metrics.jsonl."""
        self._each("send")

    def finish(self) -> None:
        """Send the table and the report of the finished run."""
        self._each("finish")

    def _each(self, what: str) -> None:
        for sender in list(self._senders):
            try:
                getattr(sender, what)()
            except Exception as error:  # whatever it is, it is the tracker's: the run continues
                stop_if_asked()
                self._senders.remove(sender)
                again = f"`fedlora track {sender.paths.exp_name} --to {sender.name}` sends the rest later"
                say(f"warning: {sender.name} fails and is left out from now on: {redact(_text_of(error))}; {again}")


def _text_of(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _describe(record: RunRecord) -> Mapping[str, Any]:
    """The configuration of a run with its method's settings, the libraries and the base; no path of a file."""
    settings = record.more.get("hyperparameters", {})
    versions = {f"version/{name}": version for name, version in record.versions.items()}
    facts = {"base_dtype": record.base_dtype, "clients": len(record.clients)}
    return {**settings, **record.config, **facts, **versions}


def _make_report(paths: RunPaths, folder: Path) -> list[Path]:
    from fedlora.stages.report import run

    rounds = max(paths.committed_rounds(), default=1)
    where = {"model_dir": paths.model_dir, "report_dir": folder, "report_name": paths.exp_name}
    with collect_lines():
        made = run(ReportConfig.of(exp_names=(paths.exp_name,), communication_rounds=rounds, **where))
    return sorted(file for file in made.file.parent.rglob("*") if file.is_file())
