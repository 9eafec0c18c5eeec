"""Server optimizers against the papers' arithmetic, worked out by hand, and against torch's optimizers."""

from dataclasses import replace

import pytest
import torch
from published_values import CHANGES, OPTIONS, PLACES, assert_places, follow

from fedlora.laws.federation_of_one_round import adapter, aggregate, close
from fedlora.methods.choosing import load_method
from fedlora.methods.fedavg import FedAvg
from fedlora.methods.server_adaptive import FedAdagrad, FedAdam, FedYogi
from fedlora.methods.server_momentum import DiLoCo, FedAvgM
from fedlora.types import ServerState


@pytest.mark.parametrize("mode", PLACES)
def test_three_rounds_go_where_the_papers_go(mode):
    assert_places(replace(load_method(mode).server, **OPTIONS[mode]), PLACES[mode])


@pytest.mark.parametrize(
    ("momentum", "nesterov", "kind"), [(0.9, False, FedAvgM), (0.9, True, DiLoCo), (0.3, True, DiLoCo)]
)
def test_momentum_is_torch_s_sgd_on_the_negative_change(momentum, nesterov, kind):
    place = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([place], lr=0.4, momentum=momentum, nesterov=nesterov)
    places = []
    for change in CHANGES:
        place.grad = torch.full_like(place, -change)
        optimizer.step()
        places.append(float(place.detach()))
    assert follow(kind(server_learning_rate=0.4, server_momentum=momentum)) == pytest.approx(places, abs=1e-12)


SERVERS = (FedAvgM(server_momentum=0.0), DiLoCo(server_learning_rate=1.0, server_momentum=0.0))


@pytest.mark.parametrize("strategy", SERVERS, ids=lambda value: type(value).__name__)
def test_without_momentum_the_server_is_fedavg(strategy):
    start = ServerState(adapter(0))
    sent = [adapter(seed) for seed in (1, 2, 3)]
    assert close(aggregate(strategy, start, sent).adapter, aggregate(FedAvg(), start, sent).adapter)


@pytest.mark.parametrize("kind", [FedAdagrad, FedAdam, FedYogi])
def test_an_adaptive_server_with_a_large_tau_is_fedavg(kind):
    start = ServerState(adapter(0))
    sent = [adapter(seed) for seed in (1, 2, 3)]
    # v begins at tau ** 2 and decays from there, so sqrt(v) + tau is about 2 tau
    far = kind(server_learning_rate=2e9, server_tau=1e9, server_beta1=0.0, server_beta2=1 - 1e-12)
    assert close(aggregate(far, start, sent).adapter, aggregate(FedAvg(), start, sent).adapter, 1e-6)


@pytest.mark.parametrize("kind", [FedAvgM, DiLoCo, FedAdagrad, FedAdam, FedYogi])
def test_nobody_s_change_moves_nothing_and_the_sign_of_a_change_is_the_sign_of_the_move(kind):
    start = ServerState(adapter(0))
    assert close(aggregate(kind(), start, [start.adapter] * 3).adapter, start.adapter)
    assert follow(kind())[0] > 0


@pytest.mark.parametrize("kind", [FedAvgM, FedAdagrad, FedAdam, FedYogi])
def test_the_mean_is_weighted_by_rows_and_diloco_s_is_not(kind):
    start = ServerState(adapter(0))
    sent = [adapter(1), adapter(2)]
    heavy = [adapter(1), adapter(1), adapter(1), adapter(2)]
    assert close(aggregate(kind(), start, sent, rows=[3, 1]).adapter, aggregate(kind(), start, heavy).adapter)
    assert close(aggregate(DiLoCo(), start, sent, rows=[3, 1]).adapter, aggregate(DiLoCo(), start, sent).adapter)


def test_diloco_s_mean_is_weighted_by_examples_where_its_server_weights_say_so():
    start, sent = ServerState(adapter(0)), [adapter(1), adapter(2)]
    found = aggregate(DiLoCo(server_weights="examples"), start, sent, rows=[3, 1])
    heavy = aggregate(DiLoCo(), start, [adapter(1), adapter(1), adapter(1), adapter(2)])
    assert close(found.adapter, heavy.adapter)
    assert close(found.slots["momentum"], heavy.slots["momentum"])
    plain = DiLoCo(server_learning_rate=1.0, server_momentum=0.0, server_weights="examples")
    assert close(
        aggregate(plain, start, sent, rows=[3, 1]).adapter, aggregate(FedAvg(), start, sent, rows=[3, 1]).adapter
    )


@pytest.mark.parametrize("kind", [FedAvgM, DiLoCo, FedAdagrad, FedAdam, FedYogi])
def test_without_any_update_the_state_stays(kind):
    state = aggregate(kind(), ServerState(adapter(0)), [adapter(1)])
    assert aggregate(kind(), state, []) is state
