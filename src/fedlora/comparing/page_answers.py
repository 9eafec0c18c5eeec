"""The answers of a comparison's runs, for its page: those of the first seed, in every setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.files import read_json
from fedlora.paths import ComparisonPaths, ResultPaths
from fedlora.reporting.page.looks import BASE, Looks
from fedlora.reporting.page.texts import Asked

Record = Mapping[str, Any]


def find_answers(paths: ComparisonPaths, cells: Sequence[Record], seed: int, looks: Looks) -> list[Asked]:
    """Who answered, the base first; nothing where no answers were asked for. Every seed has test rows of its own."""
    found: dict[tuple[str, str], Asked] = {}
    bases = [(BASE, BASE, record) for cell in cells for record in cell["base"]]
    runs = [
        (cell["method"], cell["method"] + (f", {cell['setting']}" if cell["setting"] else ""), record)
        for cell in cells
        for record in cell["runs"]
    ]
    for method, label, record in [*bases, *runs]:
        if record["seed"] == seed and "answers" in record:
            for name, asked in _asked(paths, record["run"], label, looks.class_of(method)):
                found.setdefault((record["run"], name), asked)
    return list(found.values())


def _asked(paths: ComparisonPaths, run: str, label: str, look: str) -> list[tuple[str, Asked]]:
    root = paths.answers_dir("predictions")
    rounds = ResultPaths(root, run, 0).rounds
    if not rounds:
        return []
    place, asked = ResultPaths(root, run, rounds[-1]), []
    for name in place.predicted():
        sidecar = place.predictions_meta(name)
        meta = read_json(sidecar) if sidecar.is_file() else {}
        shown = f"{label} client {name.client_id}" if name.kind == "client" else label
        asked.append((str(name), Asked(shown, look, place.predictions(name), meta, name.kind == "client")))
    return asked
