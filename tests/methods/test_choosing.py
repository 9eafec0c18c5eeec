"""Laws over the whole table of modes, with clients that need no language model."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.config.train import TrainConfig
from fedlora.engines.rounds import FederatedRun
from fedlora.errors import TrainingError
from fedlora.federated.adapters import fingerprint, pick_half
from fedlora.methods.choosing import choose_method, load_method
from fedlora.methods.table import METHODS
from fedlora.types import ClientFailure, ClientId, ClientMemory, ClientUpdate, LocalResult, TrainTask

START = {"l.lora_A.weight": torch.arange(6.0).view(2, 3), "l.lora_B.weight": torch.zeros(4, 2)}


def amounts_of(mode: str) -> dict[int, float]:
    """What each client moves by; Krum needs five of them."""
    amounts = (0.1, 0.7, -1.3, 0.01, 0.4, 0.2)
    return dict(enumerate(amounts if "krum" in mode else amounts[:4]))


class MemoryStore:
    """Keeps updates in memory and remembers what was committed."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, ClientId], ClientUpdate] = {}
        self.committed: list[tuple[int, Any, dict[str, Any]]] = []
        self.carried: list[tuple[int, ClientId, int]] = []

    def begin_round(self, round_number: int) -> None:
        pass

    def keep_update(self, update: ClientUpdate, adapter) -> None:
        self.kept[update.round, update.client_id] = update

    def updates(self, round_number: int, clients: Sequence[ClientId]) -> list[ClientUpdate]:
        return [self.kept[round_number, client] for client in sorted(clients)]

    def read_memory(self, client_id: ClientId, accepted: int | None) -> ClientMemory:
        return self.kept[accepted, client_id].memory if accepted is not None else ClientMemory()

    def find_kept(self, round_number: int, client_id: ClientId) -> None:
        return None

    def carry_forward(self, round_number: int, client_id: ClientId, accepted: int) -> None:
        self.carried.append((round_number, client_id, accepted))

    def commit_round(self, round_number: int, global_adapter: Any, state: Any, facts: Any) -> Path:
        self.committed.append((round_number, global_adapter, dict(facts)))
        return Path(str(round_number))


class FakeClients:
    """Client k moves every value by its own amount, times the rows it trains on; some fail in some rounds."""

    def __init__(self, mode: str, store: MemoryStore, *, amounts: dict[int, float], reverse=False, failing=()) -> None:
        self.rule, self.store, self.amounts = load_method(mode).client, store, amounts
        self.reverse, self.failing = reverse, set(failing)
        self.tasks: list[TrainTask] = []

    def clients(self) -> Sequence[ClientId]:
        return list(self.amounts)

    def train(self, tasks: Sequence[TrainTask]) -> Iterator[ClientUpdate | ClientFailure]:
        for task in reversed(tasks) if self.reverse else tasks:
            self.tasks.append(task)
            if (task.round, task.client_id) in self.failing:
                yield ClientFailure(task.client_id, "diverged", "planned")
                continue
            memory = self.store.read_memory(task.client_id, task.accepted)
            phases = self.rule.phases(task.download, memory)
            move = sum(self.amounts[client] for client in task.rows_of)
            results = []
            for phase in phases:
                trained = {key: value + move for key, value in phase.start.items()}
                trained = {**phase.start, **pick_half(trained, phase.trainable)}
                results.append(LocalResult(trained, {key: value * 0 + move for key, value in trained.items()}))
            upload, memory = self.rule.upload(results, task.download, memory)
            metrics = {"loss": 1.0, "num_response_tokens": 5, "update_norm": 1.0}
            yield ClientUpdate(
                task.id,
                task.round,
                task.client_id,
                upload.adapter if upload else None,
                memory,
                10 + task.client_id % 3,
                5,
                2,
                fingerprint(phases[0].start),
                metrics,
                upload.extra if upload else {},
            )


def run_mode(mode: str, *, rounds=3, amounts=None, reverse=False, failing=(), **changes):
    store = MemoryStore()
    pool = FakeClients(mode, store, amounts=amounts or amounts_of(mode), reverse=reverse, failing=failing)
    options = {"client_selection_frac": 1.0, "num_communication_rounds": rounds, **changes}
    config = TrainConfig.of(federation_mode=mode, **options)
    results = list(FederatedRun(choose_method(config), pool, store, config, START).rounds())
    return store, pool, results


def final(mode: str, **options) -> list[str]:
    """Fingerprints of what a run leaves: the global adapter, or every client's."""
    store, pool, results = run_mode(mode, **options)
    last = results[-1].global_adapter
    if last is not None:
        base = results[-1].base
        return [fingerprint(last), *([str(base.sha256), fingerprint(base.background)] if base else [])]
    return [fingerprint(store.kept[3, client].memory.adapter) for client in pool.clients()]


def test_the_order_in_which_clients_answer_changes_no_bit():
    assert not [mode for mode in METHODS if final(mode) != final(mode, reverse=True)]


def test_inputs_are_not_mutated():
    before = fingerprint(START)
    for mode in METHODS:
        final(mode)
        assert fingerprint(START) == before, mode


@pytest.mark.parametrize("mode", ["homo", "seq", "pooled"])
def test_updates_that_change_nothing_are_a_fixed_point(mode):
    assert final(mode, amounts={0: 0.0, 1: 0.0, 2: 0.0}) == [fingerprint(START)]


def test_homo_of_one_client_is_seq_of_one_client_is_that_client_alone():
    assert final("homo", amounts={0: 0.3}) == final("seq", amounts={0: 0.3}) == final("none", amounts={0: 0.3})


