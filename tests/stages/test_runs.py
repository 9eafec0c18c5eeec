import errno
import json
import os
import shutil
import subprocess
import sys
import time
import types

import pytest
from filelock import FileLock

from fedlora.config.runs import RunsConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import LockedError, StorageError
from fedlora.paths import RunPaths
from fedlora.runs import listing
from fedlora.runs.checking import seal
from fedlora.runs.lock import find_holder, hold_run
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.run_folder import read_run
from fedlora.runs.space import SpaceNeed, estimate_round_bytes
from fedlora.stages import runs, train


@pytest.fixture
def trained(tiny_model, make_clients, tmp_path, test_file):
    data = make_clients([3, 3])

    def run(name, **changes):
        options = {
            "exp_name": name,
            "base_model": str(tiny_model),
            "data_path": data,
            "val_data_path": str(test_file),
            "model_dir": tmp_path / "models",
            "client_selection_frac": 1.0,
            "num_communication_rounds": 1,
            "num_clients": 2,
            "local_batch_size": 2,
            "local_num_epochs": 1,
            "prompt_template": "chat",
            "device": "cpu",
            **changes,
        }
        return train.run(TrainConfig.of(**options)).root

    return run


def listed(folder) -> dict[str, str]:
    text = runs.run(RunsConfig.of(model_dir=folder)).text()
    return {line.split()[0]: line for line in text.splitlines()[2:]}


def test_every_run_is_listed_with_its_state(trained, tmp_path):
    done, open_, broken = trained("done"), trained("open"), trained("broken")
    record = json.loads((open_ / "run.json").read_text())
    (open_ / "run.json").write_text(json.dumps(seal({**record, "state": "training"})))
    (broken / "run.json").write_text("{}")
    (tmp_path / "models/not-a-run").mkdir()
    lines = listed(tmp_path / "models")
    assert sorted(lines) == ["broken", "done", "open"]
    assert "finished" in lines["done"]
    assert "1 of 1" in lines["done"]
    assert "(round 1)" in lines["done"]
    assert "interrupted" in lines["open"]
    assert "damaged: run.json" in lines["broken"]
    (done / "1/manifest.json").write_text("")
    assert "damaged: round 1" in listed(tmp_path / "models")["done"]


def test_one_odd_folder_does_not_hide_the_other_runs(trained, tmp_path):
    done, models = trained("done"), tmp_path / "models"
    record = json.loads((done / "run.json").read_text())
    foreign = {
        "my run": record,
        "other tool": {"name": "x"},
        "no-rounds": {**record, "config": {}},
        "what-if": {**record, "reaggregated_from": {}},
        "a-list": [1, 2],
        "text": "a",
    }
    for name, content in foreign.items():
        (models / name).mkdir()
        (models / name / "run.json").write_text(json.dumps(seal(content) if isinstance(content, dict) else content))
    (models / "binary").mkdir()
    (models / "binary/run.json").write_bytes(bytes(range(256)))
    (models / "a-folder/run.json").mkdir(parents=True)
    (models / "leads-out").symlink_to(tmp_path.parent)
    shutil.copytree(done, models / "metrics")
    MetricsLog(models / "metrics/metrics.jsonl").append({"kind": "round", "round": 1, "val_loss": None})
    shutil.copytree(done, models / "metrics-folder")
    (models / "metrics-folder/metrics.jsonl").unlink()
    (models / "metrics-folder/metrics.jsonl").mkdir()
    found = {line.name: line.state for line in runs.run(RunsConfig.of(model_dir=models)).lines}
    assert found.pop("done") == found.pop("metrics") == found.pop("metrics-folder") == "finished"
    assert found.keys() == {*foreign, "binary"}
    assert all(state.startswith(("unreadable: ", "damaged: ")) for state in found.values()), found
    assert "'my run' cannot be a folder name" in found["my run"]
    table = runs.run(RunsConfig.of(model_dir=models)).text()
    assert len(table.splitlines()) == 2 + 3 + len(found)


