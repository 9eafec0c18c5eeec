import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch

from fedlora.config.train import TrainConfig
from fedlora.console import collect_lines, say
from fedlora.data.client_facts import read_client_files
from fedlora.engines import device_worker
from fedlora.engines.devices import DeviceClients
from fedlora.engines.messages import pack_outcome, pack_task, unpack_outcome, unpack_task
from fedlora.engines.workbench import make_workbench
from fedlora.errors import TrainingError, UsageError
from fedlora.federated.adapters import fingerprint
from fedlora.federated.base_delta import append
from fedlora.federated.ranks import cut_rank
from fedlora.files import sha256_of
from fedlora.home import tokens_folder
from fedlora.llm.layout import Layout, LayoutBook, Reduction
from fedlora.stages import train
from fedlora.types import BaseDelta, ClientFailure, ClientMemory, ClientUpdate, Download, TrainTask, no_step


@pytest.fixture
def options(tiny_model, make_clients, tmp_path):
    return {
        "base_model": str(tiny_model),
        "data_path": make_clients([5, 4, 3, 6, 2]),
        "model_dir": tmp_path / "models",
        "client_selection_frac": 1.0,
        "num_communication_rounds": 2,
        "local_batch_size": 2,
        "local_num_epochs": 1,
        "local_learning_rate": 1e-2,
        "prompt_template": "chat",
        "num_clients": 5,
    }


def hashes(root) -> dict[str, str]:
    wanted = ("*.bin", "*.safetensors", "update.json")
    return {str(path.relative_to(root)): sha256_of(path) for name in wanted for path in sorted(root.rglob(name))}


@pytest.mark.parametrize(
    ("mode", "kept", "ranks"),
    [
        ("homo", "keep", None),
        pytest.param("none", "keep", "4,2x4", marks=pytest.mark.thorough),
        pytest.param("fedex", "reset", None, marks=pytest.mark.thorough),
    ],
)
def test_several_devices_give_the_bytes_of_one(options, mode, kept, ranks, capsys):
    rounds = 3 if mode == "fedex" else 2
    common = {**options, "num_communication_rounds": rounds, "federation_mode": mode, "optimizer_state": kept}
    common["client_ranks"] = ranks
    alone = train.run(TrainConfig.of(**common, exp_name="alone", device="cpu")).root
    together = train.run(TrainConfig.of(**common, exp_name="together", devices=("cpu", "cpu"))).root
    assert hashes(together) == hashes(alone)
    assert "continuing without it" not in capsys.readouterr().err
    assert len(hashes(alone)) > 20
    lines = [json.loads(line) for line in (together / "metrics.jsonl").read_text().splitlines()]
    assert [line["client_id"] for line in lines if line["kind"] == "client"] == [0, 1, 2, 3, 4] * rounds


def test_a_chain_uses_one_device_and_says_so(options, capsys):
    train.run(TrainConfig.of(**options, exp_name="chain", federation_mode="seq", devices=("cpu", "cpu")))
    assert "seq trains one client after another: only cpu is used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": ("0", "0")}, "named twice"),
        ({"devices": ("0", "1"), "device": "cpu"}, "device or devices"),
        ({"devices": ("cuda:99",)}, "no CUDA device|device"),
    ],
)
def test_devices_that_make_no_sense_are_refused(options, changes, message):
    with pytest.raises(UsageError, match=message):
        train.run(TrainConfig.of(**options, exp_name="refused", **changes))


def test_numbers_are_cuda_devices():
    assert TrainConfig.of(devices=("0", "cuda:1", "cpu")).devices == ("cuda:0", "cuda:1", "cpu")


class Local:
    """Stands for this process's device: trains a task in `seconds`."""

    def __init__(self, seconds=0.0):
        self.seconds, self.trained = seconds, []
        self.trainer = type("Trainer", (), {})()
        self.trainer.book = LayoutBook(Layout(4096))
        self.trainer.config = TrainConfig.of(local_num_epochs=1)
        self.memories, self.on_step = self, no_step

    def read_memory(self, client_id, accepted):
        return ClientMemory()

    def train_one(self, task):
        time.sleep(self.seconds)
        self.trained.append(task.client_id)
        return update_of(task)


class Remote:
    """Stands for a worker process; `fault` is raised on the task of that client."""

    device = "elsewhere"

    def __init__(self, seconds=0.0, faults=None, reductions=()):
        self.seconds, self.faults, self.reductions = seconds, faults or {}, list(reductions)
        self.trained, self.under_way = [], threading.Event()

    def train(self, task, memory, layout, on_step):
        self.under_way.set()
        time.sleep(self.seconds)
        if task.client_id in self.faults:
            raise self.faults[task.client_id]
        self.trained.append(task.client_id)
        return update_of(task), self.reductions


