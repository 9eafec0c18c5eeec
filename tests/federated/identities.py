"""Laws that a mode's row of method_properties.py promises, each a function that raises AssertionError.

test_identities.py holds every mode to all of them; test_mutations.py breaks methods in the ways that published code
does and expects one of these to fail. Everything is float64 and compared to 1e-10 unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from federation_of_one_round import LAYERS, adapter, close, context, product, update
from linear_federation import Federation, Setup, fresh, gradient_of, hand_in, train
from method_properties import Properties
from torch import Tensor

from fedlora.federated.adapters import fingerprint, pick_half, zeros_like
from fedlora.federated.modes import Mode
from fedlora.types import AdapterState, ClientMemory, ServerState

ROWS = (5, 2, 9, 1, 4, 7, 3)
MISSES = {1: (0, 1, 2, 3, 4, 5, 6), 2: (1, 2, 3, 4, 5), 3: (2, 3, 4, 5, 6), 4: (0, 1, 2, 3, 4)}
"""Cohorts of four rounds: client 0 takes part in the first and the last."""


def plain(mode: Mode, row: Properties) -> Mode:
    """The mode with its server going exactly to the mean."""
    return replace(mode, strategy=replace(mode.strategy, **row.plain))


def send(mode: Mode, state: ServerState, row: Properties, seeds: Sequence[int], number: int = 1):
    """What clients have after training from `state` (by chance, one seed each), and what they send of it."""
    download = mode.strategy.broadcast(state, 0, number)
    half = row.of_round(row.trains, number)
    trained = [{**download.adapter, **pick_half(adapter(seed), half)} for seed in seeds]
    return trained, [hand_in(mode, download, one) for one in trained]


def begin(mode: Mode, start: AdapterState | None = None) -> ServerState:
    return mode.strategy.init(adapter(0) if start is None else start, range(len(ROWS)))


def combine(
    mode: Mode, state: ServerState, sent: Sequence[AdapterState], rows: Sequence[int], number: int = 1
) -> ServerState:
    """One aggregation in the order given; clients are numbered along it, and N is the number of clients."""
    change = {name: zeros_like(state.adapter) for name in mode.rule.sends}
    updates = [update(k, one, rows=n, extra=change) for k, (one, n) in enumerate(zip(sent, rows, strict=True))]
    return mode.strategy.aggregate(state, updates, context(number, len(sent)))


def near(found: AdapterState, wanted: AdapterState, what: str, tolerance: float = 1e-10) -> None:
    assert found.keys() == wanted.keys(), what
    for key in found:
        distance = float((found[key] - wanted[key]).abs().max())
        assert distance <= tolerance, f"{what}: {key} is {distance:g} away"


def products(state: AdapterState) -> dict[str, Tensor]:
    return {layer: product(state, layer) for layer in LAYERS}


def mean_of(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The plain textbook sum, independent of the package's."""
    shares = [weight / sum(weights) for weight in weights]
    return {key: sum(share * one[key] for share, one in zip(shares, states, strict=True)) for key in states[0]}  # type: ignore[misc]


def check_one_client(mode: Mode, row: Properties) -> None:
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


def check_equal_clients(mode: Mode, row: Properties) -> None:
    """Clients that agree give what each of them has, whatever their weights."""
    mode = plain(mode, row)
    for number in (1, 2):
        state = begin(mode)
        (trained, *_), sent = send(mode, state, row, [5] * 7, number)
        _check_is_client(combine(mode, state, sent, ROWS, number), trained, row)


def _check_is_client(after: ServerState, trained: AdapterState, row: Properties) -> None:
    if row.alone == "nothing":
        return
    if row.alone == "A":
        near(pick_half(after.adapter, "A"), pick_half(trained, "A"), "the client's own A")
        return
    near(products(after.adapter), products(trained), "the client's own product")
    if row.alone == "factors":
        near(after.adapter, trained, "the client's own factors")


def check_order(mode: Mode, row: Properties) -> None:
    """Who is called client 0 does not matter."""
    state = begin(mode)
    _, sent = send(mode, state, row, range(1, 8))
    straight = combine(mode, state, sent, ROWS)
    for turned in ((3, 1, 0, 6, 5, 2, 4), (6, 5, 4, 3, 2, 1, 0)):
        after = combine(mode, state, [sent[k] for k in turned], [ROWS[k] for k in turned])
        _near_states(after, straight, "clients in another order")


