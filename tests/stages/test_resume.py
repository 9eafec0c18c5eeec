import itertools
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from lost_signals import lose_signal
from tiny_run import make_client_files

from fedlora.config.train import TrainConfig
from fedlora.errors import DataError, UsageError
from fedlora.federated.validation import find_update_fault
from fedlora.files import sha256_of
from fedlora.llm.local_training import Trainer
from fedlora.runs.checking import seal
from fedlora.stages import train
from fedlora.stopping import stop_on_signals
from fedlora.training import live_run
from fedlora.training.run_progress import RunProgress

MODES = ("homo", "seq", "none", "pooled")


class CrashError(BaseException):
    """Ends a run from inside; not an Exception, so that nothing on the way takes it for its own."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The rows of three clients; a test that changes them does so in a copy."""
    return make_client_files(tmp_path_factory.mktemp("resume"), [5, 4, 3])


def train_in(folder: Path, data: Path, model: Path, mode: str = "homo", **changes) -> Path:
    options = {
        "exp_name": "run",
        "federation_mode": mode,
        "base_model": str(model),
        "base_dtype": "float32",
        "data_path": data,
        "model_dir": folder,
        "client_selection_frac": 0.7,
        "num_communication_rounds": 2,
        "num_clients": 3,
        "local_batch_size": 2,
        "local_num_epochs": 1,
        "local_val_set_size": 1,
        "local_learning_rate": 1e-2,
        "prompt_template": "chat",
        "optimizer_state": "keep",
        "device": "cpu",
        **changes,
    }
    return train.run(TrainConfig.of(**options)).root


@pytest.fixture
def start(tiny_model, data, tmp_path):
    """Train three small clients for two rounds into a folder of one's choice."""
    return lambda folder, mode="homo", **changes: train_in(tmp_path / folder, data, tiny_model, mode, **changes)


@pytest.fixture(scope="module")
def whole(tiny_model, data, tmp_path_factory):
    """An unbroken run of these settings, trained once; nobody changes it."""
    made = {}

    def find(mode: str = "homo", **changes) -> Path:
        key = json.dumps([mode, changes])
        if key not in made:
            made[key] = train_in(tmp_path_factory.mktemp("whole"), data, tiny_model, mode, **changes)
        return made[key]

    return find


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of an unbroken run in the folder `models` of this test, to be damaged or gone on with."""

    def copy(**changes) -> Path:
        return shutil.copytree(whole(**changes), tmp_path / "models" / "run")

    return copy


def hashes(run: Path) -> dict[str, str]:
    """Every file of the rounds; run.json and metrics.jsonl hold what the clock said."""
    return {
        path.relative_to(run).as_posix(): sha256_of(path)
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.parent != run
    }


def measured(run: Path) -> list[dict]:
    """The metrics without the clock and without the lines that only tell of it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name not in ("seconds", "check")}
        for row in rows
        if row["kind"] != "update"
    ]


def test_progress_resumes_its_count_inside_a_round(start, monkeypatch, capsys):
    """All examples of the run are counted; those of committed rounds and of stored updates at once."""
    told: list[tuple[int, int, str]] = []

    class Seen(RunProgress):
        def advance(self, amount: int = 1, note: str | None = None) -> None:
            super().advance(amount, note)
            told.append((self.done, self.total, self.note))

    monkeypatch.setattr(live_run, "RunProgress", Seen)
    train_one, calls = Trainer.train, itertools.count()

    def crash_in_the_second_round(trainer, *arguments, **options):
        if next(calls) == 4:
            raise CrashError
        return train_one(trainer, *arguments, **options)

    options = {"client_selection_strategy": "all", "local_val_set_size": None, "local_num_epochs": 2}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", crash_in_the_second_round)
        with pytest.raises(CrashError):
            start("models", **options)
    assert told[-1][:2] == (2 * (12 + 5), 2 * 24)
    first = len(told)
    capsys.readouterr()
    start("models", **options)
    assert told[first][:2] == (2 * (12 + 5), 2 * 24), "12 examples of round 1, 5 of client 0"
    assert told[first][2].startswith("loss ")
    assert told[-1][0] == told[-1][1]
    shown = capsys.readouterr()
    assert "resumes after round 1 of 2" in shown.err
    assert shown.out == ""


def crash_at(monkeypatch, call: int) -> None:
    """The n-th flush to disk ends the run."""
    flush, count = os.fsync, iter(range(10**9))

    def crashing(descriptor: int) -> None:
        if next(count) == call:
            raise CrashError
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", crashing)


