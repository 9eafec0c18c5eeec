"""List the runs under model_dir: state, progress, best round, size."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedlora.config.runs import RunsConfig
from fedlora.console import say
from fedlora.plain_text import NOTHING, one_line, table_text
from fedlora.results import Result
from fedlora.runs.listing import RunLine, list_runs

COLUMNS = ("run", "mode", "base model", "state", "rounds", "best held-out loss", "last change", "size")


@dataclass(frozen=True, repr=False)
class RunList(Result):
    """The runs that lie under a folder."""

    lines: tuple[RunLine, ...]

    def parts(self) -> Sequence[str]:
        """The table; nothing without a run."""
        return [table_text(COLUMNS, list(map(_cells, self.lines)), left=range(len(COLUMNS)))] if self.lines else []

    def as_dict(self) -> dict[str, Any]:
        """`changed` is in seconds since 1970."""
        return {"runs": [asdict(line) for line in self.lines]}


def run(config: RunsConfig) -> RunList:
    """Look at every run; without one only a message says so."""
    lines = list_runs(config.model_dir)
    if not lines:
        say(f"no run under {config.model_dir}")
    return RunList(tuple(lines))


def _cells(line: RunLine) -> Sequence[str]:
    best = NOTHING if line.best_loss is None else f"{line.best_loss:.3f} (round {line.best_round})"
    changed = NOTHING if line.changed is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(line.changed))
    rounds = f"{line.rounds_done} of {line.rounds}" if line.rounds else str(line.rounds_done)
    size = NOTHING if line.num_bytes is None else f"{line.num_bytes / 1e6:,.1f} MB"
    cells = (line.name, line.mode, line.base_model, line.state, rounds, best, changed, size)
    return [one_line(cell) or NOTHING for cell in cells]
