"""Dealing rows to clients: laws that hold for every partition, and each one's own shape."""

from __future__ import annotations

import random
from collections import Counter
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config.data import AllocateConfig
from fedlora.errors import UsageError
from fedlora.federated.partition import PARTITIONS, Deal, label_skew, partition_rows

EIGHT = [f"c{number // 50}" for number in range(400)]


def _deal(num_clients: int, seed: int = 1, alpha: float = 0.5, shards_per_client: int = 2) -> Deal:
    return Deal(num_clients, seed, alpha, shards_per_client)


def _mixes(categories: list[str], parts: list[list[int]]) -> list[Counter[str]]:
    return [Counter(categories[row] for row in part) for part in parts]


def test_the_table_and_the_flag_name_the_same_partitions() -> None:
    assert (*PARTITIONS, "column") == get_args(AllocateConfig.model_fields["partition"].annotation)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("num_clients", [1, 3, 8, 16])
def test_every_row_goes_to_exactly_one_client_and_nobody_stays_empty(partition: str, num_clients: int) -> None:
    parts = partition_rows(EIGHT, partition, _deal(num_clients, alpha=0.05))
    assert sorted(row for part in parts for row in part) == list(range(len(EIGHT)))
    assert len(parts) == num_clients
    assert all(parts)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_deal_depends_on_its_seed_alone(partition: str) -> None:
    random.seed(5)
    first = partition_rows(EIGHT, partition, _deal(8))
    random.seed(6)
    assert partition_rows(EIGHT, partition, _deal(8)) == first
    if partition != "category":
        assert partition_rows(EIGHT, partition, _deal(8, seed=2)) != first


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from("abcde"), min_size=1, max_size=60),
    st.integers(1, 12),
    st.sampled_from([1e-6, 0.01, 0.1, 1.0, 100.0, 1e6]),
    st.integers(0, 50),
)
def test_dirichlet_never_leaves_a_client_empty(
    categories: list[str], num_clients: int, alpha: float, seed: int
) -> None:
    deal = _deal(min(num_clients, len(categories)), seed, alpha)
    parts = partition_rows(categories, "dirichlet", deal)
    assert all(parts)
    assert sorted(row for part in parts for row in part) == list(range(len(categories)))


def test_dirichlet_is_more_skewed_the_smaller_alpha_is() -> None:
    skews = [label_skew(EIGHT, partition_rows(EIGHT, "dirichlet", _deal(8, alpha=alpha))) for alpha in (0.1, 1.0, 10.0)]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 2 * skews[2]


@pytest.mark.parametrize("alpha", [0.0, 1e-300, float("inf"), float("nan")])
def test_an_alpha_that_means_nothing_is_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha="):
        partition_rows(EIGHT, "dirichlet", _deal(8, alpha=alpha))


def test_as_many_clients_as_categories_get_one_category_each_in_name_order() -> None:
    categories = ["b", "a", "c", "a", "b"]
    assert partition_rows(categories, "category", _deal(3)) == [[1, 3], [0, 4], [2]]


def test_fewer_clients_get_categories_in_turn() -> None:
    mixes = _mixes(EIGHT, partition_rows(EIGHT, "category", _deal(3)))
    assert [sorted(mix) for mix in mixes] == [["c0", "c3", "c6"], ["c1", "c4", "c7"], ["c2", "c5"]]


def test_a_multiple_of_clients_shares_categories_evenly() -> None:
    mixes = _mixes(EIGHT, partition_rows(EIGHT, "category", _deal(24)))
    assert [list(mix) for mix in mixes] == [[f"c{client % 8}"] for client in range(24)]
    assert {mix.total() for mix in mixes} == {16, 17}


@pytest.mark.parametrize(
    ("partition", "num_clients", "what"),
    [
        ("category", 12, "12 cannot share 8 categories evenly"),
        ("iid", 401, "only 400 training rows"),
        ("dirichlet", 401, "only 400 training rows"),
        ("shards", 201, "402 shards"),
    ],
)
def test_a_deal_that_leaves_someone_empty_is_refused(partition: str, num_clients: int, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        partition_rows(EIGHT, partition, _deal(num_clients))


def test_a_category_with_fewer_rows_than_clients_is_named() -> None:
    with pytest.raises(UsageError, match="3 clients cannot share the 2 rows of category 'rare'"):
        partition_rows(["often"] * 9 + ["rare"] * 2, "category", _deal(6))


def test_iid_gives_equal_sizes_and_little_skew() -> None:
    parts = partition_rows(EIGHT, "iid", _deal(7))
    assert {len(part) for part in parts} == {57, 58}
    assert label_skew(EIGHT, parts) < 0.2


def test_a_client_of_shards_holds_at_most_two_categories_when_shards_do_not_straddle() -> None:
    mixes = _mixes(EIGHT, partition_rows(EIGHT, "shards", _deal(8)))
    assert all(mix.total() == 50 and len(mix) <= 2 for mix in mixes)
    assert any(len(mix) == 2 for mix in mixes)


def test_label_skew_by_hand() -> None:
    categories = ["a", "a", "b", "b"]
    assert label_skew(categories, [[0, 2], [1, 3]]) == 0
    assert label_skew(categories, [[0, 1], [2, 3]]) == pytest.approx(0.5)
    # client 0: a 1, b 0 against 3/4, 1/4 -> 1/4; client 1: a 0, b 1 -> 3/4
    assert label_skew(["a", "a", "a", "b"], [[0, 1, 2], [3]]) == pytest.approx(0.5)
    assert label_skew(["a"] * 3, [[0], [1, 2]]) == 0