def count_flushes(monkeypatch, run) -> int:
    calls = []
    flush = os.fsync
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (calls.append(1), flush(descriptor)))
        run()
    return len(calls)


def turned_into_another(train_once):
    # as torch says it when the reading of kept moments is interrupted
    lose_signal(ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'"))


def lost_before_the_first_pass(train_once):
    lose_signal()
    return train_once()


def lost_behind_the_last_pass(train_once):
    trained = train_once()
    lose_signal()
    return replace(trained, adapter={key: 2 * value for key, value in trained.adapter.items()})


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("lost", "trains"),
    [(turned_into_another, False), (lost_before_the_first_pass, False), (lost_behind_the_last_pass, True)],
)
def test_a_signal_that_a_client_s_training_loses_ends_the_run_and_spoils_no_round(
    start, whole, monkeypatch, capsys, lost, trains
):
    expected = hashes(whole())
    train_a_client, calls, rows = Trainer.train, itertools.count(), []

    def losing(trainer, *arguments, **options):
        if next(calls) != 2:
            return train_a_client(trainer, *arguments, **options)
        return lost(lambda: train_a_client(trainer, *arguments, **{**options, "on_step": rows.append}))

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", losing)
        with pytest.raises(SystemExit) as stopped, stop_on_signals():
            start("broken")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert bool(rows) == trains
    assert "failed" not in capsys.readouterr().err
    assert hashes(start("broken")) == expected


