"""Configuration of experiment trackers: which, where, and what they may receive."""

from __future__ import annotations

from pathlib import Path

from pydantic import field_validator

from fedlora.config.schema import Config, Names, flag

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def _check_trackers(value: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := [name for name in value if name not in TRACKERS]:
        raise ValueError(f"{unknown[0]!r} is no tracker: choose among {', '.join(TRACKERS)}")
    return tuple(dict.fromkeys(value))


def tracking_folder(track_dir: Path, tracker: str) -> Path:
    """What a tracker writes on this machine, for all runs."""
    return track_dir / tracker


class TrackFields(Config):
    """Where a run is sent, and what of it."""

    track: Names = flag(
        (),
        f"experiment trackers that rounds and clients are sent to: {', '.join(TRACKERS)}",
        group="run",
        if_none="no tracker",
    )
    track_dir: Path = flag(
        Path("./tracking"), "folder for what trackers write on this machine, one for each", group="run"
    )
    track_project: str = flag("fedlora", "project or experiment of the run in a tracker", group="run", min_length=1)
    track_private: bool = flag(
        False,
        "of a run with differential privacy, send losses and clients to trackers too: they have no noise",
        group="run",
    )

    @field_validator("track")
    @classmethod
    def _known_trackers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _check_trackers(value)


class TrackConfig(Config):
    """Send a run to experiment trackers: the numbers of metrics.jsonl, the configuration, the table of rounds, the
    report.

    What was sent before, also while the run trained, is not sent again.
    """

    exp_name: str = flag("fedavg-1B", "name of the run: its folder under model_dir")
    to: Names = flag((), f"where it is sent to: {', '.join(TRACKERS)}", if_none="name at least one")
    model_dir: Path = flag(Path("./models"), "root folder of all runs")
    track_dir: Path = flag(Path("./tracking"), "folder for what trackers write on this machine, one for each")
    track_project: str = flag("fedlora", "project or experiment of the run in a tracker", min_length=1)
    track_private: bool = flag(
        False, "of a run with differential privacy, send losses and clients too: they have no noise"
    )

    @field_validator("to")
    @classmethod
    def _known_trackers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _check_trackers(value)

    def fields(self) -> TrackFields:
        """What `train` would be given."""
        names = ("track_dir", "track_project", "track_private")
        return TrackFields.of(track=self.to, **{name: getattr(self, name) for name in names})
