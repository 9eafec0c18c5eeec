import weakref

import pytest
import torch

from fedlora.engines.arriving import ArrivingUpdates
from fedlora.federated.adapters import weighted_mean
from fedlora.types import ClientFailure, ClientMemory, ClientUpdate, Download, TrainTask


def update_of(client: int) -> ClientUpdate:
    state = {"x": torch.full((3,), float(client))}
    metrics = {"loss": 1.0, "num_response_tokens": 5, "update_norm": 1.0}
    return ClientUpdate(f"task {client}", 1, client, state, ClientMemory(), 1 + client, 10, 1, "start", metrics)


class Pool:
    """Answers in the order it is told; `alive` sees which updates are still held by anyone."""

    def __init__(self, order, failing=()):
        self.order, self.failing = order, failing
        self.asked = 0
        self.alive: list[weakref.ref] = []

    def train(self, tasks):
        for client in self.order:
            self.asked += 1
            if client in self.failing:
                yield ClientFailure(client, "diverged", "no")
                continue
            update = update_of(client)
            self.alive.append(weakref.ref(update.upload["x"]))
            yield update
            del update


class Store:
    """Remembers who was kept and which updates were read back."""

    def __init__(self):
        self.kept, self.read = [], []

    def keep_update(self, update, adapter):
        assert update.upload is not None
        self.kept.append(update.client_id)

    def updates(self, round_number, clients):
        self.read.extend(sorted(clients))
        return [update_of(client) for client in sorted(clients)]


def arriving(order, failing=()):
    tasks = [
        TrainTask(f"task {client}", 1, 0, client, (client,), Download({"x": torch.zeros(3)}))
        for client in sorted(order)
    ]
    pool, store = Pool(order, failing), Store()
    return ArrivingUpdates(pool, tasks, store, {"x": (3,)}), pool, store


def ids(updates) -> list[int]:
    return [update.client_id for update in updates]


def test_in_order_nothing_is_read_back_and_one_update_is_held_at_a_time():
    updates, pool, store = arriving([0, 1, 2, 3])
    seen = []
    for update in updates:
        seen.append(update.client_id)
        del update
        assert sum(reference() is not None for reference in pool.alive) <= 1
    assert seen == store.kept == [0, 1, 2, 3]
    assert not store.read


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [1, 0, 3, 2], [2, 0, 1, 3]])
@pytest.mark.parametrize("failing", [(), (0,), (3,), (1, 2), (0, 3)])
def test_whatever_the_order_of_arrival_updates_are_handed_on_by_client_id(order, failing):
    updates, _, store = arriving(order, failing)
    expected = [client for client in range(4) if client not in failing]
    assert ids(updates) == expected == ids(updates.done)
    assert sorted(failure.client_id for failure in updates.failures) == sorted(failing)
    assert sorted(store.kept) == expected


def test_a_second_iteration_comes_from_the_store():
    updates, pool, store = arriving([0, 1, 2])
    first = ids(updates)
    assert ids(updates) == first == store.read
    assert len(updates) == pool.asked == 3


def test_whoever_was_not_asked_for_is_trained_all_the_same():
    for look in (lambda updates: None, lambda updates: next(iter(updates)), len):
        updates, pool, store = arriving([0, 1, 2])
        look(updates)
        updates.finish()
        assert pool.asked == 3
        assert store.kept == [0, 1, 2]
        assert ids(updates.done) == [0, 1, 2]


def test_a_sum_over_arriving_updates_is_the_sum_over_stored_ones():
    updates, _, _ = arriving([2, 0, 1])
    found = [weighted_mean((update.upload, update.num_examples) for update in updates) for _ in range(2)]
    assert torch.equal(found[0]["x"], found[1]["x"])
    assert torch.allclose(found[0]["x"], torch.full((3,), (0 * 1 + 1 * 2 + 2 * 3) / 6))