def test_homo_is_the_mean_weighted_by_examples():
    _, _, results = run_mode("homo", rounds=1, amounts={0: 1.0, 1: 4.0})
    moved = results[0].global_adapter["l.lora_B.weight"][0, 0]
    assert float(moved) == pytest.approx((10 * 1.0 + 11 * 4.0) / 21)


def test_seq_passes_the_adapter_on_in_client_order_and_each_hop_names_what_it_started_from():
    store, pool, _ = run_mode("seq", rounds=2)
    assert [task.client_id for task in pool.tasks] == [0, 1, 2, 3] * 2
    assert [task.wave for task in pool.tasks] == [0, 1, 2, 3] * 2
    for before, after in ((0, 1), (1, 2), (2, 3)):
        assert store.kept[1, after].started_from == fingerprint(store.kept[1, before].upload)
    assert store.kept[2, 0].started_from == fingerprint(store.kept[1, 3].upload)


def test_seq_can_shuffle_and_the_round_decides_the_order():
    _, pool, _ = run_mode("seq", rounds=6, seq_order="shuffled")
    orders = [tuple(task.client_id for task in pool.tasks[start : start + 4]) for start in range(0, 24, 4)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(set(orders)) > 1
    _, again, _ = run_mode("seq", rounds=6, seq_order="shuffled")
    assert [task.client_id for task in again.tasks] == [task.client_id for task in pool.tasks]


def test_none_shares_nothing_and_everyone_goes_on_from_its_own_adapter():
    store, _, results = run_mode("none", amounts={0: 0.5, 1: -2.0})
    assert [result.global_adapter for result in results] == [None] * 3
    assert all(update.upload is None for update in store.kept.values())
    for client, amount in ((0, 0.5), (1, -2.0)):
        value = store.kept[3, client].memory.adapter["l.lora_B.weight"][0, 0]
        assert float(value) == pytest.approx(3 * amount)


def test_none_carries_absent_clients_forward_from_their_last_round():
    store, pool, _ = run_mode("none", rounds=6, client_selection_frac=0.5)
    latest: dict[int, int] = {}
    for number in range(1, 7):
        cohort = {task.client_id for task in pool.tasks if task.round == number}
        carried = {client: accepted for at, client, accepted in store.carried if at == number}
        assert carried == {client: accepted for client, accepted in latest.items() if client not in cohort}
        latest |= dict.fromkeys(cohort, number)


def test_pooled_trains_once_on_the_rows_of_the_whole_cohort():
    _, pool, _ = run_mode("pooled", rounds=4, client_selection_frac=0.5)
    _, homo, _ = run_mode("homo", rounds=4, client_selection_frac=0.5)
    for number, task in enumerate(pool.tasks, start=1):
        assert task.rows_of == tuple(other.client_id for other in homo.tasks if other.round == number)


@pytest.mark.parametrize("mode", ["homo", "seq", "none"])
def test_a_failed_client_leaves_its_round_and_the_others_are_as_if_it_were_not_there(mode):
    store, _, results = run_mode(mode, rounds=1, failing=[(1, 2)])
    without = run_mode(mode, rounds=1, amounts={0: 0.1, 1: 0.7, 3: 0.01})
    assert [failure.client_id for failure in results[0].failures] == [2]
    assert store.committed[0][2]["quarantined"] == [{"client_id": 2, "kind": "diverged", "reason": "planned"}]
    for client in (0, 1, 3):
        kept, other = store.kept[1, client], without[0].kept[1, client]
        assert fingerprint(kept.upload or kept.memory.adapter) == fingerprint(other.upload or other.memory.adapter)
    if mode != "none":
        assert fingerprint(results[0].global_adapter) == fingerprint(without[2][0].global_adapter)


def test_a_failed_client_of_none_goes_on_from_its_last_accepted_round():
    store, pool, _ = run_mode("none", failing=[(2, 1)])
    assert [task.accepted for task in pool.tasks if task.client_id == 1] == [None, 1, 1]
    assert (2, 1, 1) in store.carried
    assert float(store.kept[3, 1].memory.adapter["l.lora_B.weight"][0, 0]) == pytest.approx(1.4)


def test_a_round_in_which_everybody_fails_ends_the_run_and_commits_nothing():
    store = MemoryStore()
    pool = FakeClients("homo", store, amounts={0: 1.0, 1: 1.0}, failing=[(2, 0), (2, 1)])
    config = TrainConfig.of(federation_mode="homo", client_selection_frac=1.0, num_communication_rounds=3)
    with pytest.raises(TrainingError, match="round 2: no client gave a usable update: client 0: planned"):
        list(FederatedRun(load_method("homo"), pool, store, config, START).rounds())
    assert [number for number, *_ in store.committed] == [1]


def test_every_mode_gets_the_same_cohorts():
    ten = {client: 0.1 * client - 0.3 for client in range(10)}
    cohorts = {}
    for mode in METHODS:
        store, _, _ = run_mode(mode, rounds=5, client_selection_frac=0.5, amounts=ten)
        # the last round of `finetune` is for everybody
        cohorts[mode] = [facts["cohort"] for *_, facts in store.committed][: 4 if mode == "finetune" else 5]
    assert not [mode for mode, found in cohorts.items() if found != cohorts["homo"][: len(found)]]


def test_a_task_names_the_base_it_is_to_be_trained_on():
    """FLoRA's fresh adapter is the same whatever was sent; the base beneath it is not."""
    one, other = (run_mode("flora", amounts=amounts)[1].tasks for amounts in ({0: 0.1, 1: 0.7}, {0: 0.1, 1: 0.9}))
    same = [first.id == second.id for first, second in zip(one, other, strict=True)]
    assert same == [True, True, False, False, False, False]
    assert fingerprint(one[2].download.adapter) == fingerprint(other[2].download.adapter)
