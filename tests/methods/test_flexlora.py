"""FlexLoRA's SVD of a mean of products, against the dense one."""

import math

import pytest
import torch

from fedlora.federated.adapters import shapes_of
from fedlora.federated.ranks import cut_rank, rank_of_adapter
from fedlora.laws.federation_of_one_round import LAYERS, adapter, aggregate, close, product
from fedlora.methods.fedavg import FedAvg
from fedlora.methods.flexlora import FlexLora, decompose_mean, truncation_error
from fedlora.types import ServerState

ROWS = [5, 2, 9]


def clients(*ranks: int) -> list:
    return [adapter(20 + index, rank) for index, rank in enumerate(ranks)]


def dense_mean(states, rows, layer: str) -> torch.Tensor:
    return sum(count * product(state, layer) for state, count in zip(states, rows, strict=True)) / sum(rows)


def truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("ranks", [(1, 2, 3), (4, 4, 4), (6, 1, 9)])
def test_singular_values_are_those_of_the_dense_mean(ranks):
    states = clients(*ranks)
    found = decompose_mean(zip(states, ROWS, strict=True))
    for layer in LAYERS:
        expected = torch.linalg.svdvals(dense_mean(states, ROWS, layer))
        values = found[layer].s
        assert torch.allclose(values[: len(expected)], expected[: len(values)], atol=1e-12)
        svd = found[layer]
        assert torch.allclose((svd.u * svd.s) @ svd.vh, dense_mean(states, ROWS, layer), atol=1e-12)


@pytest.mark.parametrize("split", ["b", "balanced"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_global_adapter_is_the_best_of_its_rank_and_so_is_every_client_s_part(split, dtype):
    ranks = (1, 2, 3)
    sent = [{key: value.to(dtype) for key, value in state.items()} for state in clients(*ranks)]
    server = FlexLora(ranks, svd_split=split)
    state = aggregate(server, ServerState(adapter(0, 3, dtype=dtype)), sent, ROWS)
    assert {value.dtype for value in state.adapter.values()} == {dtype}
    assert rank_of_adapter(state.adapter) == 3
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for layer in LAYERS:
        whole = dense_mean(clients(*ranks), ROWS, layer)
        for client, rank in enumerate(ranks):
            part = server.broadcast(state, client, 2).adapter
            assert rank_of_adapter(part) == rank
            assert torch.allclose(product(part, layer).double(), truncated(whole, rank), atol=tolerance)


def test_what_is_cut_is_the_tail_of_the_singular_values_and_is_noted():
    states = clients(3, 3, 3)
    state = aggregate(FlexLora(), ServerState(adapter(0, 2)), states, ROWS)
    cut = whole = 0.0
    for layer in LAYERS:
        dense = dense_mean(states, ROWS, layer)
        values = torch.linalg.svdvals(dense)
        error = float((dense - product(state.adapter, layer)).square().sum())
        assert error == pytest.approx(float(values[2:].square().sum()), abs=1e-12)
        cut, whole = cut + error, whole + float(dense.square().sum())
    assert state.notes["truncation_error"] == pytest.approx(math.sqrt(cut / whole), rel=1e-10)
    assert state.notes["truncation_error"] > 0.05


def test_no_other_adapter_of_the_rank_is_nearer():
    states = clients(2, 2, 2)
    found = aggregate(FlexLora(), ServerState(adapter(0, 2)), states, ROWS).adapter
    fedavg = aggregate(FedAvg(), ServerState(adapter(0, 2)), states, ROWS).adapter
    for layer in LAYERS:
        dense = dense_mean(states, ROWS, layer)
        best = float((dense - product(found, layer)).norm())
        for other in (fedavg, *states):
            assert best <= float((dense - product(other, layer)).norm()) + 1e-12


def test_ranks_that_add_up_to_the_largest_are_exact_and_padding_is_not_asked_for():
    states = clients(1, 2, 1)
    state = aggregate(FlexLora((1, 2, 1)), ServerState(adapter(0, 4)), states, ROWS)
    for layer in LAYERS:
        assert torch.allclose(product(state.adapter, layer), dense_mean(states, ROWS, layer), atol=1e-10)
    assert state.notes["truncation_error"] < 1e-12


@pytest.mark.parametrize("split", ["b", "balanced"])
def test_directions_without_a_singular_value_keep_their_a_so_that_they_can_learn(split):
    start = adapter(0, 4)
    state = aggregate(FlexLora(svd_split=split), ServerState(start), clients(1, 1), [1, 3])
    for layer in LAYERS:
        a, b = state.adapter[f"{layer}.lora_A.weight"], state.adapter[f"{layer}.lora_B.weight"]
        assert torch.equal(a[2:], start[f"{layer}.lora_A.weight"][2:])
        assert not bool(b[:, 2:].any())
        assert bool(a.abs().sum(dim=1).min() > 0)


def test_a_round_in_which_nobody_learned_anything_leaves_a_as_it_was():
    fresh = {key: value * (".lora_A." in key) for key, value in adapter(0, 3).items()}
    state = aggregate(FlexLora(), ServerState(fresh), [cut_rank(fresh, rank) for rank in (1, 2, 3)], ROWS)
    assert close(state.adapter, fresh, 0.0)
    assert state.notes == {"truncation_error": 0.0}


def test_the_splits_put_the_sizes_where_they_say():
    states = clients(2, 2, 2)
    for split in ("b", "balanced"):
        found = aggregate(FlexLora(svd_split=split), ServerState(adapter(0, 2)), states, ROWS).adapter
        for layer in LAYERS:
            a, b = found[f"{layer}.lora_A.weight"], found[f"{layer}.lora_B.weight"]
            sizes = torch.linalg.svdvals(dense_mean(states, ROWS, layer))[:2]
            rows = torch.ones(2, dtype=torch.float64) if split == "b" else sizes
            assert torch.allclose(a @ a.T, torch.diag(rows), atol=1e-10)
            assert torch.allclose(b.T @ b, torch.diag(sizes.square() / rows), atol=1e-10)


def test_signs_are_fixed_and_the_order_of_equal_clients_changes_no_product():
    states = clients(2, 2, 2)
    flipped = [{key: -value for key, value in state.items()} for state in states]
    one, other = (aggregate(FlexLora(), ServerState(adapter(0, 2)), sent, ROWS).adapter for sent in (states, flipped))
    assert close(one, other, 1e-10)
    back = aggregate(FlexLora(), ServerState(adapter(0, 2)), states[::-1], ROWS[::-1]).adapter
    assert close(one, back, 1e-10)
    assert shapes_of(one) == shapes_of(adapter(0, 2))


def test_one_client_gets_its_own_product_back():
    (state,) = clients(2)
    found = aggregate(FlexLora(), ServerState(adapter(0, 2)), [state]).adapter
    for layer in LAYERS:
        assert torch.allclose(product(found, layer), product(state, layer), atol=1e-10)


def test_the_error_of_nothing_is_zero_and_of_everything_one():
    values = {"a": torch.tensor([4.0, 3.0]), "b": torch.tensor([0.0])}
    assert truncation_error(values, 1) == pytest.approx(0.6)
    assert (truncation_error(values, 2), truncation_error(values, 0)) == (0.0, 1.0)
    assert truncation_error({"b": torch.zeros(2)}, 1) == 0.0