def _near_states(found: ServerState, wanted: ServerState, what: str) -> None:
    near(found.adapter, wanted.adapter, what)
    assert found.slots.keys() == wanted.slots.keys(), what
    for name in found.slots:
        near(found.slots[name], wanted.slots[name], f"{what}: {name}")


def check_weights(mode: Mode, row: Properties) -> None:
    """Rows weigh or do not; all of them times seven change nothing; a client of three rows is three clients of one."""
    state = begin(mode)
    _, sent = send(mode, state, row, range(1, 8))
    weighed, even = combine(mode, state, sent, ROWS), combine(mode, state, sent, [1] * 7)
    _near_states(combine(mode, state, sent, [7 * n for n in ROWS]), weighed, "all rows times seven")
    if not row.is_weighted:
        _near_states(weighed, even, "rows where they do not weigh")
        return
    assert not close(weighed.adapter, even.adapter, 1e-4), "rows do not weigh"
    many = [one for one, n in zip(sent, ROWS, strict=True) for _ in range(n)]
    _near_states(combine(mode, state, many, [1] * len(many)), weighed, "one client of n rows, n clients of one row")


def check_combination(mode: Mode, row: Properties) -> None:
    """Exact: the product left is the mean of products. Else of mean factors, off by exactly the cross term.

    `sum(w B A) - mean(B) mean(A) = sum(w (B - mean(B)) (A - mean(A)))`.
    """
    mode = plain(mode, row)
    for number in (1, 2):
        state = begin(mode)
        trained, sent = send(mode, state, row, range(1, 8), number)
        after = combine(mode, state, sent, ROWS, number)
        weights = ROWS if row.is_weighted else (1,) * 7
        wanted = mean_of([products(one) for one in trained], weights)
        if row.combines == "products" and not row.order_matters and row.trains != ("both",):
            near(products(after.adapter), wanted, "the mean of products")
        elif row.combines == "factors" and row.has_global:
            _check_cross_term(after.adapter, sent, weights)
            off = max(float((product(after.adapter, layer) - wanted[layer]).abs().max()) for layer in LAYERS)
            assert off > 1e-3, "called inexact and is exact"
        elif row.combines == "middle":
            _check_middle(after.adapter, sent)
        elif row.combines == "nothing":
            assert after is state


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


def check_waves(mode: Mode, row: Properties) -> None:
    """In a run that trains: every wave of an exact mode leaves the mean of its clients' products."""
    federation = Federation(plain(mode, row)).run((1, 2, 3))
    for wave in federation.waves:
        clients = sorted(wave.turns)
        trained = [products(wave.turns[client].trained) for client in clients]
        rows = [wave.turns[client].update.num_examples for client in clients]
        wanted, found = mean_of(trained, rows if row.is_weighted else [1] * len(rows)), products(wave.after.adapter)
        if row.combines == "products":
            near(found, wanted, f"round {wave.round}: the mean of products")
        elif row.combines == "factors" and row.has_global:
            assert max(float((found[layer] - wanted[layer]).abs().max()) for layer in LAYERS) > 1e-8


def check_first_step(mode: Mode, row: Properties) -> None:
    """From B = 0 one plain step leaves A alone, so that even the mean of factors is exact; more steps do not.

    The step is `-eta s dL/d(s B A) A^T`: it moves B wherever B is trained.
    """
    if row.order_matters:
        return
    for steps, exact in ((1, True), (8, row.combines == "products")):
        mode_ = plain(mode, row)
        (wave,) = Federation(mode_, Setup(steps=steps)).run((1,)).waves
        moved = [turn.trained for _, turn in sorted(wave.turns.items())]
        for one in moved:
            assert all(float(one[key].abs().max()) > 1e-6 for key in pick_half(one, "B")), "the first round trains no B"
        if steps == 1:
            assert all(torch.equal(one[key], wave.before.adapter[key]) for one in moved for key in pick_half(one, "A"))
        if row.combines in ("products", "factors") and row.has_global:
            rows = [turn.update.num_examples for _, turn in sorted(wave.turns.items())]
            wanted = mean_of([products(one) for one in moved], rows if row.is_weighted else [1] * len(rows))
            off = max(float((product(wave.after.adapter, layer) - wanted[layer]).abs().max()) for layer in LAYERS)
            assert (off <= 1e-10) == exact, f"{steps} steps: {off:g} from the mean of products"


