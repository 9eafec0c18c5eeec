"""MLflow: to the server that MLFLOW_TRACKING_URI names, or into a database on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]
from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]
from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

from fedlora.files import make_folder
from fedlora.plain_text import Table
from fedlora.tracking.markdown_table import markdown_of
from fedlora.tracking.tracker import Tracked, flat, set_default

LONGEST_VALUE = 500
BATCH = 1000
"""Metrics in a request, at most."""


class MlflowTracker:
    """A run of the experiment that the project names."""

    def open(self, run: Tracked, known: str) -> str:
        """The id that MLflow gives. A server that does not answer is given up after a few seconds."""
        set_default("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        set_default("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        place = os.environ.get("MLFLOW_TRACKING_URI", "")
        folder = run.folder.absolute()
        if not place:
            make_folder(folder)
        self._client = MlflowClient(place or f"sqlite:///{folder / 'mlflow.db'}")
        if known:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return known
        self._id = self._client.create_run(self._find_experiment(run, place), run_name=run.name).info.run_id
        parameters = [Param(_name(key), str(value)[:LONGEST_VALUE]) for key, value in flat(run.configuration).items()]
        for start in range(0, len(parameters), 100):
            self._client.log_batch(self._id, params=parameters[start : start + 100])
        return self._id

    def _find_experiment(self, run: Tracked, place: str) -> str:
        found = self._client.get_experiment_by_name(run.project)
        if found is not None:
            return found.experiment_id
        here = None if place else (run.folder.absolute() / "artifacts").as_uri()
        try:
            return self._client.create_experiment(run.project, artifact_location=here)
        except MlflowException:
            # another process was faster
            if (found := self._client.get_experiment_by_name(run.project)) is None:
                raise
            return found.experiment_id

    def log(self, round_number: int, values: Mapping[str, float]) -> None:
        """Metrics at the step of the round."""
        now = int(time.time() * 1000)
        metrics = [Metric(_name(name), value, now, round_number) for name, value in values.items()]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(self._id, metrics=metrics[start : start + BATCH])

    def finish(self, table: Table, files: Sequence[Path]) -> None:
        """rounds.md, and the report's files under report/."""
        self._client.log_text(self._id, markdown_of(table.heads, table.rows), "rounds.md")
        for file in files:
            self._client.log_artifact(self._id, str(file), "report")
        self._client.set_terminated(self._id)

    def close(self) -> None:
        """Everything was sent at once."""


def _name(text: str) -> str:
    """A name as MLflow takes it."""
    return "".join(char if char.isalnum() or char in "_-./ " else "_" for char in text)
