"""A figure that a notebook shows, and that can be saved: the report's drawing code made it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.api.entrance import PathLike, entered, make_config
from fedlora.config.evaluate import ReportConfig
from fedlora.errors import UsageError
from fedlora.files import write_bytes
from fedlora.home import path_at_home
from fedlora.reporting.experiments import find_round, load_experiment
from fedlora.reporting.findings import gather_findings
from fedlora.reporting.rounds_figure import draw_rounds


@dataclass(frozen=True)
class Picture:
    """A PNG; `png` holds its bytes."""

    name: str
    png: bytes = field(repr=False)

    def _repr_png_(self) -> bytes:
        return self.png

    def save(self, path: PathLike) -> Path:
        """Write the picture to a file, and return its path. Raises StorageError."""
        file = path_at_home(path)
        write_bytes(file, self.png)
        return file


def draw_run(keywords: dict[str, Any]) -> Picture:
    """The figure of rounds that a report on these runs has."""
    with entered("report", ReportConfig, keywords, progress=True):
        config = make_config(ReportConfig, None, keywords)
        loaded = [load_experiment(config, name, find_round(config)) for name in config.exp_names]
        experiments = [experiment for experiment in loaded if experiment is not None]
        if not experiments:
            raise UsageError(f"no run under {config.model_dir} is named {' or '.join(config.exp_names)}")
        return Picture("rounds", draw_rounds(gather_findings(config, experiments, [])))
