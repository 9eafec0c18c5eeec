"""Rounds in which one client, or several, do what they should not."""

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_run import make_client_files

from fedlora.config.evaluate import ReportConfig
from fedlora.config.train import TrainConfig
from fedlora.engines.arriving import ArrivingUpdates
from fedlora.engines.simulation import SimulatedClients
from fedlora.errors import DataError, OutOfMemoryError, TrainingError, UsageError
from fedlora.federated.adapters import fingerprint, weighted_mean
from fedlora.files import sha256_of
from fedlora.llm.adapter_files import load_adapter
from fedlora.reporting.experiments import load_experiment
from fedlora.reporting.findings import Findings, gather_findings
from fedlora.reporting.markdown import markdown_report
from fedlora.stages import train
from fedlora.types import ClientFailure, ClientMemory, ClientUpdate, Download, TrainTask

BAD = 5


def changed(update: ClientUpdate, key_number: int, change: Callable[[torch.Tensor], object]) -> ClientUpdate:
    """One tensor of what the client sends, or keeps when it sends nothing, replaced."""
    state = dict(update.upload if update.upload is not None else update.memory.adapter)
    key = sorted(state)[key_number]
    state[key] = change(state[key].clone())
    return with_adapter(update, state)


def with_adapter(update: ClientUpdate, state) -> ClientUpdate:
    if update.upload is not None:
        return dataclasses.replace(update, upload=state)
    return dataclasses.replace(update, memory=dataclasses.replace(update.memory, adapter=state))


def without_a_key(update: ClientUpdate) -> ClientUpdate:
    state = dict(update.upload if update.upload is not None else update.memory.adapter)
    return with_adapter(update, {key: state[key] for key in sorted(state)[1:]})