def update_of(task) -> ClientUpdate:
    return ClientUpdate(task.id, 1, task.client_id, {"x": torch.ones(1)}, ClientMemory(), 1, 1, 1, "start")


def tasks_of(count: int) -> list[TrainTask]:
    return [TrainTask("", 1, 0, client, (client,), Download({})) for client in range(count)]


def test_work_is_shared_and_handed_on_in_order():
    local, remotes = Local(0.01), [Remote(0.005), Remote(0.02)]
    done = [outcome.client_id for outcome in DeviceClients(local, remotes).train(tasks_of(30))]
    assert done == list(range(30))
    shares = [local.trained, *(remote.trained for remote in remotes)]
    assert sorted(client for share in shares for client in share) == list(range(30))
    assert all(shares)


def test_nobody_works_far_ahead_of_what_is_handed_on():
    """A slow consumer: otherwise a cohort of hundreds would lie finished in memory."""
    local, remote = Local(), Remote()
    outcomes = DeviceClients(local, [remote]).train(tasks_of(50))
    for _ in range(5):
        next(outcomes)
    time.sleep(0.1)
    assert max(remote.trained + local.trained) < 5 + 4
    outcomes.close()


def test_a_lost_worker_gives_its_task_back(capsys):
    remote = Remote(
        faults={client: device_worker.WorkerLostError("the worker of device 1 ended") for client in range(8)}
    )
    pool = DeviceClients(Local(0.01), [remote])
    for _ in range(2):
        assert [outcome.client_id for outcome in pool.train(tasks_of(8))] == list(range(8))
    assert capsys.readouterr().err.count("continuing without it") == 1


def test_what_a_worker_s_thread_says_goes_where_the_messages_of_the_wave_go(capsys):
    lost = {client: device_worker.WorkerLostError("the worker of device 1 ended") for client in range(8)}
    said: list[str] = []
    with collect_lines(said):
        list(DeviceClients(Local(0.01), [Remote(faults=lost)]).train(tasks_of(8)))
    assert said == ["the worker of device 1 ended; continuing without it"]
    assert capsys.readouterr().err == ""


def test_an_error_of_a_worker_ends_the_wave():
    remote = Remote(faults={client: TrainingError("device 1: boom") for client in range(8)})
    with pytest.raises(TrainingError, match="boom"):
        list(DeviceClients(Local(0.01), [remote]).train(tasks_of(8)))


def test_reductions_elsewhere_are_kept_here():
    local = Local(0.01)
    reduction = Reduction(1, 2, 3, 100)
    list(DeviceClients(local, [Remote(reductions=[reduction])]).train(tasks_of(4)))
    assert local.trainer.book.layout.reductions == (reduction,)


@pytest.fixture
def real_worker(options):
    config = TrainConfig.of(**options)
    clients = read_client_files(dict(enumerate(sorted((options["data_path"] / "5").iterdir()))), config)
    bench = make_workbench(config, clients, device="cpu")
    made = []

    def make(gone=MappingProxyType({}), **changes):
        here = {client: replace(file, path=gone.get(client, file.path)) for client, file in clients.items()}
        chosen = config.model_copy(update=changes)
        made.append(device_worker.Worker("cpu", chosen, here, bench.book.layout))
        return made[-1], bench

    yield make
    for each in made:
        each.close()


def task_of(bench, client: int = 0) -> TrainTask:
    zeros = {key: torch.zeros(shape) for key, shape in bench.lora.shapes().items()}
    return TrainTask("", 1, 0, client, (client,), Download(zeros))


def test_a_client_whose_file_is_gone_fails_alone_and_a_killed_worker_is_lost_and_not_waited_for(real_worker, tmp_path):
    process, bench = real_worker(gone={1: tmp_path / "gone.json"})
    shutil.rmtree(tokens_folder(), ignore_errors=True)
    outcome, _ = process.train(task_of(bench, 1), ClientMemory(), bench.book.layout)
    assert isinstance(outcome, ClientFailure)
    assert outcome.kind == "data"
    assert "gone.json: changed or gone since the run began" in outcome.reason
    outcome, _ = process.train(task_of(bench), ClientMemory(), bench.book.layout)
    assert isinstance(outcome, ClientUpdate)
    os.kill(process.process.pid, signal.SIGKILL)
    with pytest.raises(device_worker.WorkerLostError, match=r"device cpu ended \(exit code -9\)"):
        process.train(task_of(bench), ClientMemory(), bench.book.layout)