def check_halves(mode: Mode, row: Properties) -> None:
    """What is trained, sent and handed out in each round is what the row says; the rest stays to the bit."""
    federation = Federation(mode).run((1, 2, 3, 4))
    for wave in federation.waves:
        trains, shares, travels = (row.of_round(half, wave.round) for half in (row.trains, row.shares, row.travels))
        for turn in wave.turns.values():
            assert (turn.download.trainable, turn.download.shared) == (trains, shares)
            assert turn.download.travels == travels
            start, end = turn.start, turn.trained
            idle = start.keys() - pick_half(start, trains).keys()
            assert all(torch.equal(start[key], end[key]) for key in idle), "a factor that is not trained moved"
            wanted = pick_half(start, shares).keys() if row.combines != "nothing" else set()
            assert (turn.update.upload or {}).keys() == wanted, "another upload than the factors that are shared"
        still = wave.before.adapter.keys() - pick_half(wave.before.adapter, shares).keys()
        if not row.server_rewrites:
            assert all(torch.equal(wave.before.adapter[key], wave.after.adapter[key]) for key in still)
        # who has a factor already must have the one that the server means
        absent = wave.before.adapter.keys() - pick_half(wave.before.adapter, travels).keys()
        if row.has_global:
            assert all(torch.equal(federation.start[key], wave.before.adapter[key]) for key in absent)


def check_everybody_starts_alike(mode: Mode, row: Properties) -> None:
    """All clients of a round are handed the same, and start there except for what is their own."""
    for wave in Federation(mode).run((1, 2)).waves:
        for turn in wave.turns.values():
            near(turn.download.adapter, wave.before.adapter, "another adapter than the server's", 0.0)
            start = turn.start
            own = {} if row.keeps == "none" else pick_half(start, row.keeps)
            common = start.keys() - own.keys()
            assert all(torch.equal(start[key], wave.before.adapter[key]) for key in common), "another start"


def check_missed_rounds(mode: Mode, row: Properties) -> None:
    """A client of rounds 1 and 4 goes on in round 4 from what it had in round 1, beside what the server has by then."""
    if row.order_matters or mode.order == "pooled":
        return
    federation = Federation(mode).run((1, 2, 3, 4), MISSES.__getitem__)
    first, *_, last = federation.waves
    before, turn = first.turns[0], last.turns[0]
    own = pick_half(before.trained, row.keeps) if row.keeps != "none" else {}
    near(turn.start, {**last.before.adapter, **own}, "where a client starts that was away", 0.0)
    assert (before.update.memory.adapter is not None) == (row.keeps != "none"), "a memory that nothing asks for"
    assert frozenset(last.after.slots) == row.slots, "another server state than promised"
    if row.keeps_control:
        mine = before.update.memory.slots["control"]
        wanted = {key: value - mine[key] for key, value in last.before.slots["control"].items()}
        found = turn.phases[0].correction
        assert found is not None, "no correction"
        near(found, wanted, "the correction of a client that was away")


def check_controls(mode: Mode, row: Properties) -> None:
    """SCAFFOLD: c_k is option II, `c_k - c + (x - y) / (E eta)`, with the steps taken; c is the mean over all N."""
    federation = Federation(mode).run((1, 2, 3, 4), MISSES.__getitem__)
    zero, known = zeros_like(federation.start), {}
    for wave in federation.waves:
        server = wave.before.slots["control"]
        for client, turn in wave.turns.items():
            way = federation.setup.rate * federation.setup.steps
            start, end = turn.start, turn.trained
            old = known.get(client, zero)
            known[client] = {key: old[key] - server[key] + (start[key] - end[key]) / way for key in start}
            near(turn.update.memory.slots["control"], known[client], "option II")
        everybody = [known.get(client, zero) for client in range(federation.clients)]
        near(wave.after.slots["control"], mean_of(everybody, [1] * len(everybody)), "the mean of all controls")


