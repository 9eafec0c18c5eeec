"""A snapshot as a picture in a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedlora.plain_text import number_text

if TYPE_CHECKING:
    from fedlora.watching.snapshot import Snapshot

BARS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 60


def draw(shot: Snapshot) -> Any:
    """Headline, bar, pace, losses, who is at work, the last rounds, who was left out."""
    from rich import box
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    pieces: list[Any] = [Text(shot.headline(), style="bold", overflow="fold")]
    if pace := shot.pace():
        facts = shot.progress
        pieces += [ProgressBar(total=facts["total"], completed=min(facts["done"], facts["total"]), width=CURVE_WIDTH)]
        pieces += [Text(pace, overflow="fold")]
    if shot.losses:
        low, high = (number_text(bound(shot.losses)) for bound in (min, max))
        pieces.append(Text(f"{curve(shot.losses)} loss of the last steps, {low} to {high}", overflow="fold"))
    pieces += [Text(f"  {text}", style="cyan", overflow="fold") for text in shot.workers()]
    if (rounds := shot.table()) is not None:
        table = Table(box=box.SIMPLE_HEAD)
        for index, head in enumerate(rounds.heads):
            table.add_column(head, justify="left" if index in rounds.left else "right")
        for row in rounds.rows:
            table.add_row(*map(Text, row))
        pieces.append(table)
    pieces += [Text(f"excluded: {text}", style="yellow", overflow="fold") for text in shot.exclusions()]
    return Group(*pieces)


def curve(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """Values as bars of eight heights, the mean of as many as share a place; the lowest stands on the ground."""
    count = min(width, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((mean - low) / step)] for mean in means)