def poke(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return change


def failing(error: Exception) -> Callable[[ClientUpdate], ClientUpdate]:
    def fail(update: ClientUpdate) -> ClientUpdate:
        raise error

    return fail


KINDS: dict[str, tuple[Callable[[ClientUpdate], object], str, str]] = {
    "nan": (lambda update: changed(update, 0, poke(math.nan)), "invalid", "non-finite tensor"),
    "infinite": (lambda update: changed(update, 3, poke(-math.inf)), "invalid", "non-finite tensor"),
    "missing key": (without_a_key, "invalid", "1 missing keys"),
    "transposed": (lambda update: changed(update, 0, lambda tensor: tensor.T), "invalid", "has shape"),
    "scalar": (lambda update: changed(update, 1, lambda tensor: torch.tensor(1.0)), "invalid", "has shape ()"),
    "empty tensor": (lambda update: changed(update, 1, lambda tensor: tensor[:0]), "invalid", "has shape (0,"),
    "terabytes": (lambda update: changed(update, 1, lambda t: torch.zeros(1).expand(10**12)), "invalid", "has shape"),
    "bfloat16": (lambda update: changed(update, 2, torch.Tensor.bfloat16), "invalid", "has type torch.bfloat16"),
    "no rows": (lambda update: dataclasses.replace(update, num_examples=0), "invalid", "num_examples=0"),
    "a billion billion rows": (
        lambda update: dataclasses.replace(update, num_examples=10**18),
        "invalid",
        "num_examples=1000000000000000000 is not between",
    ),
    "rows as text": (lambda update: dataclasses.replace(update, num_examples="7"), "invalid", "num_examples='7'"),
    "loss that is no number": (
        lambda update: dataclasses.replace(update, metrics={**update.metrics, "loss": math.nan}),
        "invalid",
        "the metric loss is nan",
    ),
    "a loss beyond every sum": (
        lambda update: dataclasses.replace(update, metrics={**update.metrics, "loss": 10**400}),
        "invalid",
        "the metric loss is 1000",
    ),
    "rows that cannot be looked at": (
        lambda update: dataclasses.replace(update, metrics=None),
        "invalid",
        "it cannot be checked (TypeError)",
    ),
    "values whose products overflow": (
        lambda update: changed(update, 0, poke(3e38)),
        "invalid",
        "the norm of",
    ),
    "an old round's answer": (
        lambda update: dataclasses.replace(update, round=update.round - 1),
        "invalid",
        "it answers another task",
    ),
    "another task's answer": (
        lambda update: dataclasses.replace(update, task_id="x"),
        "invalid",
        "it answers another task",
    ),
    "an exception": (failing(ZeroDivisionError("by zero")), "crashed", "ZeroDivisionError: by zero"),
    "broken data": (failing(DataError("rows.json:7: broken", hint="mend it")), "data", "rows.json:7: broken (mend it)"),
    "divergence": (failing(TrainingError("the loss is not a number")), "diverged", "the loss is not a number"),
    "no memory": (failing(OutOfMemoryError("out of memory")), "out_of_memory", "out of memory"),
    "no memory at all": (failing(MemoryError()), "out_of_memory", "MemoryError"),
}


ROWS = [3, 2, 4, 2, 1, 3, 2, 5]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight clients, one row each and more."""
    return make_client_files(tmp_path_factory.mktemp("bad_clients"), ROWS)


def train_in(folder: Path, data: Path, model: Path, name: str, mode: str = "homo", **changes):
    options = {
        "exp_name": name,
        "federation_mode": mode,
        "base_model": str(model),
        "base_dtype": "float32",
        "data_path": data,
        "model_dir": folder,
        "client_selection_strategy": "all",
        "num_communication_rounds": 1,
        "local_batch_size": 4,
        "local_num_epochs": 1,
        "local_learning_rate": 1e-2,
        "prompt_template": "chat",
        "device": "cpu",
        **changes,
    }
    return train.run(TrainConfig.of(**options)).paths


@pytest.fixture
def start(tiny_model, data, tmp_path):
    """Train the eight clients under a name of one's choice."""
    return lambda name, mode="homo", **changes: train_in(tmp_path / "models", data, tiny_model, name, mode, **changes)


@pytest.fixture(scope="module")
def good(tiny_model, data, tmp_path_factory):
    """(a run of one round in which nobody is bad, what its clients sent); nobody changes either."""
    sent, honest = {}, SimulatedClients._train_one

    def keep(self, task):
        sent[task.client_id] = outcome = honest(self, task)
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimulatedClients, "_train_one", keep)
        paths = train_in(tmp_path_factory.mktemp("good"), data, tiny_model, "good")
    return paths, sent


@pytest.fixture
def spoil(monkeypatch):
    """Make one client do something else than its training; returns how often it was asked."""
    asked: list[int] = []

    def install(how: Callable[[ClientUpdate], object], client: int = BAD, times: int = 10**6):
        honest = SimulatedClients._train_one

        def spoiled(self, task):
            outcome = honest(self, task)
            if task.client_id != client or len(asked) >= times:
                return outcome
            asked.append(task.round)
            return how(outcome)

        monkeypatch.setattr(SimulatedClients, "_train_one", spoiled)
        return asked

    return install


def reported(name: str, folder: Path) -> Findings:
    """What the report says of a run; its pictures are another test's."""
    config = ReportConfig.of(exp_names=name, communication_rounds=1, model_dir=folder / "models")
    experiment = load_experiment(config, name, 1)
    assert experiment is not None
    return gather_findings(config, [experiment], [])


def adapter_files(paths, number: int = 1) -> dict[str, str]:
    return {
        f"{file.parent.name}/{file.name}": sha256_of(file)
        for file in sorted(paths.round_folder(number).rglob("*adapter_model.*"))
    }


@pytest.fixture(scope="module")
def homo_without(good):
    """The mean of the seven others' updates in a run in which nobody is bad."""
    folder = good[0].round_folder(1)
    shapes = {
        key: tuple(value.shape)
        for key, value in torch.load(folder / "global_adapter_model.bin", weights_only=True).items()
    }

    def pairs():
        for client, rows in enumerate(ROWS):
            if client != BAD:
                yield load_adapter(folder / f"client_{client}/adapter_model.bin", shapes), rows

    return fingerprint(weighted_mean(pairs())), shapes


