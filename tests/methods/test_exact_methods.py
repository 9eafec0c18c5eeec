"""FedEx-LoRA and FLoRA: the model is the exact mean of the clients' models, whatever they send."""

import math

import pytest
import torch

from fedlora.federated.base_delta import append, dense_key
from fedlora.federated.export import export_model
from fedlora.laws.federation_of_one_round import LAYERS, adapter, close, product, update
from fedlora.methods.fedavg import FedAvg, TrainAndSend
from fedlora.methods.fedex import FedEx
from fedlora.methods.flora import FLora
from fedlora.types import BaseDelta, ClientMemory, RoundContext

ROWS = [5, 2, 9, 1]
S = 0.75
TOLERANCE = 1e-10


def added(base: BaseDelta, layer: str) -> torch.Tensor:
    background, (d_out, d_in) = base.background, LAYERS[layer]
    if dense_key(layer) in background:
        return background[dense_key(layer)]
    if f"{layer}.lora_A.weight" not in background:
        return torch.zeros(d_out, d_in, dtype=torch.float64)
    return product(background, layer)


def model(state, layer: str) -> torch.Tensor:
    """What a state adds to a layer in all."""
    return added(state.base, layer) + S * product(state.adapter, layer)


def mean_product(sent, rows, layer) -> torch.Tensor:
    return S * sum(count * product(one, layer) for one, count in zip(sent, rows, strict=True)) / sum(rows)


def play(strategy, state, sent, rows=None, number: int = 1):
    rows = rows or ROWS[: len(sent)]
    updates = [update(client, one, rows=count) for client, (one, count) in enumerate(zip(sent, rows, strict=True))]
    clients = tuple(range(len(sent)))
    return strategy.aggregate(state, updates, RoundContext(number, 0, clients, clients, seed=7, scaling=S))


