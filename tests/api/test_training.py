"""`fl.train` and `fl.rounds`: the files of the command line, interrupts, loops, keywords."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import facts_of

import fedlora as fl
from fedlora import cli
from fedlora.engines.simulation import SimulatedClients
from fedlora.errors import DataError, FedloraError, LockedError, StorageError, UsageError
from fedlora.runs.lock import find_holder

SOURCE = Path(__file__).parent.parent.parent / "src"


@pytest.fixture
def wanted(tiny_model: Path, make_clients: Callable[..., Path]) -> dict[str, Any]:
    """Keywords of a run of three small clients; `models` lies where the test works."""
    return {
        "data": make_clients([4, 3, 3]),
        "num_clients": 3,
        "model": str(tiny_model),
        "name": "run",
        "rounds": 2,
        "client_fraction": 1,
        "batch_size": 2,
        "epochs": 1,
        "learning_rate": 1e-2,
        "device": "cpu",
        "base_dtype": "float32",
    }


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def flags(wanted: dict[str, Any]) -> list[str]:
    return [word for name, value in wanted.items() for word in (f"--{name}", str(value))]


def contents(folder: Path) -> dict[str, Any]:
    """Path -> bytes; of JSON that tells a time, its other fields."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            found[str(file.relative_to(folder))] = file.read_bytes()
        if file.name.endswith(".meta.json"):
            found[str(file.relative_to(folder))] = {**json.loads(file.read_text()), "seconds": None}
    return found


def test_a_run_and_its_answers_and_scores_are_those_of_the_command_line(wanted, test_file, tmp_path, monkeypatch):
    about = {"name": "run", "of": "base,global,1", "test": test_file}
    for folder in ("typed", "called"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "typed")
    assert cli.main(["train", *flags(wanted)]) == 0
    assert cli.main(["generate", *flags(about), "--max_new_tokens", "4"]) == 0
    assert cli.main(["score", *flags(about)]) == 0
    monkeypatch.chdir(tmp_path / "called")
    run = fl.train(**wanted, progress=False)
    run.generate(test_file, of=["base", "global", 1], max_new_tokens=4, progress=False).score(progress=False)
    typed, called = (facts_of(tmp_path / folder / "models" / "run") for folder in ("typed", "called"))
    assert called == typed
    for tree in ("predictions", "evaluations_rouge"):
        found = contents(tmp_path / "called" / tree)
        assert found.keys()
        assert found == contents(tmp_path / "typed" / tree)


def test_keywords_win_over_the_file_and_none_is_the_default(wanted, tmp_path):
    lines = {**wanted, "rounds": 7, "max_update_norm": 3.0, "local_val_set_size": 1}
    (tmp_path / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    run = fl.train("run.yaml", rounds=1, max_update_norm=None, local_val_set_size=None, progress=False)
    recorded = run.record.config
    assert (recorded["num_communication_rounds"], recorded["max_update_norm"], recorded["local_val_set_size"]) == (
        1,
        None,
        0,
    )


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"lr": 1e-3}, UsageError, ("lr", "learning_rate")),
        ({"rounds": "many"}, UsageError, ("rounds", "many")),
        ({"rounds": True}, UsageError, ("rounds", "True")),
        ({"rounds": 0}, UsageError, ("rounds",)),
        ({"dp_clip": object()}, UsageError, ("dp_clip",)),
        ({"method": "fedprx"}, UsageError, ("method", "fedprx")),
        ({"name": "a/b"}, UsageError, ("name", "a/b")),
        ({"config": 3}, UsageError, ("config", "3")),
        ({"data": "nowhere"}, UsageError, ("nowhere",)),
        ({"exp_name": "a", "name": "b"}, UsageError, ("exp_name", "name")),
    ],
)
@pytest.mark.parametrize("function", [fl.train, fl.rounds, fl.plan])
def test_a_wrong_keyword_type_or_value_is_a_usage_error_that_names_it(keywords, error, words, function):
    with pytest.raises(error) as caught:
        list(function(**keywords))
    assert not [word for word in words if word not in f"{caught.value} {caught.value.hint}"]


def test_an_error_uses_keywords_where_the_command_line_has_flags(wanted):
    fl.train(**{**wanted, "rounds": 1}, progress=False)
    with pytest.raises(UsageError) as caught:
        fl.train(**{**wanted, "rounds": 1, "seed": 7}, progress=False)
    assert "overwrite=True" in caught.value.hint
    assert "--" not in f"{caught.value}{caught.value.hint}"
    assert caught.value.__notes__ == [f"hint: {caught.value.hint}"]


def test_without_progress_nothing_is_shown_and_with_it_standard_output_stays_free(wanted, capfd):
    fl.train(**{**wanted, "rounds": 1}, progress=False)
    assert capfd.readouterr() == ("", "")
    fl.train(**{**wanted, "rounds": 1, "name": "loud"})
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "round 1 of 1" in shown.err