def check_pull(mode: Mode, row: Properties) -> None:
    """FedProx: two steps by hand, `y - eta (g(y) + mu (y - x))`; the first of them has no pull; more mu, less way."""
    start, setup = adapter(0), Setup(steps=2)
    ways = []
    for mu in (0.0, 1.0, 20.0):
        rule = replace(mode.rule, proximal_mu=mu)
        (phase,) = rule.phases(mode.strategy.broadcast(ServerState(start), 0, 1), ClientMemory())
        found = train(phase, [0], setup).adapter
        place = {key: value.clone() for key, value in start.items()}
        for _ in range(setup.steps):
            slope = gradient_of(place, [0], setup)
            place = {key: y - setup.rate * (slope[key] + mu * (y - start[key])) for key, y in place.items()}
        near(found, place, f"mu {mu:g}")
        ways.append(sum(float((found[key] - start[key]).square().sum()) for key in start))
    assert ways == sorted(ways, reverse=True)
    assert ways[0] > ways[-1] * 1.01


def check_equal_rows_train_as_one(mode: Mode, row: Properties) -> None:
    """Seven clients with the same rows are one of them, round after round (five, where a method needs as many)."""
    if row.order_matters:
        return
    fewer = Federation(mode, clients=row.fewest, owner=lambda _: 3).run((1, 2, 3))
    more = Federation(mode, clients=7, owner=lambda _: 3).run((1, 2, 3))
    if row.alone == "product":
        near(products(more.state.adapter), products(fewer.state.adapter), "seven equal clients")
    else:
        _near_states(more.state, fewer.state, "seven equal clients")


def check_nothing_leaks(mode: Mode, row: Properties) -> None:
    """The order in which a process trains its clients, and another run in the same process, change no bit."""
    straight = Federation(mode).run((1,), MISSES.__getitem__)
    backwards = Federation(mode, backwards=not row.order_matters).run((1,), MISSES.__getitem__)
    other = Federation(mode, owner=lambda client: client + 50)
    for number in (2, 3, 4):
        straight.run((number,), MISSES.__getitem__)
        other.run((number - 1,))
        backwards.run((number,), MISSES.__getitem__)
    assert _bits(straight) == _bits(backwards), "the order of training shows"
    assert _bits(Federation(mode).run((1, 2, 3, 4), MISSES.__getitem__)) == _bits(straight), "another run shows"


def _bits(federation: Federation) -> list[str]:
    groups = [federation.state.adapter, *federation.state.slots.values()]
    for _, memory in sorted(federation.memories.items()):
        groups += [memory.adapter or {}, *memory.slots.values()]
    return [fingerprint(group) for group in groups]


def check_resume(mode: Mode, row: Properties) -> None:
    """State and memories as bytes, and halves made anew: after any round the run goes on to the same bits."""
    whole = Federation(mode).run((1, 2, 3, 4), MISSES.__getitem__)
    for stop in (1, 2, 3):
        broken = Federation(mode).run(range(1, stop + 1), MISSES.__getitem__)
        anew = Mode(replace(mode.strategy), replace(mode.rule), mode.order)  # type: ignore[type-var]
        rest = broken.resumed(anew, broken.saved()).run(range(stop + 1, 5), MISSES.__getitem__)
        assert _bits(rest) == _bits(whole), f"resumed after round {stop}"


def check_fixed_point(mode: Mode, row: Properties) -> None:
    """Clients that send what they started from leave the product where it was, and an untrained adapter as it is."""
    for start in (adapter(0), fresh()):
        state = begin(mode, start)
        for number in (1, 2, 3):
            download = mode.strategy.broadcast(state, 0, number)
            after = combine(mode, state, [hand_in(mode, download, download.adapter)] * 7, ROWS, number)
            near(products(after.adapter), products(start), "nobody moved")
            if row.alone != "product" or not any(bool(product(start, layer).any()) for layer in LAYERS):
                near(after.adapter, start, "nobody moved")
            state = after