@pytest.mark.usefixtures("handlers")
def test_a_signal_that_is_lost_while_an_update_is_checked_is_no_fault_of_the_update(start, whole, monkeypatch):
    calls = itertools.count()

    def losing(*arguments, **options):
        # the last one of a wave: nobody trains behind it
        if next(calls) == 1:
            lose_signal(ValueError("an update cannot be checked"))
        return find_update_fault(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("fedlora.engines.arriving.find_update_fault", losing)
        with pytest.raises(SystemExit), stop_on_signals():
            start("broken")
    assert hashes(start("broken")) == hashes(whole())


@pytest.mark.parametrize("every", [31, pytest.param(7, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_ends_anywhere_goes_on_to_the_same_bytes(start, mode, every, monkeypatch, tmp_path):
    # the first run of all also writes the tokens, which later ones find in the cache
    start("first", mode, num_communication_rounds=1)
    whole = []
    flushes = count_flushes(monkeypatch, lambda: whole.append(start("whole", mode)))
    expected, metrics = hashes(whole[0]), measured(whole[0])
    assert flushes > 40
    # by default the four end at different moments
    for number, call in enumerate(range(7 * MODES.index(mode) % every, flushes, every)):
        with monkeypatch.context() as patch:
            crash_at(patch, call)
            with pytest.raises(CrashError):
                start(f"broken{number}", mode)
        again = start(f"broken{number}", mode)
        assert hashes(again) == expected, f"flush {call} of {flushes}"
        assert measured(again) == metrics
        assert json.loads((again / "run.json").read_text())["state"] == "finished"


def test_what_a_client_has_finished_is_not_trained_again(start, monkeypatch):
    from fedlora.engines.simulation import SimulatedClients

    trained = []
    train_one = SimulatedClients.train_one

    def counting(self, task):
        if len(trained) == 3:
            raise CrashError
        trained.append((task.round, task.client_id))
        return train_one(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(SimulatedClients, "train_one", counting)
        with pytest.raises(CrashError):
            start("models", client_selection_frac=1.0)
    assert trained == [(1, 0), (1, 1), (1, 2)]
    trained.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            SimulatedClients,
            "train_one",
            lambda self, task: (trained.append((task.round, task.client_id)), train_one(self, task))[1],
        )
        start("models", client_selection_frac=1.0)
    assert trained == [(2, 0), (2, 1), (2, 2)]


def test_a_finished_run_called_again_stays_as_it_is(start, copied):
    run = copied()
    before, metrics = hashes(run), (run / "metrics.jsonl").read_bytes()
    assert hashes(start("models")) == before
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_a_finished_run_takes_more_rounds_where_no_learning_rate_depends_on_them(start, whole):
    short = start("grown", num_communication_rounds=1)
    assert hashes(short).items() <= hashes(start("grown", num_communication_rounds=2)).items()
    assert hashes(short) == hashes(whole())
    start("cosine", num_communication_rounds=1, lr_schedule="cosine")
    with pytest.raises(UsageError, match="num_communication_rounds: 1 -> 2"):
        start("cosine", num_communication_rounds=2, lr_schedule="cosine")


OTHERS = {
    "seed": 7,
    "local_learning_rate": 2e-2,
    "local_batch_size": 3,
    "local_num_epochs": 2,
    "lora_r": 8,
    "lora_alpha": 8.0,
    "lora_dropout": 0.0,
    "cutoff_len": 100,
    "client_selection_frac": 1.0,
    "optimizer_state": "reset",
    "federation_mode": "seq",
    "num_communication_rounds": 1,
}


def test_another_configuration_in_the_same_place_is_refused_with_the_difference(start, copied, subtests):
    run = copied()
    before = hashes(run)
    for name, value in OTHERS.items():
        with subtests.test(name=name):
            with pytest.raises(UsageError, match=rf"another configuration \({name}: .* -> {value!r}\)") as caught:
                start("models", **({"mode": value} if name == "federation_mode" else {name: value}))
            assert "--overwrite" in caught.value.hint
            assert hashes(run) == before


def test_a_client_s_file_that_changed_is_refused(start, data, tmp_path):
    own = shutil.copytree(data, tmp_path / "data")
    start("models", data_path=own, num_communication_rounds=1)
    file = own / "3/local_training_1.json"
    file.write_text(file.read_text().replace("say", "tell"))
    with pytest.raises(DataError, match=r"local_training_1\.json: not the file that this run was started with"):
        start("models", data_path=own)


def test_a_client_s_file_that_is_gone_is_named(start, data, tmp_path):
    silos = tmp_path / "silos"
    silos.mkdir()
    for client in range(3):
        shutil.copy(data / f"3/local_training_{client}.json", silos / f"site{client}.json")
    start("models", data_path=silos)
    (silos / "site1.json").unlink()
    with pytest.raises(DataError, match=r"site1\.json: gone since this run was begun"):
        start("models", data_path=silos, num_clients=2)


def test_a_damaged_round_that_nothing_needs_is_told_of(start, copied, capsys):
    run = copied(client_selection_frac=1.0)
    file = run / "1/client_0/adapter_model.bin"
    file.write_bytes(b"x" + file.read_bytes()[1:])
    start("models", client_selection_frac=1.0)
    told = capsys.readouterr().err
    assert f"warning: {file} does not match its hash; later rounds do not need it" in told


def test_another_environment_is_refused_unless_drift_is_allowed(start, capsys):
    run = start("models", num_communication_rounds=1)
    record = json.loads((run / "run.json").read_text())
    record["versions"]["torch"] = "1.0"
    (run / "run.json").write_text(json.dumps(seal(record)))
    with pytest.raises(UsageError, match=r"another environment \(torch: 1\.0 -> "):
        start("models")
    start("models", allow_drift=True)
    assert "resuming in another environment: torch: 1.0 -> " in capsys.readouterr().err


DAMAGED = (
    "2/adapter_model.safetensors",
    "2/global_adapter_model.bin",
    "2/adapter_config.json",
    "2/manifest.json",
    "2/client_0/adapter_model.bin",
    "2/client_0/update.json",
    "2/client_0/private/optimizer.safetensors",
    "1/manifest.json",
)
HOW = ("flip", "cut", "remove", "empty")
# by default every file in one way and every way on two files
DAMAGES = [
    pytest.param(name, how, marks=[] if DAMAGED.index(name) % 4 == HOW.index(how) else pytest.mark.thorough)
    for name in DAMAGED
    for how in HOW
]


@pytest.mark.parametrize(("name", "how"), DAMAGES)
def test_a_damaged_round_is_moved_aside_and_trained_again_to_the_same_bytes(start, copied, name, how, capsys):
    run = copied(client_selection_frac=1.0)
    expected = hashes(run)
    file = run / name
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
    file.write_bytes(b"" if how == "empty" else content[: -1 if how == "cut" else None])
    if how == "remove":
        file.unlink()
    again = start("models", client_selection_frac=1.0)
    assert "is not used and trained again" in capsys.readouterr().err
    aside = {entry.name for entry in again.iterdir() if entry.name.endswith(".damaged")}
    assert aside
    for entry in aside:
        shutil.rmtree(again / entry)
    assert hashes(again) == expected


def test_a_torn_metrics_line_is_dropped(start, whole):
    run = start("models", num_communication_rounds=1)
    expected = measured(whole())
    with (run / "metrics.jsonl").open("a") as handle:
        handle.write('{"kind": "client", "round": 2, "clie')
    assert measured(start("models")) == expected
