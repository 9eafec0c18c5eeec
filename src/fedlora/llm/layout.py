"""The layout of an optimizer step in memory: the token budget of a pass, and checkpointing.

The layout never changes what is computed, but in floating point it changes the last bits. So a layout that
was found by a probe, and every reduction after running out of memory, is part of the run's record. A client that is
trained again is trained in the layout of its first training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from fedlora.types import ClientId


@dataclass(frozen=True)
class Reduction:
    """From this step of this client's training on, and in all later rounds, a pass holds fewer tokens."""

    round: int
    client_id: int
    step: int
    tokens_per_pass: int


@dataclass(frozen=True)
class Layout:
    """Most padded tokens of a pass, whether layers are computed again backwards, and what was reduced since."""

    tokens_per_pass: int
    gradient_checkpointing: bool = False
    reductions: tuple[Reduction, ...] = ()

    def budget(self, round_number: int, client_id: int, step: int) -> int:
        """Tokens of a pass in one step (from 0). Other clients of the same round keep the larger budget, so that
        the order in which clients train does not matter."""
        holding = [
            reduction.tokens_per_pass
            for reduction in self.reductions
            if reduction.round < round_number
            or ((reduction.round, reduction.client_id) == (round_number, client_id) and reduction.step <= step)
        ]
        return min([self.tokens_per_pass, *holding])

    def record(self) -> dict[str, Any]:
        """The layout as run.json keeps it."""
        return {**asdict(self), "reductions": [asdict(reduction) for reduction in self.reductions]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Layout:
        """The layout of a recorded run."""
        reductions = tuple(Reduction(**reduction) for reduction in record["reductions"])
        return cls(record["tokens_per_pass"], record["gradient_checkpointing"], reductions)


class LayoutBook:
    """The layout in force; `on_change` is called with every reduction before the reduced step is done, and `files` has
    the name of every client's file, by which messages call the client."""

    def __init__(
        self,
        layout: Layout,
        on_change: Callable[[Layout], None] = lambda layout: None,
        files: Mapping[ClientId, str] = MappingProxyType({}),
    ) -> None:
        self.layout = layout
        self.on_change = on_change
        self.files = files

    def add(self, reduction: Reduction) -> None:
        """Keep one reduction; a repeated one changes nothing."""
        if reduction in self.layout.reductions:
            return
        self.layout = replace(self.layout, reductions=(*self.layout.reductions, reduction))
        self.on_change(self.layout)