def check_inputs_stay(mode: Mode, row: Properties) -> None:
    """No input is changed: not the state, not what was sent."""
    state = combine(mode, begin(mode), send(mode, begin(mode), row, range(1, 8))[1], ROWS)
    _, sent = send(mode, state, row, range(11, 18), 2)
    groups = [state.adapter, *state.slots.values(), *sent]
    before = [fingerprint(group) for group in groups]
    combine(mode, state, sent, ROWS, 2)
    assert [fingerprint(group) for group in groups] == before


def check_shapes(mode: Mode, row: Properties) -> None:
    """Every round leaves an adapter of the shapes, type and keys it began with; the global one is that one."""
    federation = Federation(mode).run((1, 2))
    for wave in federation.waves:
        for key, value in federation.start.items():
            found = wave.after.adapter[key]
            assert (found.shape, found.dtype) == (value.shape, value.dtype), key
            assert found.is_contiguous(), key
        assert wave.after.adapter.keys() == federation.start.keys()
        named = mode.strategy.global_adapter(wave.after)
        assert (named is not None) == row.has_global
        if named is not None:
            near(named, wave.after.adapter, "the global adapter", 0.0)


def check_one_rounding(mode: Mode, row: Properties) -> None:
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
        narrow_, wide_ = products({k: v.double() for k, v in narrow.adapter.items()}), products(wide.adapter)
        for layer, value in wide_.items():
            assert bool(((narrow_[layer] - value).abs() <= 1e-6 * value.abs().max()).all()), layer
    else:
        for key, value in wide.adapter.items():
            # half of the distance between neighbours in float32 from 4096 to 8192
            apart = (narrow.adapter[key].double() - value).abs().max()
            assert float(apart) <= 2.0**-12 * 1.0001, f"{key} is {float(apart):g} away: rounded more than once"


def check_ranks_do_not_broadcast(mode: Mode, row: Properties) -> None:
    """A client of rank 1 among clients of rank 2 is refused, not spread over both."""
    state = begin(mode)
    _, sent = send(mode, state, row, range(1, 8))
    if row.combines == "nothing":
        return
    thin = {key: value[:1] if ".lora_A." in key else value[:, :1] for key, value in sent[0].items()}
    try:
        combine(mode, state, [*sent[1:], thin], ROWS)
    except (ValueError, RuntimeError):
        return
    raise AssertionError("a rank-1 update was spread over a rank-2 adapter")


def check_scale(mode: Mode, row: Properties) -> None:
    """Training B alone, `(s, eta)` and `(c s, eta / c^2)` give the same products `s B A`, in every round.

    d(s B A) is `s^2 eta G A^T A`; a missing alpha / r anywhere breaks it.
    """
    ways = []
    for factor in (1.0, 3.0):
        setup = Setup(scaling=1.5 * factor, rate=0.02 / factor**2)
        waves = Federation(mode, setup).run((1, 2, 3)).waves
        ways.append([{k: setup.scaling * v for k, v in products(wave.after.adapter).items()} for wave in waves])
    for one, other in zip(*ways, strict=True):
        near(one, other, "the same way at another scale")


def check_turns(mode: Mode, row: Properties) -> None:
    """FedRot turns by rotations: of determinant 1, also where a reflection would come nearer."""
    state, mirror = adapter(1), torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    reference = {key: mirror @ v if ".lora_A." in key else v @ mirror for key, v in state.items()}
    for number in (1, 2):
        download = mode.strategy.broadcast(ServerState(reference), 0, number)
        turned = hand_in(replace(mode, rule=replace(mode.rule, rotation_strength=1.0)), download, state)
        for layer in LAYERS:
            key = f"{layer}.lora_A.weight"
            turn = turned[key] @ torch.linalg.pinv(state[key])
            assert abs(float(torch.linalg.det(turn)) - 1) <= 1e-9, f"{layer}: a reflection"


Check = Callable[[Mode, Properties], None]

EVERY_MODE: tuple[Check, ...] = (
    check_one_client,
    check_equal_clients,
    check_order,
    check_weights,
    check_combination,
    check_waves,
    check_first_step,
    check_halves,
    check_everybody_starts_alike,
    check_missed_rounds,
    check_equal_rows_train_as_one,
    check_nothing_leaks,
    check_resume,
    check_fixed_point,
    check_inputs_stay,
    check_shapes,
    check_one_rounding,
    check_ranks_do_not_broadcast,
)
