"""Laws of one aggregation that a mode's row of method_properties.py promises: functions that raise AssertionError.

test_identities.py holds every mode to all of them and to those of run_laws.py; test_mutations.py breaks methods in the
ways that published code does and expects one to fail. All is float64 and compared to 1e-10 unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from federation_of_one_round import LAYERS, adapter, context, product, update
from linear_federation import fresh, hand_in
from method_properties import Properties
from torch import Tensor

from fedlora.federated.adapters import fingerprint, pick_half, zeros_like
from fedlora.methods.choosing import LoadedMethod
from fedlora.types import AdapterState, ServerState

Check = Callable[[LoadedMethod, Properties], None]

ROWS = (5, 2, 9, 1, 4, 7, 3)

SCALING = 1.5
"""s of all aggregations here."""


def plain(mode: LoadedMethod, row: Properties) -> LoadedMethod:
    """The mode with its server going exactly to the mean."""
    return replace(mode, server=replace(mode.server, **row.plain))


def weights_of(row: Properties, rows: Sequence[int], made: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """What clients weigh that have so many rows and made these products."""
    if row.weighs_by_norm:
        return [float(sum(one.square().sum() for one in each.values()) ** 0.5) for each in made]
    return [float(n) if row.is_weighted else 1.0 for n in rows]


def send(mode: LoadedMethod, state: ServerState, row: Properties, seeds: Sequence[int], number: int = 1):
    """What clients have after training from `state` (by chance, one seed each), and what they send of it."""
    download = mode.server.broadcast(state, 0, number)
    half = row.of_round(row.trains, number)
    trained = [{**download.adapter, **pick_half(adapter(seed), half)} for seed in seeds]
    return trained, [hand_in(mode, download, one) for one in trained]


def begin(mode: LoadedMethod, start: AdapterState | None = None) -> ServerState:
    return mode.server.init(adapter(0) if start is None else start, range(len(ROWS)))


def combine(
    mode: LoadedMethod, state: ServerState, sent: Sequence[AdapterState], rows: Sequence[int], number: int = 1
) -> ServerState:
    """One aggregation in the order given; clients are numbered along it, and N is the number of clients."""
    change = {name: zeros_like(state.adapter) for name in mode.client.sends}
    updates = [update(k, one, rows=n, extra=change) for k, (one, n) in enumerate(zip(sent, rows, strict=True))]
    place = replace(context(number, len(sent)), scaling=SCALING)
    return mode.server.aggregate(state, updates, place)


def near(found: AdapterState, wanted: AdapterState, what: str, tolerance: float = 1e-10) -> None:
    assert found.keys() == wanted.keys(), what
    for key in found:
        distance = float((found[key] - wanted[key]).abs().max())
        assert distance <= tolerance, f"{what}: {key} is {distance:g} away"


def products(state: AdapterState) -> dict[str, Tensor]:
    return {layer: product(state, layer) for layer in LAYERS}


def left_by(state: ServerState, scaling: float = SCALING) -> dict[str, Tensor]:
    """What a state adds to the base, layer by layer, in units of `s`: for most modes the product of its factors."""
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


def check_one_client(mode: LoadedMethod, row: Properties) -> None:
    """A cohort of one gives that client, or leaves the state where the method needs more."""
    mode = plain(mode, row)
    for number in (1, 2):
        state = begin(mode)
        (trained,), sent = send(mode, state, row, [5], number)
        after = combine(mode, state, sent, [3], number)
        if row.fewest > 1:
            assert after is state, "fewer clients than the method needs moved the server"
        else:
            _check_is_client(after, trained, row)


def check_equal_clients(mode: LoadedMethod, row: Properties) -> None:
    """Clients that agree give what each of them has, whatever their weights."""
    mode = plain(mode, row)
    for number in (1, 2):
        state = begin(mode)
        (trained, *_), sent = send(mode, state, row, [5] * 7, number)
        _check_is_client(combine(mode, state, sent, ROWS, number), trained, row)


def _check_is_client(after: ServerState, trained: AdapterState, row: Properties) -> None:
    if row.alone == "A":
        near(pick_half(after.adapter, "A"), pick_half(trained, "A"), "the client's own A")
        return
    near(left_by(after), products(trained), "the client's own product")
    if row.alone == "factors":
        near(after.adapter, trained, "the client's own factors")


def check_order(mode: LoadedMethod, row: Properties) -> None:
    """Who is called client 0 does not matter."""
    state = begin(mode)
    _, sent = send(mode, state, row, range(1, 8))
    straight = combine(mode, state, sent, ROWS)
    for turned in ((3, 1, 0, 6, 5, 2, 4), (6, 5, 4, 3, 2, 1, 0)):
        after = combine(mode, state, [sent[k] for k in turned], [ROWS[k] for k in turned])
        near_states(after, straight, "clients in another order")


def near_states(found: ServerState, wanted: ServerState, what: str) -> None:
    near(found.adapter, wanted.adapter, what)
    near(left_by(found), left_by(wanted), what)
    assert found.slots.keys() == wanted.slots.keys(), what
    for name in found.slots:
        near(found.slots[name], wanted.slots[name], f"{what}: {name}")


def check_weights(mode: LoadedMethod, row: Properties) -> None:
    """Rows weigh or do not; all of them times seven change nothing; a client of three rows is three clients of one."""
    state = begin(mode)
    _, sent = send(mode, state, row, range(1, 8))
    weighed, even = combine(mode, state, sent, ROWS), combine(mode, state, sent, [1] * 7)
    near_states(combine(mode, state, sent, [7 * n for n in ROWS]), weighed, "all rows times seven")
    if not row.is_weighted:
        near_states(weighed, even, "rows where they do not weigh")
        return
    off = max(float((left_by(weighed)[layer] - left_by(even)[layer]).abs().max()) for layer in LAYERS)
    assert off > 1e-4 or not row.has_global, "rows do not weigh"
    many = [one for one, n in zip(sent, ROWS, strict=True) for _ in range(n)]
    near_states(combine(mode, state, many, [1] * len(many)), weighed, "one client of n rows, n clients of one row")


def check_combination(mode: LoadedMethod, row: Properties) -> None:
    """Exact: the product left is the mean of products. Else of mean factors, off by exactly the cross term.

    `sum(w B A) - mean(B) mean(A) = sum(w (B - mean(B)) (A - mean(A)))`.
    """
    mode = plain(mode, row)
    for number in (1, 2):
        state = begin(mode)
        trained, sent = send(mode, state, row, range(1, 8), number)
        after = combine(mode, state, sent, ROWS, number)
        made = [products(one) for one in trained]
        weights = weights_of(row, ROWS, made)
        wanted = mean_of(made, weights)
        if row.combines == "products" and mode.order == "parallel":
            near(left_by(after), wanted, "the mean of products")
        elif row.combines == "cut":
            near(
                left_by(after), {layer: best_of_rank(value) for layer, value in wanted.items()}, "the best of its rank"
            )
        elif row.combines == "factors" and row.has_global:
            _check_cross_term(after.adapter, sent, weights)
            off = max(float((product(after.adapter, layer) - wanted[layer]).abs().max()) for layer in LAYERS)
            assert off > 1e-3, "called inexact and is exact"
        elif row.combines == "middle":
            _check_middle(after.adapter, sent)
        elif row.combines == "nothing":
            assert after is state


def best_of_rank(matrix: Tensor, rank: int = 2) -> Tensor:
    """The nearest matrix of a rank, formed densely."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def _check_cross_term(after: AdapterState, sent: Sequence[AdapterState], weights: Sequence[float]) -> None:
    mean = mean_of(sent, weights)
    near(after, mean, "the mean of factors")
    exact = mean_of([products(one) for one in sent], weights)
    apart = [{key: one[key] - mean[key] for key in one} for one in sent]
    cross = mean_of([products(one) for one in apart], weights)
    near({layer: exact[layer] - product(after, layer) for layer in LAYERS}, cross, "the cross term")