def test_a_folder_that_may_not_be_read_is_listed_with_the_reason(trained, tmp_path, monkeypatch):
    """As one of another user, which the file system refuses."""
    done, other = trained("done"), trained("other")

    def refuse(paths):
        if paths.exp_name == "other":
            raise PermissionError(errno.EACCES, "Permission denied", str(other / "run.json"))
        return read_run(paths)

    monkeypatch.setattr(listing, "read_run", refuse)
    lines = listed(done.parent)
    assert f"unreadable: {other}/run.json: Permission denied" in lines["other"]
    assert "finished" in lines["done"]


def test_a_run_that_is_trained_now_says_by_whom(trained, tmp_path):
    root = trained("busy")
    with hold_run(RunPaths(root.parent, "busy")):
        script = "import sys; from fedlora.cli import main; main(['runs', '--model_dir', sys.argv[1]])"
        shown = subprocess.run([sys.executable, "-c", script, str(root.parent)], capture_output=True, text=True)
        assert f"training: process {os.getpid()} on " in shown.stdout
    assert "finished" in listed(root.parent)["busy"]
    assert find_holder(RunPaths(root.parent, "busy")) is None


def test_no_run_is_a_note_and_no_table(tmp_path, capsys):
    assert runs.run(RunsConfig.of(model_dir=tmp_path / "nowhere")).text() == ""
    assert "no run under" in capsys.readouterr().err


def test_a_second_start_ends_before_torch_is_imported_and_names_the_first(trained, tmp_path):
    root = trained("busy")
    before = sorted(path.name for path in root.iterdir())
    with FileLock(root / ".lock"):
        (root / ".holder.json").write_text('{\n  "host": "far",\n  "pid": 4711\n}\n')
        script = (
            "import sys, time\n"
            "from fedlora.config.train import TrainConfig\n"
            "from fedlora.errors import LockedError\n"
            "from fedlora.stages import train\n"
            "try:\n"
            "    train.run(TrainConfig.of(exp_name='busy', model_dir=sys.argv[1], data_path=sys.argv[2], num_clients=2,"
            " overwrite=True))\n"
            "except LockedError as error:\n"
            "    print(error, 'torch' in sys.modules)\n"
        )
        words = [sys.executable, "-c", script, str(root.parent), str(tmp_path / "data")]
        shown = subprocess.run(words, capture_output=True, text=True)
    assert "process 4711 on far trains this run False" in shown.stdout, shown.stderr
    (root / ".holder.json").unlink()
    assert sorted(path.name for path in root.iterdir()) == before


def test_a_refused_start_leaves_no_folder_and_a_lock_is_waited_for_an_instant_only(tmp_path):
    paths = RunPaths(tmp_path, "x")
    with pytest.raises(ValueError, match="refused"), hold_run(paths):
        raise ValueError("refused")
    assert not paths.root.exists()
    paths.root.mkdir()
    with FileLock(paths.lock_file):
        began = time.monotonic()
        with pytest.raises(LockedError, match="another process trains this run"), hold_run(paths):
            pass
        assert time.monotonic() - began < 1


def test_a_round_that_cannot_fit_is_refused_with_what_is_missing(trained, monkeypatch, capsys):
    root = trained("grown")
    before = sorted(path.name for path in root.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"round 2 needs about 0\.\d+ MB, 0\.01 MB are free") as caught:
        trained("grown", num_communication_rounds=4)
    assert "give the same command again" in caught.value.hint
    assert sorted(path.name for path in root.iterdir()) == before


def test_the_estimate_of_a_round_is_a_little_above_what_it_takes(trained):
    root = trained("sized", optimizer_state="keep", lora_r=64)
    taken = sum(-(-path.stat().st_size // 4096) * 4096 for path in (root / "1").rglob("*") if path.is_file())
    from fedlora.llm.adapter_files import read_shapes

    shapes = read_shapes(root / "1/client_0/adapter_model.bin")
    estimate = estimate_round_bytes(shapes, updates=2, keeps_optimizer=True, has_global=True)
    assert taken <= estimate <= 1.25 * taken
    need = SpaceNeed(RunPaths(root.parent, "sized"), 3, estimate)
    assert need.rest(1) == 2 * estimate
