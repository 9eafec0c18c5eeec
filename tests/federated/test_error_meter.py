"""The error meter against dense matrices, and at the precision that exact methods have."""

import math

import pytest
import torch

from fedlora.federated.adapters import layer_pairs, pick_half
from fedlora.federated.error_meter import ErrorMeter
from fedlora.federated.measurement import merge_waves
from fedlora.federated.products import norm_of_sum
from fedlora.laws.federation_of_one_round import LAYERS, adapter, context, product, update
from fedlora.methods.choosing import load_method
from fedlora.methods.fedavg import FedAvg
from fedlora.methods.one_factor import FedSvd, FfaLora, RoLora
from fedlora.methods.robust import CoordinateMedian
from fedlora.types import Download, ServerState

SCALE = 0.25


def near(start, seed: int, size: float = 0.1):
    """An adapter a step away from `start`."""
    step = adapter(seed, dtype=next(iter(start.values())).dtype)
    return {key: value + size * step[key] for key, value in start.items()}


def meter_of(start, count: int, **options) -> ErrorMeter:
    downloads = {client: Download(start) for client in range(count)}
    return ErrorMeter(downloads, weight_of=FedAvg().weight_of, scaling=SCALE, **options)


def measure(strategy, start, sent, rows, *, number: int = 1, **options):
    """What the meter says of one round of a strategy, and the global adapter it led to."""
    state = strategy.init(start, range(len(sent)))
    downloads = {client: strategy.broadcast(state, client, number) for client in range(len(sent))}
    meter = ErrorMeter(downloads, weight_of=strategy.weight_of, scaling=SCALE, **options)
    updates = [update(client, one, rows=count) for client, (one, count) in enumerate(zip(sent, rows, strict=True))]
    state = strategy.aggregate(state, meter.watch(updates), context(number, len(sent)))
    made = strategy.global_adapter(state)
    return meter.measure(made), made


def dense(start, ends, weights, made, layers=LAYERS):
    """(error, norms, cosines to the mean, mean pairwise cosine) from whole matrices of some layers, end to end."""

    def flat(state):
        return torch.cat([product(state, layer).flatten() for layer in layers])

    weights = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    products = torch.stack([flat(end) for end in ends])
    changes = SCALE * (products - flat(start))
    total, mean = weights @ products, weights @ changes
    units = changes / changes.norm(dim=1, keepdim=True)
    pairwise = units @ units.T
    count = len(ends)
    return (
        float((total - flat(made)).norm() / total.norm()),
        changes.norm(dim=1).tolist(),
        (units @ (mean / mean.norm())).tolist(),
        float((pairwise.sum() - count) / (count * (count - 1))) if count > 1 else None,
    )


@pytest.mark.parametrize("count", [2, 3, 8, 16])
@pytest.mark.parametrize("size", [1.0, 0.1, 1e-3])
def test_the_numbers_are_those_of_the_dense_matrices(count, size, monkeypatch):
    monkeypatch.setattr("fedlora.federated.measurement._short", lambda value, digits=9: value)
    start, rows = adapter(0), [1 + client % 4 for client in range(count)]
    sent = [near(start, 10 + client, size) for client in range(count)]
    found, made = measure(FedAvg(), start, sent, rows)
    error, norms, cosines, pairwise = dense(start, sent, rows, made)
    assert found.overall["aggregation_error"] == pytest.approx(error, rel=1e-10, abs=1e-14)
    assert found.overall["drift_norm_mean"] == pytest.approx(sum(norms) / count, rel=1e-10)
    assert found.overall["drift_cosine_mean"] == pytest.approx(sum(cosines) / count, rel=1e-10, abs=1e-10)
    assert found.overall["drift_cosine_pairwise"] == pytest.approx(pairwise, rel=1e-10, abs=1e-10)
    for client in range(count):
        assert found.clients[client]["drift_norm"] == pytest.approx(norms[client], rel=1e-10)
        assert found.clients[client]["cosine_to_mean"] == pytest.approx(cosines[client], rel=1e-10, abs=1e-10)
    assert found.layers.keys() == LAYERS.keys()
    for layer, numbers in found.layers.items():
        error, norms, cosines, _ = dense(start, sent, rows, made, [layer])
        assert numbers["error"] == pytest.approx(error, rel=1e-10, abs=1e-14)
        assert numbers["norm"] == pytest.approx(sum(norms) / count, rel=1e-10)
        assert numbers["cosine"] == pytest.approx(sum(cosines) / count, rel=1e-10, abs=1e-10)


