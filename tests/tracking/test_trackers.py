"""Each tracker's own library reads back what was written; a tracker that is not installed is skipped.

`make test-trackers` installs each into an environment of its own and runs these tests there.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny_run import make_client_files

from fedlora.config.track import TrackConfig
from fedlora.config.train import TrainConfig
from fedlora.paths import RunPaths
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.tracked_ids import read_ids
from fedlora.stages import track, train

# libraries of others have warnings of their own
pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("default")]

WANTED = {"round/loss", "round/val_loss", "round/num_tokens", "clients/client 0/loss", "clients/client 1/loss"}


@pytest.fixture(autouse=True)
def _only_here(monkeypatch, tmp_path):
    """No account, no server, no home folder of a user; and what a tracker sets for its library ends with the test."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")


def config_of(name: str, model: Path, folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.of(
        exp_name="run",
        base_model=str(model),
        data_path=make_client_files(folder / "data", [3, 4]),
        model_dir=folder / "models",
        client_selection_frac=1.0,
        num_clients=2,
        local_batch_size=4,
        local_num_epochs=1,
        local_val_set_size=1,
        prompt_template="chat",
        device="cpu",
        track=(name,),
        track_dir=folder / "tracking",
        **{"num_communication_rounds": 2, **changes},
    )


def train_in_two_calls(name: str, model: Path, folder: Path) -> tuple[RunPaths, str]:
    """A run of two rounds that was interrupted after the first, and its id in the tracker."""
    config = config_of(name, model, folder)
    first = train.rounds(config)
    next(first)
    first.close()
    paths = RunPaths(folder / "models", "run")
    before = read_ids(paths)[name]
    assert before.last_round == 1
    train.run(config)
    after = read_ids(paths)[name]
    assert (after.id, after.last_round, after.is_finished) == (before.id, 2, True)
    return paths, after.id


def losses_of(paths: RunPaths) -> dict[int, float]:
    rows = MetricsLog(paths.metrics_file).rows()
    return {row["round"]: row["loss"] for row in rows if row["kind"] == "round" and row["round"]}


def send_again(name: str, paths: RunPaths) -> str:
    """A second, new run in the tracker of the same run, sent afterwards; its id."""
    paths.beside("trackers.json").unlink()
    folder = paths.model_dir.parent / "tracking"
    track.run(TrackConfig.of(exp_name="run", model_dir=paths.model_dir, to=(name,), track_dir=folder))
    return read_ids(paths)[name].id


def test_tensorboard_reads_its_event_files(tiny_model, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # pyright: ignore

    paths, first = train_in_two_calls("tensorboard", tiny_model, tmp_path)
    found = []
    for run in (first, send_again("tensorboard", paths)):
        events = EventAccumulator(str(tmp_path / "tracking" / "tensorboard" / run))
        events.Reload()
        tags = events.Tags()
        assert set(tags["scalars"]) >= WANTED
        losses = {event.step: event.value for event in events.Scalars("round/loss")}
        assert losses == pytest.approx(losses_of(paths))
        assert {name.partition("/")[0] for name in tags["tensors"]} >= {"configuration", "rounds", "report"}
        assert any(name.startswith("report/") for name in tags["images"])
        found.append({name: [(one.step, one.value) for one in events.Scalars(name)] for name in tags["scalars"]})
    assert found[0] == found[1]
    assert first == "run"


def test_mlflow_reads_its_database(tiny_model, tmp_path):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient  # pyright: ignore

    paths, first = train_in_two_calls("mlflow", tiny_model, tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path / 'tracking' / 'mlflow' / 'mlflow.db'}")
    for run in (first, send_again("mlflow", paths)):
        told = client.get_run(run)
        assert told.info.status == "FINISHED"
        assert told.data.params["lora_r"] == "4"
        assert set(told.data.metrics) >= WANTED
        losses = {one.step: one.value for one in client.get_metric_history(run, "round/loss")}
        assert losses == pytest.approx(losses_of(paths))
        assert "rounds.md" in {one.path for one in client.list_artifacts(run)}
        assert {"report/report.md", "report/report.html"} <= {one.path for one in client.list_artifacts(run, "report")}


def records_of(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a log in LevelDB's form, behind a header of seven bytes."""
    content, place, parts = file.read_bytes(), 7, b""
    while len(content) - place > 7:
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        # whole, or the last part
        if kind in (1, 4):
            yield parts
            parts = b""


def read_wandb(file: Path) -> tuple[list[dict[str, Any]], set[str], set[str]]:
    """The history of an offline run, the types of its artefacts and the names of its settings; wandb's own program for
    reading is compiled and sends, so its messages are read here."""
    from wandb.proto import wandb_internal_pb2  # pyright: ignore

    history, artefacts, settings = [], set(), set()
    for content in records_of(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = record.history.item
            history.append({one.key or ".".join(one.nested_key): json.loads(one.value_json) for one in items})
        elif kind == "artifact":
            artefacts.add(record.artifact.type)
        elif kind == "run":
            settings |= {one.key for one in record.run.config.update}
        elif kind == "request" and record.request.HasField("log_artifact"):
            artefacts.add(record.request.log_artifact.artifact.type)
    return history, artefacts, settings


def test_wandb_reads_its_offline_folder(tiny_model, tmp_path):
    pytest.importorskip("wandb")
    paths, run = train_in_two_calls("wandb", tiny_model, tmp_path)
    files = sorted((tmp_path / "tracking" / "wandb").rglob(f"run-{run}.wandb"))
    assert len(files) == 2, "a call leaves a folder of the same run"
    told = [read_wandb(file) for file in files]
    rows = [row for history, _, _ in told for row in history if "round/val_loss" in row]
    assert {row["number"]: row["round/loss"] for row in rows if row["number"]} == pytest.approx(losses_of(paths))
    assert {name for row in rows for name in row} >= WANTED
    assert "lora_r" in told[0][2]
    assert "report" in told[1][1]
    assert send_again("wandb", paths) != run


def test_trackio_reads_its_database(tiny_model, tmp_path, capsys):
    # it decides where its database lies when it is imported
    if find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    paths, run = train_in_two_calls("trackio", tiny_model, tmp_path)
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore

    assert capsys.readouterr().out == ""
    rows = [row for row in SQLiteStorage.get_logs("fedlora", run) if "round/loss" in row]
    assert {row["step"]: row["round/loss"] for row in rows} == pytest.approx(losses_of(paths))
    assert {name for row in rows for name in row} >= WANTED
    assert list((tmp_path / "tracking" / "trackio").rglob("*.db"))


@pytest.mark.parametrize(("name", "variable"), [("mlflow", "MLFLOW_TRACKING_URI"), ("wandb", "WANDB_BASE_URL")])
def test_a_server_that_is_not_there_ends_no_run(tiny_model, tmp_path, monkeypatch, capsys, name, variable):
    pytest.importorskip(name)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    config = config_of(name, tiny_model, tmp_path, num_communication_rounds=1)
    assert train.run(config).paths.committed_rounds() == [1]
    said = capsys.readouterr().err
    assert said.count(f"{name} fails") == 1
    assert "0123456789" * 4 not in said
