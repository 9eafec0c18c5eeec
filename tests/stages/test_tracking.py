"""Runs in experiment trackers, with a tracker that only remembers; each library is tried in tests/tracking."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from tiny_run import file_hashes, make_client_files

from fedlora.cli import main
from fedlora.config.track import TrackConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import StorageError, UsageError
from fedlora.paths import RunPaths
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.tracked_ids import read_ids
from fedlora.stages import track, train
from fedlora.tracking import sending


class Remembered:
    """A tracker whose runs are those of the test; `faults` are raised by the methods of these names."""

    def __init__(self, runs: dict[str, Any], faults: dict[str, Exception]) -> None:
        self.runs, self.faults = runs, faults

    def _meet(self, name: str) -> None:
        if name in self.faults:
            raise self.faults[name]

    def open(self, run, known):
        self._meet("open")
        self.id = known or f"run {len(self.runs)}"
        fresh = {"name": run.name, "configuration": run.configuration, "rounds": [], "files": {}, "opened": 0}
        self.runs.setdefault(self.id, fresh)["opened"] += 1
        return self.id

    def log(self, round_number, values):
        self._meet("log")
        self.runs[self.id]["rounds"].append((round_number, dict(values)))

    def finish(self, table, files):
        self._meet("finish")
        self.runs[self.id]["table"] = table
        self.runs[self.id]["files"] = {file.name: file.read_bytes() for file in files}

    def close(self):
        self._meet("close")


@pytest.fixture
def tracker(monkeypatch):
    runs: dict[str, Any] = {}
    faults: dict[str, Exception] = {}
    monkeypatch.setattr(sending, "make_tracker", lambda name: Remembered(runs, faults))
    return type("Tracker", (), {"runs": runs, "faults": faults})


@pytest.fixture
def no_report(monkeypatch):
    """The report takes longer than a run."""
    monkeypatch.setattr(sending, "_make_report", lambda paths, folder: [])


@pytest.fixture(scope="module")
def options(tiny_model, tmp_path_factory) -> dict[str, Any]:
    return {
        "exp_name": "run",
        "base_model": str(tiny_model),
        "data_path": make_client_files(tmp_path_factory.mktemp("tracked") / "data", [3, 4]),
        "client_selection_frac": 1.0,
        "num_communication_rounds": 2,
        "num_clients": 2,
        "local_batch_size": 4,
        "local_num_epochs": 1,
        "local_val_set_size": 1,
        "prompt_template": "chat",
        "device": "cpu",
    }


@pytest.fixture
def run(options, tmp_path):
    def start(**changes) -> RunPaths:
        return train.run(TrainConfig.of(**{**options, "model_dir": tmp_path / "models", **changes})).paths

    return start


def test_a_run_that_is_sent_while_it_trains_has_what_one_has_that_is_sent_afterwards(run, tracker):
    paths = run(track=("wandb",))
    live = tracker.runs["run 0"]
    assert [number for number, _ in live["rounds"]] == [0, 1, 2]
    rows = {(row["kind"], row["round"], row.get("client_id")): row for row in MetricsLog(paths.metrics_file).rows()}
    _, values = live["rounds"][2]
    assert values["round/loss"] == rows["round", 2, None]["loss"]
    assert values["round/val_loss"] == rows["round", 2, None]["val_loss"]
    assert values["clients/client 1/loss"] == rows["client", 2, 1]["loss"]
    assert live["configuration"]["lora_r"] == 4
    assert live["table"].rows[2][0] == "2"
    assert {"report.md", "report.html", "report.json"} <= set(live["files"])
    paths.beside("trackers.json").unlink()
    track.run(TrackConfig.of(exp_name="run", model_dir=paths.model_dir, to=("wandb",)))
    later = tracker.runs["run 1"]
    assert {**later, "files": None} == {**live, "files": None}
    assert later["files"]["report.json"] == live["files"]["report.json"]


@pytest.mark.usefixtures("no_report")
def test_a_resumed_run_continues_in_the_same_run_of_the_tracker(options, tmp_path, tracker):
    config = TrainConfig.of(**options, model_dir=tmp_path, track=("mlflow",))
    first = train.rounds(config)
    next(first)
    first.close()
    assert [number for number, _ in tracker.runs["run 0"]["rounds"]] == [0, 1]
    train.run(config)
    (only,) = tracker.runs.values()
    assert [number for number, _ in only["rounds"]] == [0, 1, 2]
    assert only["opened"] == 2
    known = read_ids(RunPaths(tmp_path, "run"))["mlflow"]
    assert (known.id, known.last_round, known.is_finished) == ("run 0", 2, True)


@pytest.mark.usefixtures("no_report", "tracker")
def test_tracking_changes_no_byte_of_a_round(run, tmp_path):
    tracked, plain = run(track=("trackio",)), run(model_dir=tmp_path / "plain")
    assert file_hashes(tracked.root) == file_hashes(plain.root)
    assert "track" not in json.loads(tracked.run_file.read_text())["config"]


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("place", ["open", "log", "finish", "close"])
def test_a_tracker_that_fails_is_named_once_and_ends_no_run(run, tracker, capsys, monkeypatch, place):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret-key")
    tracker.faults[place] = RuntimeError("no network for very-secret-key")
    assert run(track=("wandb",)).committed_rounds() == [1, 2]
    said = capsys.readouterr().err
    assert said.count("wandb fails") == 1
    assert "RuntimeError: no network" in said
    assert "very-secret-key" not in said


def test_a_library_that_is_missing_ends_no_run_and_is_an_error_of_track(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    paths = run(track=("wandb",))
    assert paths.committed_rounds() == [1, 2]
    assert "wandb cannot be imported" in capsys.readouterr().err
    with pytest.raises(UsageError, match="wandb cannot be imported"):
        track.run(TrackConfig.of(exp_name="run", model_dir=paths.model_dir, to=("wandb",)))


@pytest.mark.usefixtures("no_report")
def test_a_tracker_that_fails_is_an_error_of_track_and_what_was_sent_is_not_sent_again(run, tracker):
    paths = run()
    config = TrackConfig.of(exp_name="run", model_dir=paths.model_dir, to=("wandb",))
    tracker.faults["finish"] = OSError("full")
    with pytest.raises(StorageError, match="wandb fails: OSError: full"):
        track.run(config)
    tracker.faults.clear()
    assert track.run(config).new_rounds == {"wandb": 0}
    assert [number for number, _ in tracker.runs["run 0"]["rounds"]] == [0, 1, 2]
    assert track.run(config).text().startswith("wandb: 0 rounds sent, run run 0")


PRIVATE = {"dp_noise_multiplier": 1.0, "dp_clip": 1.0, "track": ("wandb",)}


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("held_out", [False, True])
def test_of_a_private_run_a_tracker_hears_what_the_guarantee_covers(
    run, tracker, monkeypatch, tmp_path, test_file, asked, held_out
):
    monkeypatch.setenv("FEDLORA_SECRETS", str(tmp_path / "secrets"))
    rows = {"val_data_path": str(test_file), "local_val_set_size": 0} if held_out else {}
    run(**PRIVATE, **rows, track_private=asked)
    (sent,) = tracker.runs.values()
    names = {name for _, values in sent["rounds"] for name in values}
    covered = {"privacy/epsilon", "round/seconds"} | ({"round/val_loss"} if held_out else set())
    if asked:
        assert covered < names
        assert any(name.startswith("clients/") for name in names)
    else:
        assert names == covered
        assert set(sent["table"].heads) == {"round", *(name.removeprefix("round/") for name in covered)}


def test_of_a_private_run_no_report_is_sent_unless_asked(run, tracker, monkeypatch, tmp_path):
    monkeypatch.setenv("FEDLORA_SECRETS", str(tmp_path / "secrets"))
    monkeypatch.setattr(sending, "_make_report", lambda paths, folder: [paths.run_file])
    paths = run(**PRIVATE)
    (sent,) = tracker.runs.values()
    assert not sent["files"]
    paths.beside("trackers.json").unlink()
    track.run(TrackConfig.of(exp_name="run", model_dir=paths.model_dir, to=("wandb",), track_private=True))
    assert tracker.runs["run 1"]["files"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"wandb": 3}', '{"wandb": {"id": 4}}', '{"wandb": {"di": "x"}}'])
def test_ids_that_are_damaged_are_none(tmp_path, content):
    paths = RunPaths(tmp_path, "run")
    paths.root.mkdir()
    paths.beside("trackers.json").write_text(content)
    assert read_ids(paths) == {}


def test_unknown_trackers_are_refused_with_the_known_ones(tmp_path, capsys):
    assert main(["track", "run", "--to", "excel", "--model_dir", str(tmp_path)]) == 2
    assert "choose among tensorboard, wandb, mlflow, trackio" in capsys.readouterr().err
    assert main(["track", "run", "--model_dir", str(tmp_path)]) == 2
    assert "no tracker is named" in capsys.readouterr().err


@pytest.mark.usefixtures("no_report", "tracker")
def test_what_was_sent_is_printed_as_json(run, monkeypatch, tmp_path, capsys):
    run()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["track", "run", "--to", "mlflow", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"trackers": [{"tracker": "mlflow", "id": "run 0", "rounds_sent": 3, "folder": "tracking/mlflow"}]}