def test_rounds_are_yielded_as_they_are_committed_and_a_loop_that_ended_early_goes_on(wanted):
    whole = facts_of(fl.train(**{**wanted, "name": "whole", "rounds": 3}, progress=False).folder)
    seen = []
    for done in fl.rounds(**{**wanted, "rounds": 3}, progress=False):
        assert fl.open("models/run")[done.number].metrics == done.metrics
        seen.append(done.number)
        if done.number == 2:
            break
    assert find_holder(done.run.paths) is None
    seen += [done.number for done in fl.rounds(**{**wanted, "rounds": 3}, progress=False)]
    assert seen == [1, 2, 3]
    resumed = facts_of(Path("models/run"))
    assert resumed["metrics"] == whole["metrics"]
    assert {name: value for name, value in resumed["files"].items() if "manifest" not in name} == {
        name: value for name, value in whole["files"].items() if "manifest" not in name
    }


def test_a_loop_may_go_to_another_folder(wanted, tmp_path, monkeypatch):
    relative = {**wanted, "data": wanted["data"].relative_to(tmp_path), "client_fraction": 0.3}
    (tmp_path / "elsewhere").mkdir()
    for done in fl.rounds(**relative, client_selection_strategy="round_robin", progress=False):
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert done.metrics["cohort"] == [done.number - 1]
    assert len(fl.open(tmp_path / "models" / "run")) == 2
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_new_call_takes_the_place_of_a_loop_that_was_left_standing(wanted):
    standing = fl.rounds(**wanted, progress=False)
    next(standing)
    assert find_holder(fl.open("models/run").paths) is not None
    assert len(fl.train(**wanted, progress=False)) == 2
    with pytest.raises(LockedError):
        next(standing)


def test_a_loop_that_another_thread_ends_leaves_the_run_free(wanted):
    loop = fl.rounds(**wanted, progress=False)
    run = next(loop).run
    thread = threading.Thread(target=loop.close)
    thread.start()
    thread.join()
    assert find_holder(run.paths) is None


def test_an_interrupt_that_torch_swallows_leaves_a_run_that_resumes_to_the_same_bytes(wanted, monkeypatch):
    whole = facts_of(fl.train(**wanted, progress=False).folder)
    Path("models").rename("first")
    train = SimulatedClients._train_one

    def interrupted(self: SimulatedClients, task: Any) -> Any:
        if (task.round, task.client_id) == (2, 1):
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            except KeyboardInterrupt:
                raise RuntimeError("could not determine the shape of object type 'torch.storage'") from None
        return train(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(SimulatedClients, "_train_one", interrupted)
        with pytest.raises(KeyboardInterrupt) as stopped:
            fl.train(**wanted, progress=False)
    assert "resumes" in stopped.value.__notes__[0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run = fl.open("models/run")
    assert len(run) == 1
    assert find_holder(run.paths) is None
    assert facts_of(fl.train(**wanted, progress=False).folder) == whole


def test_importing_is_quick_and_changes_nothing():
    code = (
        "import os, sys, signal; before = dict(os.environ), signal.getsignal(2); import fedlora as fl; "
        "assert not {'torch', 'pydantic', 'numpy', 'rich'} & set(sys.modules), sorted(sys.modules); "
        "assert set(fl.__all__) <= set(dir(fl)); fl.train, fl.Run, fl.plan, fl.compare, fl.score; "
        "assert 'torch' not in sys.modules; assert (dict(os.environ), signal.getsignal(2)) == before; "
        "import fedlora.runs.reader; assert callable(fl.runs); from fedlora import runs; assert callable(runs)"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_spinning_is_limited_by_what_trains_before_torch_is_there_and_otherwise_left_alone(monkeypatch):
    import torch  # noqa: F401

    monkeypatch.delenv("GOMP_SPINCOUNT")
    with pytest.raises(FedloraError):
        fl.train(data="nowhere")
    assert "GOMP_SPINCOUNT" not in os.environ
    code = (
        "import os, fedlora as fl\n"
        "try:\n    fl.train(data='nowhere')\nexcept fl.errors.UsageError:\n    print(os.environ['GOMP_SPINCOUNT'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    assert done.stdout == "10000\n"


def test_what_memory_or_the_disk_refuses_is_an_error_of_fedlora_too(wanted, monkeypatch):
    for error in (MemoryError(), PermissionError(13, "no", "somewhere")):
        monkeypatch.setattr(
            "fedlora.stages.train.read_client_files", lambda *_, error=error: (_ for _ in ()).throw(error)
        )
        with pytest.raises(StorageError):
            fl.train(**wanted, progress=False)


def test_a_bad_row_keeps_its_error_class(wanted, tmp_path):
    (tmp_path / "data" / "3" / "local_training_1.json").write_text('[{"instruction": 3}]')
    with pytest.raises(DataError):
        fl.train(**wanted, progress=False)