def _check_middle(after: AdapterState, sent: Sequence[AdapterState]) -> None:
    for key, value in after.items():
        values = torch.stack([one[key] for one in sent])
        assert bool((value >= values.amin(0) - 1e-10).all() and (value <= values.amax(0) + 1e-10).all()), key


def check_fixed_point(mode: LoadedMethod, row: Properties) -> None:
    """Clients that send what they started from leave the product where it was, and an untrained adapter as it is."""
    for start in (adapter(0), fresh()):
        state = begin(mode, start)
        for number in (1, 2, 3):
            download = mode.server.broadcast(state, 0, number)
            after = combine(mode, state, [hand_in(mode, download, download.adapter)] * 7, ROWS, number)
            near(left_by(after), products(start), "nobody moved")
            is_empty = not any(bool(product(start, layer).any()) for layer in LAYERS)
            if not row.draws_anew and (row.alone != "product" or is_empty):
                near(after.adapter, start, "nobody moved")
            state = after


def check_inputs_stay(mode: LoadedMethod, row: Properties) -> None:
    """No input is changed: not the state, not what was sent."""
    state = combine(mode, begin(mode), send(mode, begin(mode), row, range(1, 8))[1], ROWS)
    _, sent = send(mode, state, row, range(11, 18), 2)
    groups = [state.adapter, *state.slots.values(), *sent]
    before = [fingerprint(group) for group in groups]
    combine(mode, state, sent, ROWS, 2)
    assert [fingerprint(group) for group in groups] == before


