"""Warnings of a plan about the run itself: memory, disk, clients that never train, a probe that failed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from fedlora.config.train import TrainConfig
from fedlora.data.doctor import Finding
from fedlora.errors import FedloraError
from fedlora.llm.footprint import Footprint
from fedlora.llm.layout import Layout
from fedlora.plain_text import counted, size_text
from fedlora.planning.forecast import RunForecast
from fedlora.planning.probe import Probe
from fedlora.types import ClientId

MARGIN = 0.9
"""Part of the free memory or disk that a run may plan to take without a warning."""


def free_bytes(folder: Path) -> int:
    """Free space on the disk where a folder is, or will be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def examine_run(
    config: TrainConfig, names: Mapping[ClientId, str], forecast: RunForecast, footprint: Footprint, free: int
) -> Iterator[Finding]:
    """Whether the run fits the machine, and whether all clients with rows, each with its name, take part in it."""
    if forecast.disk_bytes > MARGIN * free:
        yield _finding(
            "disk",
            forecast.disk_bytes,
            f"the run's folder will take {size_text(forecast.disk_bytes)}, and {size_text(free)} are free at "
            f"{config.model_dir}",
            "free space, choose another --model_dir, or fewer rounds; every round keeps its adapters",
        )
    if footprint.total > MARGIN * footprint.available:
        yield _finding(
            "memory",
            footprint.total,
            f"training will hold about {size_text(footprint.total)}, and {size_text(footprint.available)} can be had",
            "use --gradient_checkpointing on, a smaller --tokens_per_pass or --cutoff_len, or --quantization nf4",
        )
    idle = [client for client in names if client not in forecast.rounds_of]
    if idle:
        shown = ", ".join(names[client] for client in idle[:10]) + (", ..." if len(idle) > 10 else "")
        yield _finding(
            "never_drawn",
            len(idle),
            f"{len(idle)} of {counted(len(names), 'client')} never train in the "
            f"{counted(config.num_communication_rounds, 'round')} "
            f"({shown})",
            "raise --client_selection_frac or --num_communication_rounds, or use --client_selection_strategy "
            "round_robin",
        )


def examine_cohorts(doubts: Iterable[tuple[str, str]]) -> Iterator[Finding]:
    """Warnings about the run's cohorts."""
    return (_finding("cohort", 1, *doubt) for doubt in doubts)


def examine_probe(probe: Probe | None, fault: FedloraError | None, layout: Layout) -> Iterator[Finding]:
    """Whether two steps could be trained as planned."""
    if fault is not None:
        yield _finding("probe", 1, f"the probe could not be trained: {fault}", fault.hint)
    if probe is not None and probe.tokens_per_pass < layout.tokens_per_pass:
        yield _finding(
            "memory",
            probe.tokens_per_pass,
            f"the probe ran out of memory with {layout.tokens_per_pass} tokens in a pass and went on with "
            f"{probe.tokens_per_pass}",
            f"give --tokens_per_pass {probe.tokens_per_pass}, or --gradient_checkpointing on",
        )


def _finding(kind: str, count: int, what: str, advice: str) -> Finding:
    return Finding(kind, None, count, what, (), advice)
