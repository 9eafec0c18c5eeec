"""docs/benchmarks.md from the results: a table of sides and one of ratios for every part.

`REACH_FOR` holds the figures that the project set itself before anything was measured; each row names the ratio it
belongs to, and the table says whether the ratio got there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

TITLES = {
    "training": "Training: the usual way against fedlora",
    "outside": "Share of a round outside forward, backward and optimizer step",
    "generation": "Generation with nine adapters",
    "tasks": "Standard tasks: lm-eval's model class with PEFT against fedlora",
    "memory": "Peak memory",
    "aggregation": "Aggregation of 1,000 adapters",
    "meter": "Share of a round that the error meter takes",
    "limit": "How close training comes to the machine",
    "continuous_batching": "transformers' continuous batching against our batches",
    "dropout": "Dropout: what noise that belongs to the row costs",
    "reading": "Reading rows from files",
    "flower": "A round across machines: what Flower adds",
}
HEADS = {"cpu": "On a CPU", "cuda": "On a GPU"}


class Goal(NamedTuple):
    """What to reach for: at least (or at most) `value` for the ratios that `pattern` matches."""

    device: str
    part: str
    pattern: str
    at_least: bool
    value: float


REACH_FOR = [
    Goal("cpu", "training", r"dolly, .*fedlora auto against usual fp32", True, 6),
    Goal("cpu", "training", r"dolly, .*(fedlora fp32 against usual fp32|fedlora auto against usual bf16)", True, 2),
    Goal("cuda", "training", r"dolly, .*fedlora auto against usual autocast", True, 3),
    Goal("cpu", "outside", r"share outside", False, 0.05),
    Goal("cpu", "generation", r"seconds, usual over fedlora", True, 6),
    Goal("cpu", "memory", r"peak memory.*512.* over .*", False, 1.05),
    Goal("cpu", "aggregation", r"fedlora over reading once", False, 3),
    Goal("cpu", "dropout", r"noise of the row over torch's generator", False, 1.03),
    Goal("cpu", "meter", r"share of a round: .*", False, 0.01),
    Goal("cuda", "limit", r"dolly, .*of the matrix rate", True, 0.45),
]

INTRODUCTION = """# Benchmarks

Written by `make bench` and `make bench-gpu` (benchmarks/bench.py); not edited by hand. Each part runs in its own
process. The sides of a comparison take turns on the same rows and the same model. Figures are medians, with every
single time beside them. The top of each file in `benchmarks/` says what it measures, and how.
The column "to reach" holds the target that was set before anything was measured; the table says where it was missed.
"""


def render(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page: device -> part -> what the part printed (with `machine` and `minutes` from the runner)."""
    blocks = [INTRODUCTION]
    for device, parts in results.items():
        blocks.append(f"## {HEADS[device]}\n")
        blocks += [_section(device, part, parts[part]) for part in TITLES if part in parts]
    return "\n".join(blocks).rstrip() + "\n"


def _section(device: str, part: str, result: Mapping[str, Any]) -> str:
    lines = [f"### {TITLES[part]}", ""]
    lines += [_machine(result["machine"]) + f" The part took {result['minutes']:.1f} minutes.", ""]
    lines += _sides(result["sides"])
    lines += _ratios(device, part, result["ratios"])
    if "profile" in result:
        lines += _profile(result["profile"])
    lines += [f"- {note}" for note in result["notes"]]
    return "\n".join(lines) + "\n"


def _machine(facts: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    gpu = f"{facts['gpu']}; " if facts["gpu"] else ""
    dirty = " with uncommitted changes" if facts["dirty"] else ""
    where = f"{gpu}{facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB"
    return f"{facts['date']}; {where}; {versions}; commit {facts['commit']}{dirty}."


def _sides(sides: Mapping[str, Any]) -> list[str]:
    entries = {name: value if isinstance(value, Mapping) else {"value": value} for name, value in sides.items()}
    columns = list(dict.fromkeys(key for entry in entries.values() for key in entry))
    # single times last: they are the longest
    columns.sort(key=lambda column: column == "times")
    heads = [column.replace("_per_second", "/s").replace("_", " ") for column in columns]
    rows = [[name, *(_cell(entry.get(column)) for column in columns)] for name, entry in entries.items()]
    return _table(["side", *heads], rows)


def _ratios(device: str, part: str, ratios: Mapping[str, Any]) -> list[str]:
    if not ratios:
        return []
    rows = []
    for name, value in ratios.items():
        goal = next((goal for goal in REACH_FOR if _is_about(goal, device, part, name)), None)
        rows.append([name, _cell(value), *(_verdict(goal, value) if goal else ("", ""))])
    return _table(["ratio", "measured", "to reach", "reached"], rows)


def _is_about(goal: Goal, device: str, part: str, name: str) -> bool:
    return (goal.device, goal.part) == (device, part) and re.fullmatch(goal.pattern, name) is not None


def _verdict(goal: Goal, value: float) -> tuple[str, str]:
    reached = value >= goal.value if goal.at_least else value <= goal.value
    return f"at {'least' if goal.at_least else 'most'} {goal.value:g}", "yes" if reached else "**no**"


def _profile(profile: Mapping[str, Any]) -> list[str]:
    """Where the time goes: kind -> share, or side -> kind -> share."""
    named = profile if all(isinstance(value, Mapping) for value in profile.values()) else {"": profile}
    kinds = list(dict.fromkeys(kind for shares in named.values() for kind in shares))
    rows = [[kind, *(f"{shares.get(kind, 0):.1%}" for shares in named.values())] for kind in kinds]
    return _table(["where the time goes", *(name or "share" for name in named)], rows)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [*(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines), ""]
