"""trackio: a database on this machine, or the Space that its own variables name."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from fedlora.console import without_output
from fedlora.files import make_folder
from fedlora.plain_text import Table
from fedlora.tracking.tracker import Tracked, flat, set_default

if find_spec("trackio") is None:
    raise ImportError("No module named 'trackio'")


class TrackioTracker:
    """A run of the project; facts of the machine are not recorded."""

    def open(self, run: Tracked, known: str) -> str:
        """The run's name there, which is its id: ours with digits added."""
        set_default("TRACKIO_DIR", str(run.folder.absolute()))
        make_folder(run.folder)
        # it reads the variable when it is imported
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio = trackio
        name = known or f"{run.name}-{secrets.token_hex(4)}"
        with without_output():
            self._run = trackio.init(
                project=run.project,
                name=name,
                resume="allow",
                embed=False,
                config=flat(run.configuration),
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        return name

    def log(self, round_number: int, values: Mapping[str, float]) -> None:
        """Numbers at the step of the round."""
        self._run.log(dict(values), step=round_number)

    def finish(self, table: Table, files: Sequence[Path]) -> None:
        """A table, and the report as an artefact."""
        with without_output():
            rows = [list(row) for row in table.rows]
            self._run.log({"rounds": self._trackio.Table(columns=list(table.heads), data=rows)})
            if files:
                self._run.log_artifact(str(files[0].parent), name=f"{self._run.name}-report", type="report")
        # files of the report lie in a folder that is removed
        self.close()

    def close(self) -> None:
        """Wait until everything is written."""
        if hasattr(self, "_run"):
            with without_output():
                # the module's own, or it prints when the process ends
                self._trackio.finish()
            del self._run