@pytest.mark.parametrize("kind", KINDS)
def test_one_bad_client_of_eight_is_left_out_and_the_others_give_the_same_bytes(
    start, spoil, good, homo_without, kind, tmp_path, capsys, monkeypatch
):
    how, failure, reason = KINDS[kind]
    expected, shapes = homo_without
    # the others train as they did in the good run, where each of them was watched
    monkeypatch.setattr(SimulatedClients, "_train_one", lambda self, task: good[1][task.client_id])
    asked = spoil(how)
    paths = start("bad")
    found = load_adapter(paths.round_folder(1) / "adapter_model.safetensors", shapes)
    assert fingerprint(found) == expected
    (entry,) = json.loads((paths.round_folder(1) / "manifest.json").read_text())["quarantined"]
    assert (entry["client_id"], entry["kind"]) == (BAD, failure)
    assert reason in entry["reason"]
    metrics = [json.loads(line) for line in paths.metrics_file.read_text().splitlines()]
    assert [row["quarantined"] for row in metrics if row["kind"] == "round"] == [[entry]]
    # failures of the infrastructure alone are worth another try
    assert len(asked) == (3 if failure == "out_of_memory" else 1)
    assert f"client {BAD} is left out of the round: {entry['reason']}" in capsys.readouterr().err
    told = reported("bad", tmp_path).record()["quarantined"]
    assert told == [f"bad, round 1, client {BAD}: {entry['reason']}"]


@pytest.mark.parametrize("mode", ["seq", "none"])
@pytest.mark.parametrize(
    "kind",
    [
        "nan",
        "an exception",
        pytest.param("missing key", marks=pytest.mark.thorough),
        pytest.param("a billion billion rows", marks=pytest.mark.thorough),
    ],
)
def test_seq_and_none_go_on_without_the_bad_client(start, spoil, mode, kind):
    how, failure, _ = KINDS[kind]
    spoil(how)
    paths = start("bad", mode, num_communication_rounds=2)
    for number in (1, 2):
        (entry,) = json.loads((paths.round_folder(number) / "manifest.json").read_text())["quarantined"]
        assert (entry["client_id"], entry["kind"]) == (BAD, failure)
    names = {name.split("/")[0] for name in adapter_files(paths, 2)}
    assert names == {"2" if mode == "seq" else "client_0"} | {
        f"client_{client}" for client in range(8) if client != BAD
    }


def test_a_client_that_is_lost_once_and_then_answers_changes_nothing(start, spoil, good, capsys):
    asked = spoil(failing(MemoryError()), times=1)
    assert adapter_files(start("bad")) == adapter_files(good[0])
    assert asked == [1]
    assert f"client {BAD} is asked again: MemoryError" in capsys.readouterr().err


def test_without_retries_nobody_is_asked_again(start, spoil):
    asked = spoil(failing(MemoryError()))
    start("bad", client_retries=0)
    assert asked == [1]


def test_too_few_updates_stop_the_run_which_goes_on_where_it_stood(start, spoil, monkeypatch):
    whole = start("whole", num_communication_rounds=3, min_clients=8)
    with monkeypatch.context():
        asked = spoil(lambda update: update if update.round != 2 else (_ for _ in ()).throw(ZeroDivisionError("no")))
        with pytest.raises(TrainingError, match=r"round 2: 7 usable updates of the 8 that a round needs: client 5"):
            start("broken", num_communication_rounds=3, min_clients=8)
        assert asked == [1, 2]
    monkeypatch.undo()
    trained = []
    honest = SimulatedClients._train_one
    monkeypatch.setattr(
        SimulatedClients,
        "_train_one",
        lambda self, task: (trained.append((task.round, task.client_id)), honest(self, task))[1],
    )
    again = start("broken", num_communication_rounds=3, min_clients=8)
    assert trained == [(2, BAD), *((3, client) for client in range(8))]
    assert adapter_files(again, 3) == adapter_files(whole, 3)