@pytest.mark.parametrize("strategy", [FedEx(), FLora()], ids=["fedex", "flora"])
@pytest.mark.parametrize("clients", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_round_gives_the_mean_of_the_clients_models_exactly(strategy, clients, rank):
    """Over wide, tall, square and thin layers, several rounds, unequal weights, a scaling that is not 1."""
    state = strategy.init(adapter(0, rank), range(clients))
    for number in (1, 2, 3, 4):
        before = {layer: added(state.base, layer) for layer in LAYERS}
        sent = [adapter(100 * number + client, rank) for client in range(clients)]
        state = play(strategy, state, sent, number=number)
        for layer in LAYERS:
            fresh = S * product(state.adapter, layer) if isinstance(strategy, FLora) else 0
            expected = before[layer] + mean_product(sent, ROWS[:clients], layer)
            assert torch.allclose(model(state, layer) - fresh, expected, rtol=0, atol=TOLERANCE)
            if isinstance(strategy, FLora):
                assert not fresh.any()


@pytest.mark.parametrize("strategy", [FedEx(), FLora()], ids=["fedex", "flora"])
def test_in_float32_only_rounding_is_lost(strategy):
    state = strategy.init(adapter(0, dtype=torch.float32), range(4))
    expected = dict.fromkeys(LAYERS, 0)
    for number in (1, 2, 3):
        sent = [adapter(100 * number + client, dtype=torch.float32) for client in range(4)]
        state = play(strategy, state, sent, number=number)
        wide = [{key: value.double() for key, value in one.items()} for one in sent]
        for layer in LAYERS:
            kept = 0 if isinstance(strategy, FLora) else S * product(state.adapter, layer).double()
            found = added(state.base, layer)
            assert found.dtype == torch.float32
            whole = expected[layer] + mean_product(wide, ROWS, layer)
            assert torch.allclose(found.double() + kept, whole, rtol=0, atol=1e-5)
            expected[layer] = whole - kept
    assert all(value.dtype == torch.float32 for value in strategy.export(state, S).adapter.values())


def test_fedex_averages_the_factors_as_fedavg_does():
    sent = [adapter(client) for client in range(4)]
    state = play(FedEx(), FedEx().init(adapter(9), range(4)), sent)
    assert close(state.adapter, play(FedAvg(), FedAvg().init(adapter(9), range(4)), sent).adapter, 0.0)


def test_the_drift_of_the_base_is_the_sum_of_all_residuals():
    state = FedEx().init(adapter(9), range(3))
    drift = {layer: torch.zeros(dims, dtype=torch.float64) for layer, dims in LAYERS.items()}
    for number in (1, 2, 3):
        sent = [adapter(10 * number + client) for client in range(3)]
        state = play(FedEx(), state, sent, number=number)
        for layer in LAYERS:
            drift[layer] += mean_product(sent, ROWS[:3], layer) - S * product(state.adapter, layer)
    assert all(torch.allclose(added(state.base, layer), drift[layer], rtol=0, atol=TOLERANCE) for layer in LAYERS)


def test_the_residual_is_the_covariance_of_the_factors_and_of_rank_k_minus_one_times_r():
    sent = [adapter(client) for client in range(3)]
    state = play(FedEx(), FedEx().init(adapter(9), range(3)), sent)
    weights = [count / sum(ROWS[:3]) for count in ROWS[:3]]
    for layer, dims in LAYERS.items():
        mean = {half: state.adapter[f"{layer}.lora_{half}.weight"] for half in "AB"}
        covariance = sum(
            weight * (one[f"{layer}.lora_B.weight"] - mean["B"]) @ (one[f"{layer}.lora_A.weight"] - mean["A"])
            for weight, one in zip(weights, sent, strict=True)
        )
        assert torch.allclose(added(state.base, layer), S * covariance, rtol=0, atol=TOLERANCE)
        assert state.base.links[0].ranks[layer] == FedEx().increment_rank([2, 2, 2], *dims) == min(4, *dims)


@pytest.mark.parametrize("sent", [[adapter(3)], [adapter(3)] * 4], ids=["one client", "equal clients"])
def test_clients_that_agree_add_nothing_in_fedex(sent):
    state = play(FedEx(), FedEx().init(adapter(9), range(4)), sent)
    assert state.base.links == ()
    assert FedEx().increment_rank([2], 5, 9) == 0


@pytest.mark.parametrize("half", ["A", "B"])
def test_one_common_factor_leaves_no_residual(half):
    common = adapter(3)
    shared = {key: value for key, value in common.items() if f".lora_{half}." in key}
    state = play(FedEx(), FedEx().init(common, range(3)), [{**adapter(client), **shared} for client in range(3)])
    assert state.base.links == ()


def test_a_residual_cut_to_its_full_rank_is_whole_and_below_it_lacks_the_small_singular_values():
    sent = [adapter(client) for client in range(3)]
    whole = play(FedEx(), FedEx().init(adapter(9), range(3)), sent)
    lossless = play(FedEx(residual_rank=4), FedEx().init(adapter(9), range(3)), sent)
    assert lossless.base.links[0].truncation_error == 0.0
    cut = play(FedEx(residual_rank=1), FedEx().init(adapter(9), range(3)), sent)
    lost = total = 0.0
    for layer, dims in LAYERS.items():
        assert torch.allclose(added(lossless.base, layer), added(whole.base, layer), rtol=0, atol=TOLERANCE)
        values = torch.linalg.svdvals(added(whole.base, layer))
        error = (added(whole.base, layer) - added(cut.base, layer)).square().sum()
        assert float(error) == pytest.approx(float(values[1:].square().sum()), abs=TOLERANCE)
        lost, total = lost + float(error), total + float(values.square().sum())
        assert FedEx(residual_rank=1).increment_rank([2, 2, 2], *dims) == 1
    assert cut.base.links[0].truncation_error == pytest.approx(math.sqrt(lost / total), abs=TOLERANCE)


def test_flora_weighs_one_factor_only_and_weights_on_both_would_be_seen():
    sent = [adapter(client) for client in range(3)]
    state = play(FLora(), FLora().init(adapter(9), range(3)), sent)
    weights = [count / sum(ROWS[:3]) for count in ROWS[:3]]
    squared = sum(w * w * product(one, "wide") for w, one in zip(weights, sent, strict=True))
    assert torch.allclose(added(state.base, "wide"), mean_product(sent, ROWS[:3], "wide"), rtol=0, atol=TOLERANCE)
    assert not torch.allclose(added(state.base, "wide"), S * squared, atol=1e-2)


def test_flora_stacks_clients_of_different_ranks():
    ranks = [1, 3, 2]
    sent = [adapter(client, rank) for client, rank in enumerate(ranks)]
    state = play(FLora(), FLora().init(adapter(9, 3), range(3)), sent)
    for layer, dims in LAYERS.items():
        assert torch.allclose(added(state.base, layer), mean_product(sent, ROWS[:3], layer), rtol=0, atol=TOLERANCE)
        assert state.base.links[0].ranks[layer] == FLora().increment_rank(ranks, *dims) == 6


def test_flora_begins_every_round_from_another_fresh_adapter_that_is_the_same_for_all_and_need_not_travel():
    strategy = FLora()
    state = strategy.init(adapter(0), range(3))
    starts = []
    for number in (1, 2, 3):
        downloads = [strategy.broadcast(state, client, number) for client in range(3)]
        assert all(one.adapter is downloads[0].adapter and one.travels is None for one in downloads)
        starts.append(downloads[0].adapter)
        state = play(strategy, state, [adapter(client) for client in range(3)], number=number)
    for start in (*starts[1:], state.adapter):
        assert not any(value.any() for key, value in start.items() if ".lora_B." in key)
        assert all(value.any() for key, value in start.items() if ".lora_A." in key)
    assert not close(starts[1], starts[2], 1e-3)
    again = play(strategy, strategy.init(adapter(0), range(3)), [adapter(client) for client in range(3)])
    assert close(again.adapter, starts[1], 0.0)


@pytest.mark.parametrize("strategy", [FedEx(), FLora()], ids=["fedex", "flora"])
def test_the_order_of_clients_and_a_common_factor_of_their_weights_change_nothing(strategy):
    sent, rows = [adapter(client) for client in range(4)], ROWS
    one, other = (
        play(strategy, strategy.init(adapter(9), range(4)), given, counts)
        for given, counts in ((sent, rows), (sent[::-1], [7 * count for count in rows[::-1]]))
    )
    assert all(torch.allclose(model(one, layer), model(other, layer), rtol=0, atol=TOLERANCE) for layer in LAYERS)


@pytest.mark.parametrize("strategy", [FedEx(), FLora()], ids=["fedex", "flora"])
def test_clients_train_on_top_of_what_was_added(strategy):
    state = strategy.init(adapter(0), range(3))
    (phase,) = TrainAndSend().phases(strategy.broadcast(state, 0, 1), ClientMemory())
    assert phase.background is None
    state = play(strategy, state, [adapter(client) for client in range(3)])
    (phase,) = TrainAndSend().phases(strategy.broadcast(state, 0, 2), ClientMemory())
    assert phase.background is state.base.background


@pytest.mark.parametrize("strategy", [FedEx(), FLora()], ids=["fedex", "flora"])
@pytest.mark.parametrize("rounds", [1, 2, 6])
def test_the_exported_adapter_is_the_model_while_its_rank_is_within_the_limit(strategy, rounds):
    state = strategy.init(adapter(0), range(3))
    for number in range(1, rounds + 1):
        state = play(strategy, state, [adapter(10 * number + client) for client in range(3)], number=number)
    export = strategy.export(state, S)
    assert export.relative_error == 0.0
    for layer, (d_out, d_in) in LAYERS.items():
        assert export.adapter[f"{layer}.lora_A.weight"].shape == (export.rank, d_in)
        assert export.adapter[f"{layer}.lora_B.weight"].shape == (d_out, export.rank)
        assert torch.allclose(S * product(export.adapter, layer), model(state, layer), rtol=0, atol=TOLERANCE)
    # no layer needs more ranks than it has outputs or inputs
    assert export.rank <= 6


@pytest.mark.parametrize("rounds", [1, 6], ids=["factors", "dense"])
def test_beyond_the_limit_the_export_is_the_best_of_that_rank_and_tells_what_it_lacks(rounds):
    state = FedEx().init(adapter(0), range(3))
    for number in range(1, rounds + 1):
        state = play(FedEx(), state, [adapter(10 * number + client) for client in range(3)], number=number)
    export = export_model(state.adapter, state.base, scaling=S, most_rank=3)
    assert export.rank == 3
    lost = total = 0.0
    for layer in LAYERS:
        whole = model(state, layer)
        values = torch.linalg.svdvals(whole)
        error = float((S * product(export.adapter, layer) - whole).square().sum())
        assert error == pytest.approx(float(values[3:].square().sum()), rel=1e-6, abs=1e-9)
        lost, total = lost + error, total + float(values.square().sum())
    assert export.relative_error == pytest.approx(math.sqrt(lost / total), rel=1e-6)
    assert export.relative_error > 0.01


def test_before_anything_is_added_the_adapter_itself_is_exported():
    state = FedEx().init(adapter(0), range(3))
    assert FedEx().export(state, S).adapter is state.adapter
    assert FedEx().export(state, S).rank == 2


def test_a_layer_without_additions_is_exported_beside_others():
    base = append(BaseDelta(), 1, {key: value for key, value in adapter(1).items() if key.startswith("wide")})
    export = export_model(adapter(0), base, scaling=S, most_rank=99)
    assert export.rank == 4
    assert torch.allclose(product(export.adapter, "tall"), product(adapter(0), "tall"), rtol=0, atol=TOLERANCE)
