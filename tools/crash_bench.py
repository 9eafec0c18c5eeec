"""Unbroken runs, broken ones beside them, and the comparison of both."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fork_server import Ending, ForkServer
from tiny_run import facts_of, make_client_files, options_of

TEN_YEARS = 10 * 365 * 86400


@dataclass
class Tally:
    """One line of the summary."""

    what: str
    tries: int = 0
    good: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def count(self, fault: str | None) -> None:
        """One more try, good unless it has a fault."""
        self.tries += 1
        self.good += fault is None
        if fault is not None:
            self.faults.append(fault)

    def note(self, name: str, amount: int = 1) -> None:
        self.notes[name] = self.notes.get(name, 0) + amount


@dataclass(frozen=True)
class Whole:
    """A run that nothing disturbed."""

    root: Path
    facts: dict[str, Any]
    points: int
    seconds: float


class CrashBench:
    """Starts runs through the fork server; a folder of a try is kept when the try is not as it should be.

    `checked`: an unbroken run is trained twice and compared with itself before others are compared with it.
    """

    def __init__(self, server: ForkServer, model: Path, work: Path, *, checked: bool = True) -> None:
        self.server = server
        self.checked = checked
        self.model = model
        self.work = work
        self.data = make_client_files(work / "data", [5, 4, 3, 4])
        self._whole: dict[str, Whole] = {}
        self._tries = 0

    def argv(self, mode: str, folder: Path, command: str = "train") -> list[str]:
        """The command line of a run whose models go into `folder`."""
        if command == "verify":
            return ["verify", "run", "--model_dir", str(folder)]
        options = options_of(mode, self.model, self.data, folder)
        return [command, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]

    def start(self, mode: str, folder: Path, *, command: str = "train", **job: Any) -> Ending:
        """One start on a folder, with a cache of its own."""
        environment = {"FEDLORA_CACHE": str(folder.with_name(f"{folder.name}-cache"))}
        return self.server.run(self.argv(mode, folder, command), environment=environment, **job)

    def whole(self, mode: str) -> Whole:
        """The unbroken run of a mode."""
        if mode not in self._whole:
            made = []
            for name in ("whole", "again")[: 1 + self.checked]:
                folder = self.work / f"{mode}-{name}"
                ending = self.start(mode, folder)
                if ending.code != 0:
                    raise RuntimeError(f"the unbroken run of {mode} ended with {ending.code}: {ending.said}")
                made.append(Whole(folder / "run", facts_of(folder / "run"), ending.points, ending.seconds))
            if made[0].facts != made[-1].facts:
                raise RuntimeError(f"two unbroken runs of {mode} differ: {find_difference(*(w.facts for w in made))}")
            self._whole[mode] = made[0]
        return self._whole[mode]

    def new_folder(self) -> Path:
        self._tries += 1
        return self.work / f"try-{self._tries}"

    def copy_whole(self, mode: str) -> Path:
        """A folder of its own with an unbroken run in it."""
        folder = self.new_folder()
        shutil.copytree(self.whole(mode).root, folder / "run")
        return folder

    def resume(self, mode: str, folder: Path) -> str | None:
        """Go on undisturbed; None when the run ends as the unbroken one, else what differs."""
        ending = self.start(mode, folder)
        if ending.code != 0:
            return f"{folder}: going on ended with {ending.code}: {ending.said[-300:]}"
        difference = find_difference(self.whole(mode).facts, facts_of(folder / "run"))
        return f"{folder}: {difference}" if difference else None

    def drop(self, folder: Path, fault: str | None) -> None:
        """Delete what a good try left."""
        if fault is None:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(folder.with_name(f"{folder.name}-cache"), ignore_errors=True)


def find_difference(expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """The first thing in which two runs differ."""
    for part in ("files", "run"):
        for name in sorted(expected[part].keys() | found[part].keys()):
            if expected[part].get(name) != found[part].get(name):
                return f"{part}: {name} differs"
    return None if expected["metrics"] == found["metrics"] else "metrics.jsonl differs"


def shake_clock(folder: Path, rng: random.Random) -> None:
    """Give every file and folder a time of change within ten years of now."""
    for path in [folder, *sorted(folder.rglob("*"))]:
        moment = path.lstat().st_mtime + rng.uniform(-TEN_YEARS, TEN_YEARS)
        os.utime(path, (moment, moment), follow_symlinks=False)


def spread(count: int, points: int, rng: random.Random) -> Sequence[int]:
    """`count` points out of range(points): one from each of as many equal stretches."""
    return [min(points - 1, int((index + rng.random()) * points / count)) for index in range(count)]
