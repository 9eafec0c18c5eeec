"""SIGKILL at points and at moments, once or several times in a row; then the run goes on to the same bytes."""

from __future__ import annotations

import random
import signal
from typing import Any

from crash_bench import CrashBench, Tally, shake_clock, spread
from tiny_run import MODES

WHERE = ("before", "torn", "after")


def kill_runs(bench: CrashBench, kills: int, seed: int) -> list[Tally]:
    """`kills` processes killed in all, spread over the modes; three of four at a point, the others at a moment."""
    tallies = []
    for index, mode in enumerate(MODES):
        rng = random.Random(f"{seed} {mode}")
        share = kills // len(MODES) + (index < kills % len(MODES))
        if share:
            tallies.append(_kill_runs_of(bench, mode, share, rng))
    return tallies


def _kill_runs_of(bench: CrashBench, mode: str, kills: int, rng: random.Random) -> Tally:
    tally = Tally(f"SIGKILL, {mode}")
    whole = bench.whole(mode)
    points = list(spread(kills, whole.points, rng))
    rng.shuffle(points)
    done = 0
    while done < kills:
        folder = bench.new_folder()
        wanted = 1 if rng.random() < 0.75 else rng.choice((2, 3))
        met = 0
        for _ in range(min(wanted, kills - done)):
            job = _job(points.pop() if points else rng.randrange(whole.points), whole.seconds, rng)
            ending = bench.start(mode, folder, **job)
            if ending.code not in (0, -signal.SIGKILL):
                tally.count(f"{folder}: {job} ended with {ending.code}: {ending.said[-300:]}")
            if ending.code == -signal.SIGKILL:
                met += 1
                tally.note("at a point" if "trap" in job else "at a moment")
        if met:
            done += met
            if folder.exists():
                shake_clock(folder, rng)
            fault = bench.resume(mode, folder)
            tally.count(fault)
            bench.drop(folder, fault)
    return tally


def _job(point: int, seconds: float, rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.75:
        return {"trap": {"action": "kill", "point": point, "where": rng.choice(WHERE)}}
    return {"signals": [[rng.uniform(0, seconds), int(signal.SIGKILL)]]}
