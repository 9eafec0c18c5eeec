"""Watch a run while another process trains it: one snapshot of its files after the other, until it ends."""

from __future__ import annotations

import time
from collections.abc import Generator

from fedlora.config.runs import WatchConfig
from fedlora.paths import RunPaths
from fedlora.watching.snapshot import Snapshot
from fedlora.watching.watcher import Watcher


def run(config: WatchConfig) -> Generator[Snapshot, None, None]:
    """The run now, and again every `interval` seconds while it trains or has not begun; once where it has ended."""
    watcher = Watcher(RunPaths(config.model_dir, config.exp_name))
    while True:
        shot = watcher.look()
        yield shot
        if config.once or not shot.is_open:
            return
        time.sleep(config.interval)
