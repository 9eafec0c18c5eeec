import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.federated.adapters import difference_norm, fingerprint, num_bytes, weighted_mean
from fedlora.federated.validation import find_fault


def adapter(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "l.lora_A.weight": torch.randn(4, 6, generator=generator) * scale,
        "l.lora_B.weight": torch.randn(5, 4, generator=generator) * scale,
    }


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_mean_is_numpys_weighted_average_in_float64():
    states, weights = [adapter(seed) for seed in range(5)], [3, 1, 4, 1, 5]
    found = weighted_mean(zip(states, weights, strict=True))
    for key in found:
        stacked = np.stack([state[key].numpy().astype(np.float64) for state in states])
        expected = np.average(stacked, axis=0, weights=weights)
        np.testing.assert_allclose(found[key].numpy(), expected, rtol=1e-7)
        assert found[key].dtype == torch.float32


def test_eight_clients_in_fifty_orders_give_one_result_to_the_last_bit_of_float32():
    states = [adapter(seed, scale=10.0**seed) for seed in range(-3, 5)]
    pairs = list(zip(states, [7, 300, 2, 41, 19, 64, 128, 5], strict=True))
    results = set()
    for turn in range(50):
        random.Random(turn).shuffle(pairs)
        results.add(fingerprint(weighted_mean(pairs)))
    assert len(results) == 1


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=12))
@settings(max_examples=50)
def test_equal_clients_are_a_fixed_point_bit_for_bit(weights):
    state = adapter(1)
    assert equal(weighted_mean((state, weight) for weight in weights), state)


def test_scaling_all_weights_changes_nothing_and_inputs_are_not_mutated():
    states = [adapter(seed) for seed in range(3)]
    before = [fingerprint(state) for state in states]
    first = weighted_mean(zip(states, [1, 2, 3], strict=True))
    assert equal(first, weighted_mean(zip(states, [4, 8, 12], strict=True)))
    assert [fingerprint(state) for state in states] == before


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
def test_a_weight_that_is_not_positive_is_refused(weight):
    with pytest.raises(ValueError, match="not positive"):
        weighted_mean([(adapter(0), weight)])


def test_other_keys_other_shapes_and_nobody_are_refused():
    with pytest.raises(ValueError, match="different keys"):
        weighted_mean([(adapter(0), 1), ({"x": torch.zeros(1)}, 1)])
    scalar = {key: torch.zeros(1) for key in adapter(0)}
    with pytest.raises(ValueError, match="shapes"):
        weighted_mean([(adapter(0), 1), (scalar, 1)])
    assert weighted_mean([]) is None


def test_norm_size_and_fingerprint():
    first, second = adapter(1), adapter(2)
    flat = torch.cat([(first[key] - second[key]).flatten().double() for key in first])
    assert difference_norm(first, second) == pytest.approx(float(flat.norm()), rel=1e-6)
    assert num_bytes(first) == 4 * (4 * 6 + 5 * 4)
    assert num_bytes(None) == 0
    assert fingerprint(first) == fingerprint(dict(reversed(first.items())))
    assert fingerprint(first) != fingerprint({**first, "l.lora_A.weight": first["l.lora_A.weight"] + 1e-6})


@given(st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 23))
def test_one_number_that_is_not_finite_is_found_wherever_it_stands(value, position):
    shapes = {key: tuple(tensor.shape) for key, tensor in adapter(0).items()}
    state = adapter(0)
    assert find_fault(state, shapes) is None
    state["l.lora_A.weight"].view(-1)[position] = value
    assert find_fault(state, shapes) == "non-finite tensor l.lora_A.weight"


def test_values_so_large_that_their_sum_overflows_are_finite_all_the_same():
    state = {key: torch.full_like(value, 3e38) for key, value in adapter(0).items()}
    assert not math.isfinite(float(state["l.lora_A.weight"].sum()))
    assert find_fault(state, {key: tuple(value.shape) for key, value in state.items()}) is None


def test_an_update_that_would_broadcast_is_found():
    shapes = {key: tuple(tensor.shape) for key, tensor in adapter(0).items()}
    for shape in ((1, 6), (6,), (), (6, 4), (0, 6), (1, 4, 6)):
        fault = find_fault({**adapter(0), "l.lora_A.weight": torch.zeros(shape)}, shapes)
        assert fault is not None
        assert "shape" in fault


def test_the_norm_of_an_update_does_not_depend_on_the_order_of_its_keys():
    generator = torch.Generator().manual_seed(0)
    after = {f"key{number}": torch.randn(7, 3, generator=generator) * 10**number for number in range(-4, 5)}
    before = {key: torch.zeros_like(value) for key, value in after.items()}
    orders = [sorted(after, key=lambda key, turn=turn: hash((turn, key))) for turn in range(20)]
    assert len({difference_norm({key: after[key] for key in order}, before) for order in orders}) == 1