def test_fewer_clients_than_the_quorum_are_refused_before_any_training(start):
    with pytest.raises(UsageError, match="min_clients=9, but a cohort has 8 of the 8 clients"):
        start("few", min_clients=9)


def longer(factor: float):
    return lambda update: with_adapter(update, {key: value * factor for key, value in update.upload.items()})


def test_an_update_beyond_all_products_is_left_out_where_nothing_clips_it(start, spoil, capsys):
    spoil(longer(1e20))
    start("free")
    assert f"client {BAD} is left out of the round: the norm of" in capsys.readouterr().err
    for limit in ({"max_update_norm": 1.0}, {"max_update_norm_ratio": 4.0}):
        paths = start("clipped", **limit, overwrite=True)
        (entry,) = json.loads((paths.round_folder(1) / "manifest.json").read_text())["limited"]
        assert entry["client_id"] == BAD


@pytest.mark.parametrize("factor", [-100.0, 1e12])
def test_a_long_update_is_clipped_and_told_of(start, spoil, factor, tmp_path, capsys):
    spoil(longer(factor))
    start("free")
    assert f"the update of client {BAD} is" in capsys.readouterr().err
    paths = start("clipped", max_update_norm_ratio=4.0)
    (entry,) = json.loads((paths.round_folder(1) / "manifest.json").read_text())["limited"]
    assert entry["client_id"] == BAD
    assert entry["norm"] > 20 * entry["clipped_to"]
    free, clipped = (
        torch.load(tmp_path / f"models/{name}/1/global_adapter_model.bin", weights_only=True)
        for name in ("free", "clipped")
    )
    key = sorted(free)[0]
    assert float(free[key].abs().max()) > 5 * float(clipped[key].abs().max())
    assert f"client {BAD}: update of norm" in markdown_report(reported("clipped", tmp_path), pictures=())


def test_an_absolute_limit_clips_in_every_mode_that_sends(start):
    for mode in ("homo", "seq", "pooled"):
        paths = start(f"clip-{mode}", mode, max_update_norm=1e-3)
        limited = json.loads((paths.round_folder(1) / "manifest.json").read_text())["limited"]
        assert len(limited) == (1 if mode == "pooled" else 8)
        assert all(entry["clipped_to"] == 1e-3 for entry in limited)


def test_a_long_update_is_quarantined_where_that_is_asked(start, spoil, homo_without):
    expected, shapes = homo_without
    spoil(longer(1e6))
    paths = start("refused", max_update_norm=100.0, norm_action="quarantine")
    assert fingerprint(load_adapter(paths.round_folder(1) / "adapter_model.safetensors", shapes)) == expected
    (entry,) = json.loads((paths.round_folder(1) / "manifest.json").read_text())["quarantined"]
    assert "is above max_update_norm=100" in entry["reason"]


def test_no_client_weighs_more_than_its_share(start, spoil):
    spoil(lambda update: dataclasses.replace(update, num_examples=10**8))
    paths = start("heavy", max_client_weight=0.25)
    (entry,) = json.loads((paths.round_folder(1) / "manifest.json").read_text())["limited"]
    assert entry["client_id"] == BAD
    assert entry["counted_as"] == 6  # of 6 + 19: the next whole number would be more than a quarter
    assert entry["num_examples"] == 10**8


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"federation_mode": "none", "max_update_norm": 1.0}, "combines nothing"),
        ({"federation_mode": "none", "max_client_weight": 0.5}, "combines nothing"),
        ({"federation_mode": "seq", "max_update_norm_ratio": 2.0}, "one update after another"),
        ({"federation_mode": "pooled", "max_client_weight": 0.5}, "one update after another"),
        ({"norm_action": "quarantine"}, "needs max_update_norm"),
        ({"norm_action": "quarantine", "max_update_norm": 1.0, "max_update_norm_ratio": 2.0}, "can only clip"),
        ({"max_update_norm": 0.0}, "greater than 0"),
        ({"max_update_norm": "nan"}, "max_update_norm"),
        ({"max_client_weight": 1.5}, "less than or equal to 1"),
        ({"min_clients": 0}, "greater than or equal to 1"),
    ],
)
def test_limits_that_make_no_sense_are_refused(changes, what):
    with pytest.raises(UsageError, match=what):
        TrainConfig.of(**changes)


