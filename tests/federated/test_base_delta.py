"""The chain of what is added to the base: folding, hashes, and what a client that was away has to be sent."""

import pytest
import torch

from fedlora.federated.adapters import fingerprint, shapes_of
from fedlora.federated.base_delta import append, count_held, count_missed, dense_key, is_dense, layer_sizes
from fedlora.laws.federation_of_one_round import LAYERS, adapter
from fedlora.types import BaseDelta

SIZES = layer_sizes(shapes_of(adapter(0)))


def chain(rounds: int, *, dtype=torch.float32, rank: int = 1) -> BaseDelta:
    base = BaseDelta()
    for number in range(1, rounds + 1):
        base = append(base, number, adapter(number, rank, dtype=dtype))
    return base


def dense(background, layer: str) -> torch.Tensor:
    if dense_key(layer) in background:
        return background[dense_key(layer)].double()
    return background[f"{layer}.lora_B.weight"].double() @ background[f"{layer}.lora_A.weight"].double()


def test_the_background_is_the_sum_of_all_increments():
    base = chain(5, dtype=torch.float64)
    for layer in LAYERS:
        parts = [adapter(number, 1) for number in range(1, 6)]
        expected = sum(one[f"{layer}.lora_B.weight"] @ one[f"{layer}.lora_A.weight"] for one in parts)
        assert torch.allclose(dense(base.background, layer), expected, rtol=0, atol=1e-10)


def test_a_layer_becomes_dense_when_its_factors_are_the_larger_and_stays_so():
    seen = set()
    for rounds in range(1, 6):
        background = chain(rounds).background
        for layer, (d_out, d_in) in LAYERS.items():
            expected = rounds * (d_out + d_in) > d_out * d_in
            assert is_dense(rounds, d_out, d_in) == expected == (dense_key(layer) in background)
            assert (f"{layer}.lora_A.weight" in background) != expected
            seen.add(expected)
    assert seen == {True, False}
    held = sum(value.numel() for value in chain(3).background.values())
    assert count_held(chain(3).links, SIZES) == held


def test_who_missed_rounds_folds_the_rest_to_the_same_bytes():
    """A client that was away takes up the increments it lacks, from any point on."""
    whole = chain(6)
    for since in range(6):
        late = chain(since)
        for number in range(since + 1, 7):
            late = append(late, number, adapter(number, 1, dtype=torch.float32))
        assert late.sha256 == whole.sha256
        assert fingerprint(late.background) == fingerprint(whole.background)


def test_the_chain_tells_order_content_and_version_apart():
    one, two = adapter(1), adapter(2)
    found = {
        append(append(BaseDelta(), 1, one), 2, two).sha256,
        append(append(BaseDelta(), 1, two), 2, one).sha256,
        append(append(BaseDelta(), 1, one), 3, two).sha256,
        append(append(BaseDelta(), 1, one), 2, {**two, "wide.lora_A.weight": two["wide.lora_A.weight"] + 1e-9}).sha256,
    }
    assert len(found) == 4
    with pytest.raises(ValueError, match="not after"):
        append(chain(2), 2, one)


def test_an_increment_without_a_factor_changes_nothing_and_layers_may_be_left_out():
    base = chain(2)
    assert append(base, 3, {}) is base
    only = {key: value for key, value in adapter(9).items() if key.startswith("wide")}
    more = append(base, 3, only)
    assert more.links[-1].ranks == {"wide": 2}
    assert torch.equal(dense(more.background, "tall"), dense(base.background, "tall"))


def test_a_client_is_sent_what_it_missed_or_the_whole_where_that_is_smaller():
    links = chain(3).links
    factors = sum(sum(dims) for dims in LAYERS.values())
    assert count_missed(links[:2], SIZES, 2) == factors
    # trained in round 3, so it had what rounds 1 and 2 added
    assert count_missed(links, SIZES, 3) == factors
    assert count_missed(links, SIZES, 4) == 0
    for accepted in (None, 1, 2, 3):
        missed = 3 if accepted is None else 4 - accepted
        expected = sum(
            min(missed * (d_out + d_in), d_out * d_in if is_dense(3, d_out, d_in) else 3 * (d_out + d_in))
            for d_out, d_in in LAYERS.values()
        )
        assert count_missed(links, SIZES, accepted) == expected
    # never more than the layers themselves
    assert count_missed(chain(50).links, SIZES, None) == sum(d_out * d_in for d_out, d_in in LAYERS.values())