def test_what_goes_wrong_with_a_worker_itself_is_told_here(real_worker, tmp_path):
    process, bench = real_worker(base_model=str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"device cpu: .*nowhere"):
        process.train(task_of(bench), ClientMemory(), bench.book.layout)


def test_what_the_first_process_said_of_the_base_a_worker_does_not_say_again(options, monkeypatch, capsys):
    answers = []

    class OneTask:
        waiting = iter([pack_task(TrainTask("", 1, 0, 1, (1,), Download({})), ClientMemory(), {"layout": {}})])
        send_bytes = staticmethod(answers.append)

        def recv_bytes(self):
            if (message := next(self.waiting, None)) is None:
                raise EOFError
            return message

    def make(*args, **how):
        say("no shared prefix")
        raise UsageError("no such base")

    monkeypatch.setattr(device_worker.signal, "signal", lambda *given: None)
    monkeypatch.setattr(device_worker, "make_workbench", make)
    device_worker.serve(OneTask(), "cpu", TrainConfig.of(**options), {}, Layout(64, False), torch.get_num_threads())
    assert b"no such base" in answers[0]
    assert capsys.readouterr().err == ""


def test_messages_keep_every_bit_and_every_field():
    state = {"a": torch.tensor([1.0, -0.0, 1e-45]), "b/c": torch.tensor([[1.5]], dtype=torch.bfloat16)}
    task = TrainTask("name", 3, 1, 7, (7, 8), Download(state), accepted=2)
    memory = ClientMemory(None, {"a:step": torch.tensor(4.0)})
    found, kept, more = unpack_task(pack_task(task, memory, {"layout": 1}))
    assert (found.round, found.wave, found.client_id, found.rows_of, found.accepted) == (3, 1, 7, (7, 8), 2)
    for key, value in state.items():
        other = found.download.adapter[key]
        assert other.dtype == value.dtype
        assert torch.equal(other.view(torch.uint8), value.view(torch.uint8))
    assert kept.adapter is None
    assert kept.optimizer["a:step"] == 4.0
    assert more == {"layout": 1}

    update = ClientUpdate("name", 3, 7, None, ClientMemory(state), 5, 6, 7, "start", {"loss": 0.1})
    again, _ = unpack_outcome(pack_outcome(update, {}))
    assert (again.upload, again.metrics, again.num_tokens) == (None, {"loss": 0.1}, 6)
    assert again.memory.adapter.keys() == state.keys()
    failure = ClientFailure(7, "diverged", "no")
    assert unpack_outcome(pack_outcome(failure, {"x": 1})) == (failure, {"x": 1})


def test_an_adapter_that_was_cut_to_a_client_s_rank_travels_as_what_it_is():
    whole = {"l.lora_A.weight": torch.randn(4, 5), "l.lora_B.weight": torch.randn(3, 4)}
    part = cut_rank(whole, 2)
    found, _, _ = unpack_task(pack_task(TrainTask("", 1, 0, 0, (0,), Download(part)), ClientMemory(), {}))
    assert all(torch.equal(found.download.adapter[key], part[key]) for key in whole)
    assert fingerprint(found.download.adapter) == fingerprint(part)


def test_additions_to_the_base_go_to_a_worker_once():
    factors = {"q.lora_A.weight": torch.randn(1, 9), "q.lora_B.weight": torch.randn(8, 1)}
    first = append(BaseDelta(), 1, factors)
    second = append(first, 2, factors, truncation_error=0.25)

    def sent(base, held=None):
        task = TrainTask("name", 3, 0, 7, (7,), Download({"a": torch.ones(1)}, travels=None, base=base))
        return pack_task(task, ClientMemory(), {}, held=held.sha256 if held else None)

    found, _, _ = unpack_task(sent(second))
    assert found.download.travels is None
    assert found.download.base.links == second.links
    assert fingerprint(found.download.base.background) == fingerprint(second.background)
    named = sent(second, held=second)
    assert len(named) < len(sent(second))
    again, _, _ = unpack_task(named, found.download.base)
    assert again.download.base is found.download.base
    with pytest.raises(ValueError, match="never sent"):
        unpack_task(named, first)
    # nothing was added yet, or never will be
    assert unpack_task(sent(BaseDelta()))[0].download.base == BaseDelta()
    assert unpack_task(sent(None), first)[0].download.base is None
