"""Send a run that lies on disk to experiment trackers: by the code that sends one while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.track import TrackConfig, tracking_folder
from fedlora.errors import FedloraError, StorageError, UsageError
from fedlora.paths import RunPaths
from fedlora.plain_text import counted
from fedlora.redaction import redact
from fedlora.results import Result
from fedlora.runs.run_folder import read_run
from fedlora.runs.tracked_ids import TrackedId, read_ids
from fedlora.stopping import stop_if_asked
from fedlora.tracking.sending import Sender


@dataclass(frozen=True, repr=False)
class TrackedRun(Result):
    """Where a run was sent to: its id in each tracker, how many rounds were new, the folder on this machine."""

    ids: Mapping[str, TrackedId]
    new_rounds: Mapping[str, int]
    track_dir: Path

    def text(self) -> str:
        """A line for each tracker."""
        return "\n".join(
            f"{name}: {counted(count, 'round')} sent, run {self.ids[name].id}, {tracking_folder(self.track_dir, name)}"
            for name, count in self.new_rounds.items()
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "trackers": [
                {
                    "tracker": name,
                    "id": self.ids[name].id,
                    "rounds_sent": count,
                    "folder": str(tracking_folder(self.track_dir, name)),
                }
                for name, count in self.new_rounds.items()
            ]
        }


def run(config: TrackConfig) -> TrackedRun:
    """Send what was not sent yet. Raises UsageError (no run, no tracker, no library), StorageError where a tracker
    fails."""
    if not config.to:
        raise UsageError("no tracker is named", hint="give --to tensorboard, wandb, mlflow or trackio")
    paths = RunPaths(config.model_dir, config.exp_name)
    is_done = read_run(paths).state == "finished"
    sent: dict[str, int] = {}
    for name in config.to:
        sender = Sender(name, paths, config.fields())
        try:
            sent[name] = sender.send()
            if is_done:
                sender.finish()
            sender.close()
        except FedloraError:
            raise
        except Exception as error:
            stop_if_asked()
            text = redact(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
            hint = "see what the tracker needs; rounds that were sent are not sent again"
            raise StorageError(f"{name} fails: {text}", hint=hint) from error
    return TrackedRun(read_ids(paths), sent, config.track_dir)
