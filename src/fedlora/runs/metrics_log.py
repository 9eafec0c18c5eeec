"""metrics.jsonl: one line per update as it is committed, then those of its clients and of the round.

A line of kind `update` holds the time that an update took, so that a resumed run knows it for updates from before the
interruption. Every line carries the beginning of a SHA-256 over its other fields, so that a damaged line is
measured again instead of believed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.files import append_line, json_line, sha256_of_json, write_text
from fedlora.types import ClientId


class MetricsLog:
    """The log of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seconds: dict[tuple[int, ClientId], float] = {}

    def append(self, row: Mapping[str, Any]) -> None:
        """One line more, flushed to disk."""
        append_line(self.path, {**row, "check": _check_of(row)})

    def note_update(self, round_number: int, client_id: ClientId, seconds: float) -> None:
        """Record how long an update took that is about to be committed; of several lines the last one counts."""
        self._seconds[round_number, client_id] = seconds
        self.append({"kind": "update", "round": round_number, "client_id": client_id, "seconds": seconds})

    def seconds(self, round_number: int, client_id: ClientId) -> float:
        """How long a committed update took, in this process or before an interruption; 0 if its line is lost."""
        return self._seconds.get((round_number, client_id), 0.0)

    def go_on(self, last_round: int) -> list[dict[str, Any]]:
        """The rows up to a committed round; what a kill cut off or left incomplete is removed from the file.

        The lines of a round count once its closing line is there; those of kind `update` stay.
        """
        rows = self.rows()
        closed = {row["round"] for row in rows if row["kind"] == "round" and row["round"] <= last_round}
        self._seconds = {
            (row["round"], row["client_id"]): float(row["seconds"]) for row in rows if row["kind"] == "update"
        }
        kept = [row for row in rows if row["kind"] == "update" or row["round"] in closed]
        if self.path.exists():
            write_text(self.path, "".join(json_line(row) for row in kept))
        return kept

    def find_damaged_line(self) -> int | None:
        """The number of the first damaged line, or None."""
        if not self.path.is_file():
            return None
        lines = self.path.read_bytes().split(b"\n")
        whole = len(self.rows())
        return None if whole == len(lines) - 1 and not lines[-1] else whole + 1

    def rows(self) -> list[dict[str, Any]]:
        """Rows up to the first line that is not whole: a kill may cut the last one."""
        rows: list[dict[str, Any]] = []
        if not self.path.is_file():
            return rows
        # what stands behind the last line break is a line that was cut
        for line in self.path.read_bytes().split(b"\n")[:-1]:
            try:
                row = json.loads(line)
                if json_line(row).encode() != line + b"\n" or row["check"] != _check_of(row):
                    break
                rows.append({**row, "kind": str(row["kind"]), "round": int(row["round"])})
            except (ValueError, KeyError, TypeError, RecursionError):
                break
        return rows


def _check_of(row: Mapping[str, Any]) -> str:
    return sha256_of_json({name: value for name, value in row.items() if name != "check"})[:12]