# Two QRs, an SVD and three products lie between FedSVD's clients and its factors, and each LAPACK rounds in its own
# way: 6.5e-15 was the most of 100 draws on one machine, where methods that only average stayed below 6e-16.
BOUNDS = {"average": (2e-15, 3e-7), "svd": (1e-14, 3e-7)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("strategy", "half", "number", "way"),
    [
        (FfaLora(), "B", 1, "average"),
        (RoLora(), "B", 1, "average"),
        (RoLora(), "A", 2, "average"),
        (FedSvd(), "B", 1, "svd"),
    ],
)
@pytest.mark.parametrize("count", [2, 16])
def test_exact_methods_stand_at_the_epsilon_of_their_type(strategy, half, number, way, count, dtype):
    bound = BOUNDS[way][dtype == torch.float32]
    start, rows = adapter(0, dtype=dtype), [3 + client for client in range(count)]
    sent = [pick_half(near(start, 5 + client), half) for client in range(count)]
    found, _ = measure(strategy, start, sent, rows, number=number)
    assert 0 <= found.overall["aggregation_error"] < bound
    assert all(layer["error"] < bound for layer in found.layers.values())
    plain, _ = measure(FedAvg(), start, [near(start, 5 + client) for client in range(count)], rows)
    assert plain.overall["aggregation_error"] > 1e-3


def test_equal_clients_and_clients_with_one_a_are_averaged_exactly():
    start = adapter(0)
    same = near(start, 1)
    found, _ = measure(FedAvg(), start, [same] * 5, [1, 2, 3, 4, 5])
    assert found.overall["aggregation_error"] < 1e-15
    assert found.overall["drift_cosine_pairwise"] == pytest.approx(1.0, abs=1e-12)
    assert all(numbers["cosine_to_mean"] == pytest.approx(1.0, abs=1e-12) for numbers in found.clients.values())
    # everybody's A has moved, to the same place
    moved = [{**near(start, client), **pick_half(same, "A")} for client in range(2, 7)]
    assert measure(FedAvg(), start, moved, [1, 2, 3, 4, 5])[0].overall["aggregation_error"] < 2e-15


def test_the_weights_are_those_of_the_strategy():
    start = adapter(0)
    sent, rows = [near(start, seed) for seed in (1, 2, 3)], [1, 1, 50]
    weighted, mean = measure(FedAvg(), start, sent, rows)
    assert weighted.overall["aggregation_error"] == pytest.approx(dense(start, sent, rows, mean)[0], rel=1e-8)
    uniform, median = measure(CoordinateMedian(), start, sent, rows)
    assert uniform.overall["aggregation_error"] == pytest.approx(dense(start, sent, [1, 1, 1], median)[0], rel=1e-8)


@pytest.mark.parametrize("mode", ["fedadam", "diloco", "krum", "geometric_median", "fedavgm"])
def test_what_a_server_makes_of_the_mean_is_part_of_its_error(mode):
    strategy, start = load_method(mode).server, adapter(0)
    sent = [near(start, seed) for seed in range(1, 8)]
    found, made = measure(strategy, start, sent, [2] * 7)
    assert found.overall["aggregation_error"] == pytest.approx(dense(start, sent, [1] * 7, made)[0], rel=1e-8)


def test_of_the_best_truncation_the_error_is_what_was_cut():
    """Eckart-Young: the norm of the singular values behind the rank."""
    start = adapter(0)
    sent, weights = [near(start, seed) for seed in (1, 2, 3)], [0.5, 0.25, 0.25]
    meter = meter_of(start, 3)
    list(
        meter.watch(
            [update(client, one, rows=rows) for client, (one, rows) in enumerate(zip(sent, (2, 1, 1), strict=True))]
        )
    )
    made, cut = {}, {}
    for layer in LAYERS:
        total = sum(weight * product(one, layer) for weight, one in zip(weights, sent, strict=True))
        u, s, vh = torch.linalg.svd(total)
        made[f"{layer}.lora_B.weight"], made[f"{layer}.lora_A.weight"] = u[:, :2] * s[:2], vh[:2]
        cut[layer] = float(s[2:].norm() / s.norm())
    for layer, numbers in meter.measure(made).layers.items():
        assert numbers["error"] == pytest.approx(cut[layer], rel=1e-3, abs=1e-14)


def test_clients_of_other_ranks_and_starts_are_measured_like_dense_matrices():
    starts = [adapter(seed, rank) for seed, rank in ((1, 1), (2, 2), (3, 3))]
    sent = [near_of_rank(start, seed) for seed, start in enumerate(starts, start=4)]
    made = adapter(9, 3)
    downloads = {client: Download(start) for client, start in enumerate(starts)}
    meter = ErrorMeter(downloads, weight_of=FedAvg().weight_of, scaling=SCALE)
    list(meter.watch([update(client, one, rows=client + 1) for client, one in enumerate(sent)]))
    found = meter.measure(made)
    weights = torch.tensor([1, 2, 3], dtype=torch.float64) / 6
    for layer, numbers in found.layers.items():
        products = torch.stack([product(one, layer) for one in sent])
        changes = products - torch.stack([product(one, layer) for one in starts])
        total = torch.einsum("k,kij->ij", weights, products)
        assert numbers["error"] == pytest.approx(float((total - product(made, layer)).norm() / total.norm()), rel=1e-3)
        assert numbers["norm"] == pytest.approx(SCALE * float(changes.flatten(1).norm(dim=1).mean()), rel=1e-3)


