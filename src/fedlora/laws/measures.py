"""What the laws compare: products of factors, means, and how far two states are from each other. All in float64."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.federated.adapters import fingerprint, pick_half, zeros_like
from fedlora.laws.federation_of_one_round import LAYERS, adapter, context, product, update
from fedlora.laws.linear_federation import hand_in
from fedlora.laws.promises import Promises
from fedlora.methods.choosing import LoadedMethod
from fedlora.types import AdapterState, ServerState

Check = Callable[[LoadedMethod, Promises], None]

ROWS = (5, 2, 9, 1, 4, 7, 3)
"""Examples of the seven clients."""
SCALING = 1.5
"""s of all aggregations here."""
TOLERANCE = 1e-10


class BrokenLawError(AssertionError):
    """A law that does not hold: what differs, where, and by how much."""


def hold(condition: bool, message: str) -> None:
    """BrokenLawError unless the condition is true."""
    if not condition:
        raise BrokenLawError(message)


def near(found: AdapterState, wanted: AdapterState, what: str, tolerance: float = TOLERANCE) -> None:
    """BrokenLawError with the distance where two groups of tensors are not the same."""
    hold(found.keys() == wanted.keys(), f"{what}: {_difference(found, wanted)}")
    for key in found:
        hold(found[key].shape == wanted[key].shape, f"{what}: {key} has the shape {tuple(found[key].shape)}")
        distance = float((found[key] - wanted[key]).abs().max())
        # not a number is near nothing
        hold(distance <= tolerance, f"{what}: {key} is {distance:.3g} away")


def near_states(found: ServerState, wanted: ServerState, what: str) -> None:
    """The same for adapters, for what was added to the base, and for slots. A slot of other keys is about single
    clients, by their numbers, and is not compared."""
    near(found.adapter, wanted.adapter, what)
    near(left_by(found), left_by(wanted), what)
    hold(found.slots.keys() == wanted.slots.keys(), f"{what}: other slots")
    for name in found.slots:
        if found.slots[name].keys() <= found.adapter.keys():
            near(found.slots[name], wanted.slots[name], f"{what}: {name}")


def near_results(found: ServerState, wanted: ServerState, what: str, row: Promises) -> None:
    """States, or where a server chooses its factors, only the products that they stand for."""
    if row.alone == "product" or (row.alone is None and row.server_rewrites):
        near(left_by(found), left_by(wanted), what)
    else:
        near_states(found, wanted, what)


def same_bits(found: AdapterState, wanted: AdapterState, what: str, keys: Collection[str] | None = None) -> None:
    """BrokenLawError unless two groups of tensors, or those of these keys, are equal to the bit."""
    groups = [{key: one[key] for key in (one if keys is None else keys)} for one in (found, wanted)]
    hold(fingerprint(groups[0]) == fingerprint(groups[1]), what)


def products(state: AdapterState) -> dict[str, Tensor]:
    """Layer -> B A."""
    return {layer: product(state, layer) for layer in LAYERS}


def left_by(state: ServerState, scaling: float = SCALING) -> dict[str, Tensor]:
    """What a state adds to the base, layer by layer, in units of `s`: for most methods the product of its factors."""
    return plus(products(state.adapter), beneath(state, scaling))


def beneath(state: ServerState, scaling: float = SCALING) -> dict[str, Tensor]:
    """What a method has added to the base under the adapter, in units of `s`; empty where it adds nothing."""
    added = state.base.background if state.base is not None else {}
    found = {}
    for layer in LAYERS:
        if f"{layer}.delta.weight" in added:
            found[layer] = added[f"{layer}.delta.weight"] / scaling
        elif f"{layer}.lora_A.weight" in added:
            found[layer] = product(added, layer) / scaling
    return found


def plus(one: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sum, layer by layer; `more` may lack some."""
    return {layer: value + more[layer] if layer in more else value for layer, value in one.items()}


def mean_of(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The plain textbook sum, independent of the package's."""
    shares = [weight / sum(weights) for weight in weights]
    return {key: sum(share * one[key] for share, one in zip(shares, states, strict=True)) for key in states[0]}  # type: ignore[misc]


def best_of_rank(matrix: Tensor, rank: int = 2) -> Tensor:
    """The nearest matrix of a rank, formed densely."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def largest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of two groups of tensors."""
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


def thin(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first rank direction of every layer."""
    return {key: value[:1] if ".lora_A." in key else value[:, :1] for key, value in state.items()}


def plain(mode: LoadedMethod, row: Promises) -> LoadedMethod:
    """The method with its server going exactly to the mean."""
    return mode.with_values(row.plain)


def weights_of(row: Promises, rows: Sequence[int], made: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """What clients weigh that have so many rows and made these products."""
    if row.weighs_by_norm:
        return [float(sum(one.square().sum() for one in each.values()) ** 0.5) for each in made]
    return [float(n) if row.is_weighted else 1.0 for n in rows]


def begin(mode: LoadedMethod, start: AdapterState | None = None) -> ServerState:
    """The state before the first round."""
    return mode.server.init(adapter(0) if start is None else start, tuple(range(len(ROWS))))


def send(
    mode: LoadedMethod, state: ServerState, row: Promises, seeds: Sequence[int], number: int = 1
) -> tuple[Sequence[AdapterState], Sequence[AdapterState]]:
    """What clients have after training from `state` (by chance, one seed each), and what they send of it."""
    download = mode.server.broadcast(state, 0, number)
    half = row.of_round(row.trains, number)
    trained = [{**download.adapter, **pick_half(adapter(seed), half)} for seed in seeds]
    return trained, [hand_in(mode, download, one) for one in trained]


def combine(
    mode: LoadedMethod, state: ServerState, sent: Sequence[AdapterState], rows: Sequence[int], number: int = 1
) -> ServerState:
    """One aggregation in the order given; clients are numbered along it, and N is the number of clients."""
    change = {name: zeros_like(state.adapter) for name in mode.client.sends}
    updates = [update(k, one, rows=n, extra=change) for k, (one, n) in enumerate(zip(sent, rows, strict=True))]
    place = replace(context(number, len(sent)), scaling=SCALING)
    return mode.server.aggregate(state, updates, place)


def _difference(found: AdapterState, wanted: AdapterState) -> str:
    lacks, more = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    return ", ".join([*(f"{key} is missing" for key in lacks[:1]), *(f"{key} is there" for key in more[:1])])
