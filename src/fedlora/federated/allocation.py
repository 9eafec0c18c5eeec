"""From the rows of one file to test rows and clients: one row per prompt, drawn by the seed, then dealt out.

Test rows are drawn from each category, so that they do not depend on how the others are dealt out. Where a column names
the clients, they are drawn from each client's rows instead, and a client keeps as many rows as it has.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlora.config.data import AllocateConfig
from fedlora.errors import DataError
from fedlora.federated.partition import Deal, label_skew, partition_rows
from fedlora.plain_text import natural_key
from fedlora.rows import Row
from fedlora.seeds import derive_seed


@dataclass(frozen=True)
class Cleaned:
    """The rows that are left, one per prompt, and what was left out."""

    rows: Sequence[Row]
    num_empty: int
    num_duplicates: int
    num_other_category: int


@dataclass(frozen=True)
class Allocation:
    """The test rows and each client's rows, with the label skew of the deal."""

    test: Sequence[Row]
    clients: Sequence[Sequence[Row]]
    label_skew: float
    values: Sequence[str] = ()
    """The value of each client's rows in the column that divides them, where one does."""
    num_untested: int = 0
    """Clients of such a column that have one row and so no test row."""


def clean_rows(rows: Sequence[Row]) -> Cleaned:
    """Leave out rows without an answer, then all but the first row of every prompt.

    A row that is the beginning of a longer conversation is left out as its duplicate: the two might be divided.
    """
    answered = [row for row in rows if row.output.strip()]
    beginnings = {prompt for row in answered for prompt in row.earlier_prompts}
    first: dict[tuple[str, ...], Row] = {}
    other_category = 0
    for row in answered:
        if row.prompt in beginnings:
            continue
        kept = first.setdefault(row.prompt, row)
        other_category += kept.category != row.category
    return Cleaned(
        rows=tuple(first.values()),
        num_empty=len(rows) - len(answered),
        num_duplicates=len(answered) - len(first),
        num_other_category=other_category,
    )


def allocate_rows(rows: Sequence[Row], config: AllocateConfig) -> Allocation:
    """Per category in name order: shuffle, the first rows to the test set, the next to the clients.

    DataError names every category with too few rows.
    """
    if config.partition == "column":
        return _allocate_by_value(rows, config)
    groups: dict[str, list[Row]] = {category: [] for category in sorted({row.category for row in rows})}
    for row in rows:
        groups[row.category].append(row)
    sizes = {category: _sizes(len(group), config) for category, group in groups.items()}
    if small := [name for name, (test, train) in sizes.items() if len(groups[name]) < test + train]:
        shown = ", ".join(f"{name or '(none)'} ({len(groups[name])})" for name in small)
        if config.test_share is not None:
            raise DataError(f"{config.input_file}: a single prompt cannot be split: {shown}", hint="add rows")
        raise DataError(
            f"{config.input_file}: too few distinct prompts for {config.test_per_cat} test and "
            f"{config.train_per_cat} training rows per category: {shown}",
            hint="give --test_share 0.1 to use every row, lower train_per_cat or test_per_cat, or add rows",
        )
    test, parts = _draw(groups, sizes, config.seed)
    pool = list(itertools.chain.from_iterable(parts))
    deal = Deal(config.num_clients or len(groups), config.seed, config.alpha, config.shards_per_client)
    categories = [row.category for row in pool]
    dealt = partition_rows(categories, config.partition, deal)
    return Allocation(test, [[pool[number] for number in part] for part in dealt], label_skew(categories, dealt))


def _allocate_by_value(rows: Sequence[Row], config: AllocateConfig) -> Allocation:
    """One client per value of a column, in the values' natural order; a single row of a value trains."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: natural_key(row.more[config.by])):
        groups.setdefault(row.more[config.by], []).append(row)
    if len(groups) < 2:
        found = f"only the value {next(iter(groups))!r}" if groups else "no value"
        raise DataError(
            f"{config.input_file}: {found} in the column {config.by!r}: a federation has at least two clients",
            hint="choose another column with --by, or another --partition",
        )
    sizes = {value: _sizes(len(group), config) if len(group) > 1 else (0, 1) for value, group in groups.items()}
    if not any(test for test, _ in sizes.values()):
        raise DataError(
            f"{config.input_file}: every value of the column {config.by!r} has a single row: none is left for testing",
            hint="choose a column with fewer values",
        )
    test, clients = _draw(groups, sizes, config.seed)
    categories = [row.category for part in clients for row in part]
    numbers = itertools.count()
    skew = label_skew(categories, [[next(numbers) for _ in part] for part in clients])
    return Allocation(test, clients, skew, tuple(groups), sum(test == 0 for test, _ in sizes.values()))


def _draw(
    groups: Mapping[str, list[Row]], sizes: Mapping[str, tuple[int, int]], seed: int
) -> tuple[list[Row], list[list[Row]]]:
    """The test rows of all groups, and the training rows of each."""
    test: list[Row] = []
    training: list[list[Row]] = []
    for name, group in groups.items():
        random.Random(derive_seed(seed, f"allocate/{name}")).shuffle(group)  # noqa: S311
        num_test, num_train = sizes[name]
        test += group[:num_test]
        training.append(group[num_test : num_test + num_train])
    return test, training


def _sizes(num_rows: int, config: AllocateConfig) -> tuple[int, int]:
    """Rows of a category for the test set and for training; of a share at least one each."""
    if config.test_share is None:
        return config.test_per_cat, config.train_per_cat
    test = max(1, round(config.test_share * num_rows))
    return test, max(1, num_rows - test)
