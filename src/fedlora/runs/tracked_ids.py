"""trackers.json: the runs of experiment trackers that a run was sent to, and up to which round.

The file is no part of a round, and no hash covers it: without it a resumed run would begin new ones there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from fedlora.files import write_json
from fedlora.paths import RunPaths


@dataclass(frozen=True)
class TrackedId:
    """A run in a tracker: its id there, its last round that was sent (-1: none), and whether table and report were."""

    id: str
    last_round: int = -1
    is_finished: bool = False


def read_ids(paths: RunPaths) -> dict[str, TrackedId]:
    """Tracker -> the run there; empty where there is no such file, or it is damaged."""
    try:
        known = json.loads(paths.beside("trackers.json").read_text(encoding="utf-8"))
        ids = {str(name): TrackedId(**facts) for name, facts in known.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: one for name, one in ids.items() if isinstance(one.id, str) and type(one.last_round) is int}


def write_id(paths: RunPaths, tracker: str, tracked: TrackedId) -> None:
    """Replace what is known of one tracker. Raises StorageError."""
    known = read_ids(paths) | {tracker: tracked}
    write_json(paths.beside("trackers.json"), {name: asdict(one) for name, one in known.items()})