def near_of_rank(start, seed: int):
    step = adapter(seed, start["wide.lora_A.weight"].shape[0])
    return {key: value + 0.1 * step[key] for key, value in start.items()}


def test_a_wave_larger_than_what_may_be_held_is_read_again_to_the_same_numbers():
    start = adapter(0)
    sent = [near(start, seed) for seed in range(1, 6)]
    updates = [update(client, one, rows=client + 1) for client, one in enumerate(sent)]
    reads = []

    class Counted(list):
        def __iter__(self):
            reads.append(1)
            return super().__iter__()

    found = []
    for most in (1 << 20, 4 * 5 * 28, 1):
        reads.clear()
        meter = meter_of(start, 5, most_bytes=most)
        made = FedAvg().aggregate(ServerState(start), meter.watch(Counted(updates)), context()).adapter
        found.append((meter.measure(made), len(reads)))
    assert [measurement for measurement, _ in found] == [found[0][0]] * 3
    once, some, every = (count for _, count in found)
    assert once == 1 < some <= every == len(layer_pairs(start))


def test_of_an_update_whose_tensors_are_views_of_a_file_only_the_held_ones_stay_in_memory():
    start = adapter(0)
    sent = []
    for client in range(3):
        state = near(start, client + 1)
        file = torch.cat([value.flatten() for value in state.values()])
        parts = file.split([value.numel() for value in state.values()])
        sent.append({key: part.view(start[key].shape) for key, part in zip(start, parts, strict=True)})
    meter = meter_of(start, 3, most_bytes=1)
    for _ in meter.watch([update(client, one) for client, one in enumerate(sent)]):
        pass
    held = [value for state in meter._held.values() for value in state.values()]
    assert held
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in held)


def test_what_does_not_exist_is_absent():
    start = adapter(0)
    alone, _ = measure(FedAvg(), start, [near(start, 1)], [3])
    assert alone.overall.keys() == {"drift_norm_mean"}
    assert alone.clients[0].keys() == {"drift_norm"}
    assert not alone.layers
    still, _ = measure(FedAvg(), start, [start, near(start, 1)], [1, 1])
    assert still.clients[0] == {"drift_norm": 0.0}
    assert still.clients[1]["cosine_to_mean"] == 1.0
    assert "drift_cosine_pairwise" not in still.overall
    zero = {key: value * (".lora_A." in key) for key, value in start.items()}
    nothing, _ = measure(FedAvg(), zero, [zero, zero], [1, 1])
    assert nothing.overall == {"drift_norm_mean": 0.0}


@pytest.mark.parametrize("mode", ["fedsa", "none"])
def test_where_the_server_knows_no_product_nothing_is_measured(mode):
    strategy, start = load_method(mode).server, adapter(0)
    sent = [pick_half(near(start, 1), "A"), pick_half(near(start, 2), "A")] if mode == "fedsa" else [None, None]
    found, _ = measure(strategy, start, sent, [1, 1])
    assert (found.overall, found.clients, found.record()) == ({}, {}, {})


def test_of_several_waves_only_the_lengths_are_told():
    start = adapter(0)
    waves = [measure(FedAvg(), start, [near(start, seed)], [1])[0] for seed in (1, 2)]
    line, clients = merge_waves([waves[0], type(waves[1])(waves[1].overall, {}, {7: waves[1].clients[0]})])
    assert line.keys() == {"drift_norm_mean"}
    assert line["drift_norm_mean"] == pytest.approx((clients[0]["drift_norm"] + clients[7]["drift_norm"]) / 2, rel=1e-8)
    assert merge_waves([]) == ({}, {})


def test_a_norm_that_cancels_is_as_exact_as_one_that_does_not():
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(1, 3, size, dtype=torch.float64, generator=draw) for size in (7, 5))
    rest = 1e-9 * torch.randn(1, 1, 7, dtype=torch.float64, generator=draw)
    whole_left = torch.cat([left, -left, rest], dim=1)
    whole_right = torch.cat([right, right, right[:, :1]], dim=1)
    expected = float((rest[0].T @ right[0, :1]).norm())
    assert float(norm_of_sum(whole_left, whole_right)) == pytest.approx(expected, rel=1e-5)
    assert float(norm_of_sum(left, right)) == pytest.approx(float((left[0].T @ right[0]).norm()), rel=1e-14)
    assert float(norm_of_sum(left, 0 * right)) == 0.0
    assert math.isfinite(expected)