def check_one_rounding(mode: LoadedMethod, row: Properties) -> None:
    """float32 clients give what they give in float64, rounded; large numbers that cancel show every sum in float32."""
    large = {key: 4096.0 + value for key, value in adapter(0).items()}
    state = begin(mode, {key: value.float() for key, value in large.items()})
    exact = begin(mode, {key: value.double() for key, value in state.adapter.items()})
    _, sent = send(mode, state, row, range(1, 8))
    half = row.of_round(row.shares, 1)
    sent = [
        {key: (state.adapter[key] + adapter(20 + k)[key]).float() for key in pick_half(state.adapter, half)}
        if one
        else one
        for k, one in enumerate(sent)
    ]
    narrow = combine(mode, state, sent, ROWS)
    wide = combine(mode, exact, [{key: value.double() for key, value in one.items()} for one in sent], ROWS)
    for key, value in narrow.adapter.items():
        assert value.dtype == torch.float32, key
    if row.alone == "product":
        narrow_, wide_ = {k: v.double() for k, v in left_by(narrow).items()}, left_by(wide)
        for layer, value in wide_.items():
            assert bool(((narrow_[layer] - value).abs() <= 1e-6 * value.abs().max()).all()), layer
    else:
        for key, value in wide.adapter.items():
            # half of the distance between neighbours in float32 from 4096 to 8192
            apart = (narrow.adapter[key].double() - value).abs().max()
            assert float(apart) <= 2.0**-12 * 1.0001, f"{key} is {float(apart):g} away: rounded more than once"


def check_ranks(mode: LoadedMethod, row: Properties) -> None:
    """A client of rank 1 among clients of rank 2 is refused, not spread over both; or has a place of its own.

    Where ranks may differ, equal clients of rank 1 give their product, and beside it what the server has of the
    directions that they do not have, if its row says so.
    """
    state = begin(mode)
    (trained, *_), sent = send(mode, state, row, range(1, 8))
    thin = {key: value[:1] if ".lora_A." in key else value[:, :1] for key, value in sent[0].items()}
    if row.ranks != "one":
        whole = {key: value[:1] if ".lora_A." in key else value[:, :1] for key, value in trained.items()}
        wanted = products(whole)
        if row.ranks == "directions":
            rest = {key: v[1:] if ".lora_A." in key else v[:, 1:] for key, v in state.adapter.items()}
            wanted = {layer: value + product(rest, layer) for layer, value in wanted.items()}
        near(left_by(combine(mode, state, [thin] * 7, ROWS)), wanted, "clients of rank 1")
        return
    try:
        combine(mode, state, [*sent[1:], thin], ROWS)
    except (ValueError, RuntimeError):
        return
    raise AssertionError("a rank-1 update was spread over a rank-2 adapter")


def check_key_order(mode: LoadedMethod, row: Properties) -> None:
    """An adapter that comes from a file has its keys in any order; no bit depends on it."""
    state = begin(mode)
    _, sent = send(mode, state, row, range(1, 8))
    straight = combine(mode, state, sent, ROWS)
    turned = combine(mode, state, [dict(reversed(list(one.items()))) for one in sent], ROWS)
    assert fingerprint(turned.adapter) == fingerprint(straight.adapter), "the order of keys shows"
    assert (turned.base and turned.base.sha256) == (straight.base and straight.base.sha256), "the order of keys shows"


def check_turns(mode: LoadedMethod, row: Properties) -> None:
    """FedRot turns by rotations: of determinant 1, also where a reflection would come nearer."""
    state, mirror = adapter(1), torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    reference = {key: mirror @ v if ".lora_A." in key else v @ mirror for key, v in state.items()}
    for number in (1, 2):
        download = mode.server.broadcast(ServerState(reference), 0, number)
        turned = hand_in(replace(mode, client=replace(mode.client, rotation_strength=1.0)), download, state)
        for layer in LAYERS:
            key = f"{layer}.lora_A.weight"
            turn = turned[key] @ torch.linalg.pinv(state[key])
            assert abs(float(torch.linalg.det(turn)) - 1) <= 1e-9, f"{layer}: a reflection"


EVERY_AGGREGATION: tuple[Check, ...] = (
    check_one_client,
    check_equal_clients,
    check_order,
    check_weights,
    check_combination,
    check_fixed_point,
    check_inputs_stay,
    check_one_rounding,
    check_ranks,
    check_key_order,
)

ONLY: Mapping[Check, Callable[[LoadedMethod, Properties], bool]] = {
    check_one_client: lambda mode, row: row.alone != "nothing",
    check_equal_clients: lambda mode, row: row.alone != "nothing",
    check_combination: lambda mode, row: mode.order == "parallel" and (row.has_global or row.combines == "nothing"),
    check_ranks: lambda mode, row: row.combines != "nothing",
}
"""Laws that do not hold of every mode: of which they do."""
