"""Watching a run from its files: before, while and after it trains, in a terminal and elsewhere."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_run import make_client_files

from fedlora.cli import main
from fedlora.config.runs import WatchConfig
from fedlora.config.train import TrainConfig
from fedlora.paths import RunPaths
from fedlora.runs import step_log
from fedlora.runs.lock import hold_run
from fedlora.runs.progress_file import ProgressFile
from fedlora.runs.step_log import read_steps
from fedlora.stages import train, watch
from fedlora.training import run_progress
from fedlora.training.run_progress import RunProgress
from fedlora.watching.drawing import curve
from fedlora.watching.snapshot import Snapshot
from fedlora.watching.watcher import Watcher


@pytest.fixture(scope="module")
def options(tiny_model, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("watched")
    return {
        "base_model": str(tiny_model),
        "data_path": make_client_files(folder / "data", [5, 4]),
        "model_dir": folder / "models",
        "client_selection_frac": 1.0,
        "num_communication_rounds": 2,
        "num_clients": 2,
        "local_batch_size": 2,
        "local_num_epochs": 1,
        "prompt_template": "chat",
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def done(options) -> RunPaths:
    return train.run(TrainConfig.of(**options, exp_name="done")).paths


def test_every_step_of_every_client_is_in_the_file_with_its_loss(done):
    rows = read_steps(done.beside("steps.jsonl"))
    assert [(row["round"], row["client_id"], row["step"], row["steps"]) for row in rows] == [
        (number, client, step, count)
        for number in (1, 2)
        for client, count in ((0, 3), (1, 2))
        for step in range(1, count + 1)
    ]
    lines = [json.loads(line) for line in done.metrics_file.read_text().splitlines()]
    for line in (line for line in lines if line["kind"] == "client"):
        own = [row for row in rows if (row["round"], row["client_id"]) == (line["round"], line["client_id"])]
        assert sum(row["num_tokens"] for row in own) == line["num_tokens"]
        assert min(row["loss"] for row in own) <= line["loss"] <= max(row["loss"] for row in own)
        assert sum(row["seconds"] for row in own) == pytest.approx(line["seconds"], abs=0.05)
    assert all(row["learning_rate"] == 3e-4 for row in rows)
    assert not done.beside(".progress.json").exists()


PRIVATE = {"dp_noise_multiplier": 1.0, "dp_clip": 1.0}


@pytest.mark.parametrize(
    ("changes", "is_written"), [(PRIVATE, False), ({**PRIVATE, "step_log": "on"}, True), ({"step_log": "off"}, False)]
)
def test_private_runs_keep_the_losses_of_steps_to_themselves_unless_asked(
    options, tmp_path, monkeypatch, changes, is_written
):
    monkeypatch.setenv("FEDLORA_SECRETS", str(tmp_path))
    config = TrainConfig.of(**{**options, "model_dir": tmp_path, "num_communication_rounds": 1, **changes})
    assert train.run(config).paths.beside("steps.jsonl").exists() == is_written


def test_the_files_of_rounds_do_not_depend_on_the_log_of_steps(options, done, tmp_path):
    other = train.run(TrainConfig.of(**{**options, "model_dir": tmp_path, "exp_name": "done", "step_log": "off"})).root
    for number in ("1", "2"):
        assert (other / number / "manifest.json").read_bytes() == (done.root / number / "manifest.json").read_bytes()
    assert json.loads((other / "run.json").read_text())["config"] == json.loads(done.run_file.read_text())["config"]


def test_a_finished_run_is_shown_once(done, capsys):
    assert main(["watch", "done", "--model_dir", str(done.model_dir)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("done: homo on ")
    assert "finished, 2 of 2 rounds" in shown
    assert main(["watch", "done", "--model_dir", str(done.model_dir), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told["state"] == "finished"
    assert [each["round"] for each in told["rounds_done"]] == [1, 2]
    assert len(told["last_losses"]) == 10
    assert (told["examples"], told["at_work"], told["seconds_left"]) == (None, [], None)


def test_a_run_that_has_not_begun_is_waited_for_until_it_has_ended(options, tmp_path):
    shots = watch.run(WatchConfig.of(exp_name="later", model_dir=tmp_path, interval=0.1))
    assert next(shots).state == next(shots).state == "not begun"
    with hold_run(RunPaths(tmp_path, "later")):
        assert next(shots).state == "starting"
    for _ in train.rounds(TrainConfig.of(**{**options, "model_dir": tmp_path, "exp_name": "later"})):
        assert next(shots).state == "training"
    assert [shot.state for shot in shots] == ["finished"]
    assert not list(watch.run(WatchConfig.of(exp_name="never", model_dir=tmp_path, once=True)))[1:]


@pytest.fixture
def at_work(options, done, tmp_path, monkeypatch) -> Callable[[], Snapshot]:
    """Looks at a run in the middle of its second round."""
    monkeypatch.setattr(run_progress, "EVERY_SECONDS", 0.0)
    config = TrainConfig.of(**{**options, "model_dir": tmp_path, "exp_name": "now"})
    watcher, shots, step = Watcher(RunPaths(tmp_path, "now")), [], RunProgress.step

    def look(progress, one):
        step(progress, one)
        if (one.round, one.client_id, one.step) == (2, 0, 2):
            shots.append(watcher.look())

    monkeypatch.setattr(RunProgress, "step", look)
    monkeypatch.setattr(step_log, "EVERY_SECONDS", 0.0)
    train.run(config)
    return shots[0]


def test_who_trains_is_seen_with_step_loss_speed_time_and_memory(at_work):
    assert (at_work.state, len(at_work.done)) == ("training", 1)
    (work,) = at_work.at_work
    assert (work["client"], work["round"], work["step"], work["steps"]) == ("client 0", 2, 2, 3)
    assert work["loss"] == at_work.losses[-1]
    told = at_work.as_dict()
    assert told["examples"] == {"done": 9 + 4, "total": 18}
    assert told["tokens_per_second"] > 0
    assert told["seconds_left"] > 0
    assert told["memory"]["process"] > 1e6
    assert "13 of 18 examples" in at_work.text()
    drawn = Console(file=io.StringIO(), width=100)
    drawn.print(at_work.picture())
    for text in (
        "training by process",
        "13 of 18 examples",
        "loss of the last steps",
        "client 0: round 2, step 2 of 3",
    ):
        assert text in drawn.file.getvalue(), text


def test_lines_say_what_is_new_and_the_progress_from_time_to_time(at_work):
    earlier = Snapshot(at_work.name, at_work.folder, "training", at_work.taken - 5, at_work.holder, rounds=2)
    (line,) = at_work.news(earlier)
    assert line.startswith("round 1 of 2: training loss")
    assert at_work.news(at_work) == []
    quiet = Snapshot(**{**vars(at_work), "taken": at_work.taken + 11})
    (line,) = quiet.news(at_work)
    assert "13 of 18 examples" in line
    assert "client 0: round 2, step 2 of 3" in line
    ended = Snapshot(**{**vars(at_work), "state": "interrupted", "holder": ""})
    assert ended.news(at_work) == [ended.headline()]


def test_a_killed_run_is_interrupted_whatever_it_has_left(done, tmp_path):
    record = done.run_file.read_text()
    paths = RunPaths(tmp_path, "killed")
    paths.root.mkdir()
    paths.run_file.write_text(record)
    paths.lock_file.touch()
    ProgressFile(paths.beside(".progress.json")).write({"done": 3, "total": 9, "at_work": []})
    paths.beside("steps.jsonl").write_text('{"torn')
    (shot,) = watch.run(WatchConfig.of(exp_name="killed", model_dir=tmp_path))
    assert (shot.state, shot.pace(), shot.losses) == ("interrupted", "", ())
    paths.run_file.write_text(record[:100])
    (shot,) = watch.run(WatchConfig.of(exp_name="killed", model_dir=tmp_path))
    assert shot.state == "damaged: run.json"


def test_names_and_reasons_cannot_drive_a_terminal():
    files = {0: "evil\x1b]0;title\x07.json"}
    line = {"kind": "round", "round": 1, "loss": 1.0, "seconds": 1.0, "cohort": [], "num_tokens": 1}
    line["quarantined"] = [{"client_id": 0, "kind": "data", "reason": "row \x1b[2J is bad"}]
    work = {"at_work": [{"client_id": 0, "round": 1, "step": 1, "steps": 2}], "done": 1, "total": 2}
    shot = Snapshot("x", "x", "training", 0.0, lines=[line], files=files, progress=work, rounds=1)
    drawn = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    drawn.print(shot.picture())
    assert "\x1b]" not in drawn.file.getvalue() + shot.text()
    assert "\x1b[2J" not in drawn.file.getvalue() + shot.text()
    assert "\\x1b[2J" in shot.text()


def test_a_curve_has_a_bar_for_each_value_and_means_of_many():
    assert curve([3.0, 2.0, 1.0]) == "█▅▁"
    assert curve([1.0] * 5) == "▁" * 5
    assert len(curve(list(range(1000)))) == 60


@pytest.mark.thorough
def test_a_terminal_is_redrawn_and_an_interrupt_ends_it_without_a_word(tmp_path):
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "fedlora", "watch", "none", "--model_dir", str(tmp_path)]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm"}) as one:
        os.close(slave)
        seen, end = b"", time.monotonic() + 60
        while b"not begun" not in seen and time.monotonic() < end:
            seen += os.read(master, 4096)
        one.send_signal(signal.SIGINT)
        assert one.wait(20) == 130
    try:
        while more := os.read(master, 4096):
            seen += more
    except OSError:
        pass
    assert b"none: not begun" in seen
    assert b"Traceback" not in seen
    assert b"interrupted" not in seen


def test_the_folder_may_be_anywhere(done, monkeypatch, capsys):
    monkeypatch.chdir(Path(done.model_dir).parent)
    assert main(["watch", "done"]) == 0
    assert "finished" in capsys.readouterr().out


@pytest.mark.thorough
def test_steps_of_further_devices_are_in_the_file_too(options, tmp_path):
    common = {name: value for name, value in options.items() if name != "device"}
    config = TrainConfig.of(**{**common, "model_dir": tmp_path, "devices": ("cpu", "cpu")})
    rows = read_steps(train.run(config).paths.beside("steps.jsonl"))
    found = sorted((row["round"], row["client_id"], row["step"]) for row in rows)
    assert found == [(number, client, step) for number in (1, 2) for client in (0, 1) for step in range(1, 4 - client)]


def test_watching_does_not_wait_for_torch():
    code = "import sys; import fedlora.stages.watch; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