def answer(client: int, value: float | None = None) -> ClientUpdate:
    state = {"x": torch.full((3,), float(client) if value is None else value)}
    metrics = {"loss": 1.0, "num_response_tokens": 5, "update_norm": 1.0}
    return ClientUpdate(f"task {client}", 1, client, state, ClientMemory(), 1 + client, 10, 1, "start", metrics)


class Messages:
    """A pool that delivers whatever it was given, and nothing when it is asked again."""

    def __init__(self, messages):
        self.messages = list(messages)

    def train(self, tasks):
        delivered, self.messages = self.messages, []
        yield from delivered


class Kept:
    def __init__(self):
        self.by_client = {}

    def keep_update(self, update, adapter):
        assert update.client_id not in self.by_client
        self.by_client[update.client_id] = update

    def updates(self, round_number, clients):
        return [self.by_client[client] for client in sorted(clients)]


def receive(messages, count: int = 8):
    tasks = [
        TrainTask(f"task {client}", 1, 0, client, (client,), Download({"x": torch.zeros(3)})) for client in range(count)
    ]
    arriving = ArrivingUpdates(Messages(messages), tasks, Kept(), {"x": (3,)}, retries=2)
    mean = weighted_mean((update.upload, update.num_examples) for update in arriving)
    return mean, arriving


def test_late_repeated_and_foreign_messages_change_no_bit_of_the_sum():
    clean, _ = receive(answer(client) for client in range(8))
    for seed in range(100):
        draw = random.Random(seed)
        messages = [answer(client) for client in range(8)]
        messages += [answer(client) for client in draw.sample(range(8), 3)]
        messages += [
            dataclasses.replace(answer(client, 100.0), task_id="old", round=0) for client in draw.sample(range(8), 3)
        ]
        messages += [dataclasses.replace(answer(3, 7.0), client_id=99), ClientFailure(77, "lost", "who?")]
        draw.shuffle(messages)
        mean, arriving = receive(messages)
        assert torch.equal(mean["x"], clean["x"]), seed
        assert not arriving.failures, seed


def test_whoever_drops_out_the_rest_is_a_whole_result():
    for lost in itertools.combinations(range(8), 3):
        left = [answer(client) for client in range(8) if client not in lost]
        mean, arriving = receive(left)
        expected = weighted_mean((update.upload, update.num_examples) for update in left)
        assert torch.equal(mean["x"], expected["x"]), lost
        found = [(failure.client_id, failure.kind) for failure in arriving.failures]
        assert found == [(client, "lost") for client in lost]


def test_a_client_that_only_sends_old_answers_is_left_out_with_that_reason():
    stale = dataclasses.replace(answer(2, 100.0), task_id="old", round=0)
    _, arriving = receive([*(answer(client) for client in range(8) if client != 2), stale])
    (failure,) = arriving.failures
    assert (failure.client_id, failure.kind) == (2, "invalid")
    assert "it answers another task, of round 0" in failure.reason


def test_what_a_server_makes_of_updates_is_committed_only_if_it_is_finite(start, monkeypatch):
    """A round that no later one could go on from does not become the newest."""
    from fedlora.methods.fedavg import FedAvg

    honest = FedAvg.aggregate

    def overflowing(self, state, updates, context):
        made = honest(self, state, updates, context)
        if context.round < 2:
            return made
        return dataclasses.replace(made, adapter={key: value * math.inf for key, value in made.adapter.items()})

    whole = start("whole", num_communication_rounds=2)
    with monkeypatch.context() as patch:
        patch.setattr(FedAvg, "aggregate", overflowing)
        with pytest.raises(TrainingError, match="round 2: what the server made of the updates is not finite"):
            start("broken", num_communication_rounds=2)
    again = start("broken", num_communication_rounds=2)
    assert adapter_files(again, 2) == adapter_files(whole, 2)
