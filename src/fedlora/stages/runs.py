"""List the runs under model_dir: state, progress, best round, size."""

from __future__ import annotations

import time
from collections.abc import Sequence

from fedlora.config.runs import RunsConfig
from fedlora.console import printable, say
from fedlora.runs.listing import RunLine, list_runs

COLUMNS = ("run", "mode", "base model", "state", "rounds", "best held-out loss", "last change", "size")
NOTHING = "-"


def run(config: RunsConfig) -> None:
    """Print the table; without a run only a note to standard error."""
    lines = list_runs(config.model_dir)
    if not lines:
        say(f"no run under {config.model_dir}")
        return
    table = [COLUMNS, *(_cells(line) for line in lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for number, cells in enumerate(table):
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def _cells(line: RunLine) -> Sequence[str]:
    best = NOTHING if line.best_loss is None else f"{line.best_loss:.3f} (round {line.best_round})"
    changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(line.changed))
    rounds = f"{line.rounds_done} of {line.rounds}" if line.rounds else str(line.rounds_done)
    size = f"{line.num_bytes / 1e6:,.1f} MB"
    cells = (line.name, line.mode, line.base_model, line.state, rounds, best, changed, size)
    return [" ".join(printable(cell).split()) or NOTHING for cell in cells]
