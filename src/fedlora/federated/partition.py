"""Who holds which training rows: four ways to deal them out, and a number for how skewed a deal is.

Everything works on the rows' categories and returns row numbers; the rows themselves never come here.
Every client ends with at least one row. Draws come from `random.Random` under a derived seed, so a deal
is the same in every process. `dirichlet` follows Li et al. 2021, "Federated Learning on Non-IID Data
Silos" (a draw over clients for each category); `shards` follows McMahan et al. 2017.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedlora.errors import UsageError
from fedlora.plain_text import counted
from fedlora.seeds import derive_seed

Parts = list[list[int]]
"""Per client, the numbers of its rows."""

_MIN_ALPHA, _MAX_ALPHA = 1e-6, 1e6


@dataclass(frozen=True)
class Deal:
    """How to deal: `alpha` matters to dirichlet only, `shards_per_client` to shards only."""

    num_clients: int
    seed: int
    alpha: float = 0.5
    shards_per_client: int = 2

    def generator(self, purpose: str) -> random.Random:
        return random.Random(derive_seed(self.seed, f"partition/{purpose}"))  # noqa: S311


def partition_rows(categories: Sequence[str], partition: str, deal: Deal) -> Parts:
    """Deal row i of category `categories[i]` to a client, for every i: each row goes to exactly one.

    `partition` is a key of PARTITIONS. UsageError when some client would stay without a row.
    """
    if deal.num_clients > len(categories):
        raise UsageError(
            f"num_clients={deal.num_clients}, but there are only {len(categories)} training rows",
            hint="every client needs a row: fewer clients, or a larger train_per_cat",
        )
    return PARTITIONS[partition](categories, deal)


def label_skew(categories: Sequence[str], parts: Parts) -> float:
    """How far clients are from the pool: 0 is the pool's own mix everywhere, near 1 is one rare category each.

    The mean over clients, each counting once, of the total variation distance
    `1/2 * sum_c |p_client(c) - p_pool(c)|` between the client's category shares and the pool's. All clients hold rows.
    """
    pool = _shares([row for part in parts for row in part], categories)
    distances = []
    for part in parts:
        shares = _shares(part, categories)
        distances.append(math.fsum(abs(shares.get(name, 0.0) - share) for name, share in pool.items()) / 2)
    return math.fsum(distances) / len(distances)


def _shares(rows: Sequence[int], categories: Sequence[str]) -> dict[str, float]:
    counts = Counter(categories[row] for row in rows)
    return {name: counts[name] / len(rows) for name in sorted(counts)}


def _rows_by_category(categories: Sequence[str]) -> list[list[int]]:
    """Row numbers of each category, categories in name order, rows in the order given."""
    return [[row for row, name in enumerate(categories) if name == wanted] for wanted in sorted(set(categories))]


def _by_category(categories: Sequence[str], deal: Deal) -> Parts:
    """Category j and client i belong together when they agree modulo the smaller of the two counts.

    So one each when the counts are equal; with fewer clients a client holds several categories; with a
    multiple of clients several share a category, row by row in turn.
    """
    groups = _rows_by_category(categories)
    if deal.num_clients > len(groups) and deal.num_clients % len(groups):
        raise UsageError(
            f"num_clients={deal.num_clients} cannot share {counted(len(groups), 'category')} evenly",
            hint=f"use at most {counted(len(groups), 'client')} or a multiple of {len(groups)}, or another partition",
        )
    parts: Parts = [[] for _ in range(deal.num_clients)]
    for number, group in enumerate(groups):
        owners = range(number % deal.num_clients, deal.num_clients, len(groups))
        if len(owners) > len(group):
            raise UsageError(
                f"{counted(len(owners), 'client')} cannot share the {counted(len(group), 'row')} of "
                f"category {categories[group[0]]!r}",
                hint="use fewer clients or a larger train_per_cat",
            )
        for turn, row in enumerate(group):
            parts[owners[turn % len(owners)]].append(row)
    return parts


def _iid(categories: Sequence[str], deal: Deal) -> Parts:
    """All rows shuffled, then dealt in turn: sizes differ by one at most."""
    rows = list(range(len(categories)))
    deal.generator("iid").shuffle(rows)
    return [rows[client :: deal.num_clients] for client in range(deal.num_clients)]


def _dirichlet(categories: Sequence[str], deal: Deal) -> Parts:
    """Deal the rows of each category by a draw from Dirichlet(alpha) over the clients.

    Shares become counts by the largest remainder. A client without a row then gets one from the
    client with the most rows, from that client's largest category.
    """
    if not _MIN_ALPHA <= deal.alpha <= _MAX_ALPHA:
        raise UsageError(
            f"alpha={deal.alpha} is not between {_MIN_ALPHA:g} and {_MAX_ALPHA:g}",
            hint="0.1 is strongly skewed, 10 is nearly even; for equal shares use partition=iid",
        )
    generator = deal.generator("dirichlet")
    parts: Parts = [[] for _ in range(deal.num_clients)]
    for group in _rows_by_category(categories):
        generator.shuffle(group)
        taken = 0
        for part, count in zip(parts, _counts(_dirichlet_draw(deal, generator), len(group)), strict=True):
            part.extend(group[taken : taken + count])
            taken += count
    for part in parts:
        if not part:
            part.append(_give_one(parts, categories))
    return parts


def _dirichlet_draw(deal: Deal, generator: random.Random) -> list[float]:
    # Gamma(a) is Gamma(a + 1) * U ** (1 / a); in logarithms, since for a small alpha every draw would round to zero
    logs = [
        math.log(generator.gammavariate(deal.alpha + 1, 1.0)) + math.log(1.0 - generator.random()) / deal.alpha
        for _ in range(deal.num_clients)
    ]
    top = max(logs)
    weights = [math.exp(value - top) for value in logs]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _counts(shares: Sequence[float], total: int) -> list[int]:
    """Whole counts near `share * total` that add up to `total`; the largest remainders are rounded up."""
    exact = [share * total for share in shares]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda client: (counts[client] - exact[client], client))
    for client in by_remainder[: total - sum(counts)]:
        counts[client] += 1
    return counts


def _give_one(parts: Parts, categories: Sequence[str]) -> int:
    """Take a row from the largest client's largest category; ties go to the lowest client and name."""
    richest = max(parts, key=len)
    held = Counter(categories[row] for row in richest)
    name = min(held, key=lambda category: (-held[category], category))
    position = max(position for position, row in enumerate(richest) if categories[row] == name)
    return richest.pop(position)


