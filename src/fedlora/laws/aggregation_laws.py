"""Laws of one aggregation: functions that raise BrokenLawError where a method breaks a promise.

All is float64 and compared to 1e-10 unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from fedlora.federated.adapters import fingerprint, pick_half
from fedlora.laws.federation_of_one_round import LAYERS, adapter, product
from fedlora.laws.linear_federation import fresh, hand_in
from fedlora.laws.measures import (
    ROWS,
    Check,
    begin,
    best_of_rank,
    combine,
    hold,
    largest,
    left_by,
    mean_of,
    near,
    near_states,
    plain,
    products,
    same_bits,
    send,
    thin,
    weights_of,
)
from fedlora.laws.promises import Promises
from fedlora.methods.choosing import LoadedMethod
from fedlora.types import AdapterState, ServerState

UNPROMISED = "`combines` is not promised"
UNWEIGHED = "the row does not state rows_weigh"


def check_one_client(mode: LoadedMethod, row: Promises) -> None:
    """A cohort of one client leaves that client's adapter, or the state where more clients are needed."""
    mode = plain(mode, row)
    for number in (1, 2):
        state = begin(mode)
        (trained,), sent = send(mode, state, row, [5], number)
        after = combine(mode, state, sent, [3], number)
        if row.fewest > 1:
            hold(after is state, "fewer clients than the method needs moved the server")
        else:
            _check_is_client(after, trained, row)


def check_equal_clients(mode: LoadedMethod, row: Promises) -> None:
    """Clients that send the same adapter leave what each of them has, whatever they weigh."""
    mode = plain(mode, row)
    for number in (1, 2):
        state = begin(mode)
        (trained, *_), sent = send(mode, state, row, [5] * 7, number)
        _check_is_client(combine(mode, state, sent, ROWS, number), trained, row)


def _check_is_client(after: ServerState, trained: AdapterState, row: Promises) -> None:
    if row.alone == "A":
        near(pick_half(after.adapter, "A"), pick_half(trained, "A"), "the client's own A")
        return
    near(left_by(after), products(trained), "the client's own product")
    if row.alone == "factors":
        near(after.adapter, trained, "the client's own factors")


def check_order(mode: LoadedMethod, row: Promises) -> None:
    """The numbers of the clients do not matter."""
    state = begin(mode)
    _, sent = send(mode, state, row, range(1, 8))
    straight = combine(mode, state, sent, ROWS)
    for turned in ((3, 1, 0, 6, 5, 2, 4), (6, 5, 4, 3, 2, 1, 0)):
        after = combine(mode, state, [sent[k] for k in turned], [ROWS[k] for k in turned])
        near_states(after, straight, "clients in another order")


def check_weights(mode: LoadedMethod, row: Promises) -> None:
    """Clients weigh by their examples, or all alike, as the row says.

    Seven times as many examples change nothing, and a client of three examples is three clients of one.
    """
    state = begin(mode)
    _, sent = send(mode, state, row, range(1, 8))
    weighed, even = combine(mode, state, sent, ROWS), combine(mode, state, sent, [1] * 7)
    near_states(combine(mode, state, sent, [7 * n for n in ROWS]), weighed, "all rows times seven")
    if not row.is_weighted:
        near_states(weighed, even, "rows where they do not weigh")
        return
    off, way = largest(left_by(weighed), left_by(even)), largest(left_by(weighed), left_by(state))
    hold(off > 1e-4 * min(1.0, way) or not row.has_global, f"rows do not weigh: they move the result by {off:.3g}")
    many = [one for one, n in zip(sent, ROWS, strict=True) for _ in range(n)]
    near_states(combine(mode, state, many, [1] * len(many)), weighed, "one client of n rows, n clients of one row")


def check_sees_the_mean(mode: LoadedMethod, row: Promises) -> None:
    """The server computes from the mean of the adapters alone.

    Seven clients that all send the mean leave what the seven clients left whose mean it is. Privacy by client adds
    noise to that mean, and hides no client from a server that looks at more.
    """
    state = begin(mode)
    for number in (1, 2):
        _, sent = send(mode, state, row, range(1, 8), number)
        mean = mean_of(sent, [float(n) if row.is_weighted else 1.0 for n in ROWS])
        after = combine(mode, state, sent, ROWS, number)
        near_states(combine(mode, state, [mean] * 7, ROWS, number), after, "more than the mean counts")
        state = after


