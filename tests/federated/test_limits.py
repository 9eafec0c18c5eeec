import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.federated.adapters import difference_norm, weighted_mean
from fedlora.federated.limits import Limits, cap_counts, clip_update


def state(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 4, generator=draw) * scale, "b": torch.randn(5, 3, generator=draw) * scale}


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 100.0, 1e20])
@pytest.mark.parametrize("longest", [0.5, 3.0, 1e6])
def test_a_clipped_update_has_the_limit_s_norm_and_the_update_s_direction(scale, longest):
    start, moved = state(0), state(1, scale)
    sent = {key: start[key] + moved[key] for key in start}
    clipped, norm = clip_update(start, sent, longest)
    assert norm == difference_norm(sent, start)
    after = difference_norm(clipped, start)
    if norm <= longest:
        assert clipped is sent
        return
    # float32 rounds each value of the result
    assert after == pytest.approx(longest, rel=1e-5, abs=1e-5)
    inner = sum(float(((clipped[k] - start[k]).double() * (sent[k] - start[k]).double()).sum()) for k in start)
    assert inner / (after * norm) == pytest.approx(1.0, abs=1e-5)


def test_limits_take_the_smaller_of_norm_and_ratio():
    assert Limits().longest([1.0]) == math.inf
    assert Limits(norm=2.0).longest([]) == 2.0
    assert Limits(norm_ratio=3.0).longest([1.0, 2.0, 50.0]) == 6.0
    assert Limits(norm=5.0, norm_ratio=3.0).longest([1.0, 2.0, 50.0]) == 5.0


counts = st.dictionaries(st.integers(0, 30), st.integers(1, 10**9), min_size=1, max_size=20)


@given(counts, st.floats(0.01, 1.0))
def test_no_client_has_more_than_its_share_and_no_cap_is_lower_than_it_must_be(given_counts, share):
    capped = cap_counts(given_counts, share)
    total = sum(capped.values())
    assert all(1 <= capped[client] <= count for client, count in given_counts.items())
    if share * len(given_counts) >= 1.000001:
        assert max(capped.values()) <= share * total * (1 + 1e-9)
    lowered = [client for client, count in given_counts.items() if capped[client] < count]
    if lowered:
        # one row more for everybody at the cap would be too many for the largest
        higher = {client: min(count, capped[lowered[0]] + 1) for client, count in given_counts.items()}
        assert max(higher.values()) > share * sum(higher.values())


def test_what_one_of_eight_can_do_is_bounded_by_its_weight_times_the_limit():
    for seed in range(100):
        check_what_one_of_eight_can_do(seed)


def check_what_one_of_eight_can_do(seed):
    start = state(1000)
    honest = [{key: start[key] + value for key, value in state(seed * 8 + k, 0.1).items()} for k in range(7)]
    limits = Limits(norm_ratio=2.0)
    bad = {key: start[key] + value for key, value in state(seed, [-10.0, 1e10][seed % 2]).items()}
    norms = [difference_norm(sent, start) for sent in [*honest, bad]]
    longest = limits.longest(norms)
    clipped = [clip_update(start, sent, longest)[0] for sent in [*honest, bad]]
    withheld = [*clipped[:7], start]
    moved = difference_norm(*(weighted_mean((one, 1.0) for one in group) for group in (clipped, withheld)))
    assert moved <= longest / 8 * (1 + 1e-4), seed
    assert longest <= 2.0 * max(norms[:7]), seed