def _shards(categories: Sequence[str], deal: Deal) -> Parts:
    """Rows sorted by category, cut into equal shards; every client gets `shards_per_client` of them at random."""
    num_shards = deal.num_clients * deal.shards_per_client
    if num_shards > len(categories):
        raise UsageError(
            f"{counted(num_shards, 'shard')} ({counted(deal.num_clients, 'client')} times {deal.shards_per_client}) "
            f"cannot be cut from {len(categories)} training rows",
            hint="lower shards_per_client or num_clients, or raise train_per_cat",
        )
    generator = deal.generator("shards")
    groups = _rows_by_category(categories)
    for group in groups:
        generator.shuffle(group)
    rows = [row for group in groups for row in group]
    edges = [number * len(rows) // num_shards for number in range(num_shards + 1)]
    shards = [rows[begin:end] for begin, end in itertools.pairwise(edges)]
    generator.shuffle(shards)
    return [
        [row for shard in shards[client :: deal.num_clients] for row in shard] for client in range(deal.num_clients)
    ]


PARTITIONS: Mapping[str, Callable[[Sequence[str], Deal], Parts]] = {
    "category": _by_category,
    "iid": _iid,
    "dirichlet": _dirichlet,
    "shards": _shards,
}
"""The ways to deal; the names are also the choices of the `partition` flag, and a test holds both equal."""
