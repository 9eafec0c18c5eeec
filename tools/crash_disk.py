"""A disk that fills up: at a point of the run as if, and on small file systems in earnest."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from crash_bench import CrashBench, Tally, spread
from fork_server import Ending
from tiny_run import MODES

FULL_EXIT = 5
BLOCK = 4096


def fill_disks(bench: CrashBench, points: int, sizes: int, seed: int) -> list[Tally]:
    """`points` runs to which the system says from some point on that there is no space, and `sizes` small disks."""
    rng = random.Random(f"{seed} disk")
    said, real = Tally("no space from a point on"), Tally("small disks")
    for index, mode in enumerate(MODES):
        share = points // len(MODES) + (index < points % len(MODES))
        for point in spread(share, bench.whole(mode).points, rng):
            folder = bench.new_folder()
            ending = bench.start(mode, folder, trap={"action": "full", "point": point})
            # what is only removed or flushed behind the point needs no space
            fault = _find_fault(folder, ending, may_fit=True) or bench.resume(mode, folder)
            said.note("stopped", ending.code == FULL_EXIT)
            said.count(fault)
            bench.drop(folder, fault)
    if not _can_mount(bench.work):
        real.what += " (skipped: mounting a tmpfs needs root)"
        return [said, real]
    needed = sum(-(-p.stat().st_size // BLOCK) * BLOCK for p in bench.whole("homo").root.rglob("*") if p.is_file())
    for index in range(sizes):
        mode = MODES[index % len(MODES)]
        size = max(BLOCK, int(needed * (index + 0.5) / (sizes + 1)) // BLOCK * BLOCK)
        fault = _fill_small_disk(bench, mode, size, real)
        real.count(fault)
    return [said, real]


def _fill_small_disk(bench: CrashBench, mode: str, size: int, tally: Tally) -> str | None:
    folder = bench.new_folder()
    folder.mkdir()
    with _mounted(folder, size):
        ending = bench.start(mode, folder)
        tally.note("stopped", ending.code == FULL_EXIT)
        fault = _find_fault(folder, ending, may_fit=True)
        committed = [entry for entry in folder.glob("run/*") if entry.name.isdigit()]
        if fault is None and committed:
            checked = bench.start(mode, folder, command="verify")
            tally.note("with rounds that verify", checked.code == 0)
            fault = None if checked.code == 0 else f"{folder}: {size} bytes: {checked.said[-300:]}"
        subprocess.run(["mount", "-o", f"remount,size={64 << 20}", str(folder)], check=True)
        fault = fault or bench.resume(mode, folder)
        if fault:
            shutil.copytree(folder, folder.with_name(f"{folder.name}-kept"))
    bench.drop(folder, fault)
    return fault


def _find_fault(folder: Path, ending: Ending, *, may_fit: bool) -> str | None:
    if ending.code == FULL_EXIT and "hint:" in ending.said and "MB" in ending.said:
        return None
    if ending.code == 0 and may_fit:
        return None
    return f"{folder}: a full disk ended with {ending.code}: {ending.said[-300:]}"


@contextlib.contextmanager
def _mounted(folder: Path, size: int) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _can_mount(work: Path) -> bool:
    folder = work / "mount-test"
    folder.mkdir(exist_ok=True)
    try:
        with _mounted(folder, 1 << 16):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
