"""What every part shares: its arguments, taking turns, and the one line of JSON at its end."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any


def parse_arguments(description: str | None) -> argparse.Namespace:
    """--device, --data and --quick."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", help="file of Dolly rows; without it only short rows are timed")
    parser.add_argument("--quick", action="store_true", help="least sizes, to check the script; no figure to keep")
    return parser.parse_args()


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def take_turns(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each side returns (seconds), the sides in turn A B A B."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            times[name].append(run())
            say(f"  {name}: {times[name][-1]:.2f} s")
    return times


def side(times: list[float], **more: Any) -> dict[str, Any]:
    """A side's entry: the median, every single time, and what else is to be told."""
    return {"seconds": statistics.median(times), "times": [round(value, 4) for value in times], **more}


def emit(part: str, sides: Mapping[str, Any], ratios: Mapping[str, Any], notes: list[str], **more: Any) -> None:
    """The result, as the last line of stdout. `more` are further tables, such as a profile."""
    print(json.dumps({"part": part, "sides": sides, "ratios": ratios, "notes": notes, **more}), flush=True)