def check_combination(mode: LoadedMethod, row: Promises) -> None:
    """A round leaves the promised combination of the clients' adapters.

    Exact methods leave the mean of the products. Others leave the product of the mean factors, off by the cross term
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
            cut = {layer: best_of_rank(value) for layer, value in wanted.items()}
            near(left_by(after), cut, "the best of its rank")
        elif row.combines == "factors" and row.has_global:
            _check_cross_term(after.adapter, sent, weights)
            off = largest(products(after.adapter), wanted)
            hold(off > 1e-3, f"called inexact and is exact: {off:.3g} from the mean of products")
        elif row.combines == "middle":
            _check_middle(after.adapter, sent)
        elif row.combines == "nothing":
            hold(after is state, "a server that combines nothing makes another state")


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
        beyond = float(torch.maximum(values.amin(0) - value, value - values.amax(0)).max())
        hold(beyond <= 1e-10, f"{key} is {beyond:.3g} beyond what clients sent")


def check_fixed_point(mode: LoadedMethod, row: Promises) -> None:
    """Clients that send what they started from leave the global product as it is."""
    for start in (adapter(0), fresh()):
        state = begin(mode, start)
        for number in (1, 2, 3):
            download = mode.server.broadcast(state, 0, number)
            after = combine(mode, state, [hand_in(mode, download, download.adapter)] * 7, ROWS, number)
            near(left_by(after), products(start), "no client moved")
            is_empty = not any(bool(product(start, layer).any()) for layer in LAYERS)
            if not row.draws_anew and (row.alone not in ("product", None) or is_empty):
                near(after.adapter, start, "no client moved")
            state = after


def check_inputs_stay(mode: LoadedMethod, row: Promises) -> None:
    """aggregate changes neither the state nor the updates."""
    state = combine(mode, begin(mode), send(mode, begin(mode), row, range(1, 8))[1], ROWS)
    _, sent = send(mode, state, row, range(11, 18), 2)
    groups = [state.adapter, *state.slots.values(), *sent]
    before = [fingerprint(group) for group in groups]
    combine(mode, state, sent, ROWS, 2)
    changed = sum(fingerprint(group) != one for group, one in zip(groups, before, strict=True))
    hold(not changed, f"{changed} of {len(groups)} inputs are changed")


def check_one_rounding(mode: LoadedMethod, row: Promises) -> None:
    """A float32 result is the float64 result, rounded once.

    The adapters are large numbers with small changes, which show every sum in float32.
    """
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
        hold(value.dtype == torch.float32, f"{key} is {value.dtype} and was float32")
    if row.alone == "product" or (row.alone is None and row.server_rewrites):
        rounded = {layer: value.double() for layer, value in left_by(narrow).items()}
        for layer, value in left_by(wide).items():
            off = float(((rounded[layer] - value).abs() / value.abs().max()).max())
            hold(off <= 1e-6, f"{layer} is {off:.3g} of its largest entry away")
        return
    for key, value in wide.adapter.items():
        # half of the distance between neighbours in float32 from 4096 to 8192
        apart = float((narrow.adapter[key].double() - value).abs().max())
        hold(apart <= 2.0**-12 * 1.0001, f"{key} is {apart:.3g} away: rounded more than once")


def check_ranks(mode: LoadedMethod, row: Promises) -> None:
    """A client of a smaller rank is refused, or changes only the rank directions that it has.

    Where ranks may differ, equal clients of rank 1 give their product, and beside it what the server has of the
    directions that they do not have, if it is promised.
    """
    state = begin(mode)
    (trained, *_), sent = send(mode, state, row, range(1, 8))
    if row.ranks != "one":
        wanted = products(thin(trained))
        if row.ranks == "directions":
            rest = {key: v[1:] if ".lora_A." in key else v[:, 1:] for key, v in state.adapter.items()}
            wanted = {layer: value + product(rest, layer) for layer, value in wanted.items()}
        near(left_by(combine(mode, state, [thin(sent[0])] * 7, ROWS)), wanted, "clients of rank 1")
        return
    try:
        combine(mode, state, [*sent[1:], thin(sent[0])], ROWS)
    except (ValueError, RuntimeError):
        return
    hold(False, "a rank-1 update was spread over a rank-2 adapter")


def check_key_order(mode: LoadedMethod, row: Promises) -> None:
    """The order of an adapter's keys changes no bit."""
    state = begin(mode)
    _, sent = send(mode, state, row, range(1, 8))
    straight = combine(mode, state, sent, ROWS)
    turned = combine(mode, state, [dict(reversed(list(one.items()))) for one in sent], ROWS)
    same_bits(turned.adapter, straight.adapter, "the order of keys changes bits")
    hold((turned.base and turned.base.sha256) == (straight.base and straight.base.sha256), "the order of keys counts")


EVERY_AGGREGATION: tuple[Check, ...] = (
    check_one_client,
    check_equal_clients,
    check_order,
    check_weights,
    check_sees_the_mean,
    check_combination,
    check_fixed_point,
    check_inputs_stay,
    check_one_rounding,
    check_ranks,
    check_key_order,
)

WHY_NOT: Mapping[Check, Callable[[LoadedMethod, Promises], str]] = {
    check_one_client: lambda mode, row: (
        UNPROMISED if row.alone is None and row.fewest == 1 else "nothing is combined" if row.alone == "nothing" else ""
    ),
    check_equal_clients: lambda mode, row: (
        UNPROMISED if row.alone is None else "nothing is combined" if row.alone == "nothing" else ""
    ),
    check_weights: lambda mode, row: UNWEIGHED if row.is_weighted is None else "",
    check_sees_the_mean: lambda mode, row: (
        "server_sees is not mean" if not row.sees_mean else UNWEIGHED if row.is_weighted is None else ""
    ),
    check_combination: lambda mode, row: (
        UNPROMISED
        if row.combines is None
        else "one client follows another"
        if mode.order != "parallel"
        else ""
        if row.has_global or row.combines == "nothing"
        else "there is no global model"
    ),
    check_fixed_point: lambda mode, row: "" if row.rests else "`rests` is false",
    check_ranks: lambda mode, row: "`ranks` is not promised" if row.ranks is None or row.combines == "nothing" else "",
}
"""Law -> why a method is not held to it; empty where it is."""
