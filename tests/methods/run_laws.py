"""Laws of runs that train, which a mode's row of method_properties.py promises: functions that raise AssertionError.

They hold a federation of linear regressions (linear_federation.py) against the promises, wave by wave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from federation_of_one_round import LAYERS, adapter
from identities import (
    Check,
    beneath,
    best_of_rank,
    left_by,
    mean_of,
    near,
    near_states,
    plain,
    plus,
    products,
    weights_of,
)
from linear_federation import Federation, Setup, gradient_of, train
from method_properties import Properties

from fedlora.federated.adapters import fingerprint, pick_half, zeros_like
from fedlora.methods.choosing import LoadedMethod, load_method
from fedlora.types import BaseDelta, ClientMemory, ServerState

MISSES = {1: (0, 1, 2, 3, 4, 5, 6), 2: (1, 2, 3, 4, 5), 3: (2, 3, 4, 5, 6), 4: (0, 1, 2, 3, 4)}
"""Cohorts of four rounds: client 0 takes part in the first and the last."""

AVERAGED = ("products", "cut", "factors")
"""What a row's `combines` says of modes whose clients are averaged."""


def check_waves(mode: LoadedMethod, row: Properties) -> None:
    """In a run that trains: every wave of an exact mode leaves the mean of its clients' products."""
    federation = Federation(plain(mode, row)).run((1, 2, 3))
    for wave in federation.waves:
        clients = sorted(wave.turns)
        trained = [products(wave.turns[client].trained) for client in clients]
        rows = [wave.turns[client].update.num_examples for client in clients]
        mean = mean_of(trained, weights_of(row, rows, trained))
        wanted, found = plus(mean, beneath(wave.before)), left_by(wave.after)
        if row.combines == "products":
            near(found, wanted, f"round {wave.round}: the mean of products")
        elif row.combines == "cut":
            near(found, {layer: best_of_rank(value) for layer, value in wanted.items()}, f"round {wave.round}: the cut")
        elif row.combines == "factors" and row.has_global:
            assert max(float((found[layer] - wanted[layer]).abs().max()) for layer in LAYERS) > 1e-8


def check_first_step(mode: LoadedMethod, row: Properties) -> None:
    """From B = 0 one plain step leaves A alone, so that even the mean of factors is exact; more steps do not.

    The step is `-eta s dL/d(s B A) A^T`: it moves B wherever B is trained.
    """
    for steps, exact in ((1, True), (8, row.combines == "products")):
        mode_ = plain(mode, row)
        (wave,) = Federation(mode_, Setup(steps=steps)).run((1,)).waves
        moved = [turn.trained for _, turn in sorted(wave.turns.items())]
        for one in moved:
            assert all(float(one[key].abs().max()) > 1e-6 for key in pick_half(one, "B")), "the first round trains no B"
        if steps == 1:
            assert all(torch.equal(one[key], wave.before.adapter[key]) for one in moved for key in pick_half(one, "A"))
        if row.combines in AVERAGED and row.has_global:
            rows = [turn.update.num_examples for _, turn in sorted(wave.turns.items())]
            made = [products(one) for one in moved]
            wanted = mean_of(made, weights_of(row, rows, made))
            found = left_by(wave.after)
            off = max(float((found[layer] - wanted[layer]).abs().max()) for layer in LAYERS)
            assert (off <= 1e-10) == exact, f"{steps} steps: {off:g} from the mean of products"


def check_one_step_is_centralised(mode: LoadedMethod, row: Properties) -> None:
    """Equal numbers of rows, B = 0 and one plain step: the product is that of one trainer with everybody's rows."""
    together = Federation(load_method("pooled"), Setup(steps=1)).run((1,))
    apart = Federation(plain(mode, row), Setup(steps=1), rows=lambda _: 10).run((1,))
    near(left_by(apart.state), left_by(together.state), "one step on everybody's rows")


def check_halves(mode: LoadedMethod, row: Properties) -> None:
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
        if row.has_global and not row.draws_anew:
            assert all(torch.equal(federation.start[key], wave.before.adapter[key]) for key in absent)


def check_everybody_starts_alike(mode: LoadedMethod, row: Properties) -> None:
    """All clients of a round are handed the same, and start there except for what is their own."""
    for wave in Federation(mode).run((1, 2)).waves:
        for turn in wave.turns.values():
            near(turn.download.adapter, wave.before.adapter, "another adapter than the server's", 0.0)
            start = turn.start
            own = {} if row.keeps == "none" else pick_half(start, row.keeps)
            common = start.keys() - own.keys()
            assert all(torch.equal(start[key], wave.before.adapter[key]) for key in common), "another start"


def check_missed_rounds(mode: LoadedMethod, row: Properties) -> None:
    """A client of rounds 1 and 4 goes on in round 4 from what it had in round 1, beside what the server has by then."""
    federation = Federation(mode).run((1, 2, 3, 4), MISSES.__getitem__)
    first, *_, last = federation.waves
    before, turn = first.turns[0], last.turns[0]
    own = pick_half(before.trained, row.keeps) if row.keeps != "none" else {}
    near(turn.start, {**last.before.adapter, **own}, "where a client starts that was away", 0.0)
    has_memory = before.update.memory.adapter is not None
    assert has_memory == (row.keeps != "none" or row.has_own_model), "a memory that nothing asks for"
    assert frozenset(last.after.slots) == row.slots, "another server state than promised"
    if row.keeps_control:
        mine = before.update.memory.slots["control"]
        wanted = {key: value - mine[key] for key, value in last.before.slots["control"].items()}
        found = turn.phases[0].correction
        assert found is not None, "no correction"
        near(found, wanted, "the correction of a client that was away")


def check_controls(mode: LoadedMethod, row: Properties) -> None:
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


def check_pull(mode: LoadedMethod, row: Properties) -> None:
    """FedProx: two steps by hand, `y - eta (g(y) + mu (y - x))`; the first of them has no pull; more mu, less way."""
    start, setup = adapter(0), Setup(steps=2)
    ways = []
    for mu in (0.0, 1.0, 20.0):
        rule = replace(mode.client, proximal_mu=mu)
        (phase,) = rule.phases(mode.server.broadcast(ServerState(start), 0, 1), ClientMemory())
        found = train(phase, [0], setup).adapter
        place = {key: value.clone() for key, value in start.items()}
        for _ in range(setup.steps):
            slope = gradient_of(place, [0], setup)
            place = {key: y - setup.rate * (slope[key] + mu * (y - start[key])) for key, y in place.items()}
        near(found, place, f"mu {mu:g}")
        ways.append(sum(float((found[key] - start[key]).square().sum()) for key in start))
    assert ways == sorted(ways, reverse=True)
    assert ways[0] > ways[-1] * 1.01


def check_beneath(mode: LoadedMethod, row: Properties) -> None:
    """Everybody trains on all that was added to the base, whatever rounds it missed; or on nothing else, ever."""
    for wave in Federation(mode).run((1, 2, 3, 4), MISSES.__getitem__).waves:
        wanted = beneath(wave.before)
        for turn in wave.turns.values():
            given = ServerState({}, base=BaseDelta(background=turn.phases[0].background or {}))
            found = beneath(given)
            assert found.keys() == wanted.keys(), "another base than the server's"
            near(found, wanted, "another base than the server's")


def check_own_models(mode: LoadedMethod, row: Properties) -> None:
    """Own models stay with their clients: the server's way is FedAvg's to the bit. What they are is the paper's.

    Ditto's is pulled to the global adapter it was sent; FedDPA's mixes outputs, `(1 - a) B_g A_g + a B_l A_l`.
    """
    federation = Federation(mode).run((1, 2, 3), MISSES.__getitem__)
    plain_way = Federation(load_method("homo")).run((1, 2, 3), MISSES.__getitem__)
    assert fingerprint(federation.state.adapter) == fingerprint(plain_way.state.adapter), "another way than FedAvg's"
    for wave in federation.waves:
        for turn in wave.turns.values():
            own, start, local = turn.update.memory.adapter, turn.download.adapter, turn.results[1].adapter
            assert own is not None, "no own model"
            if turn.phases[1].anchor is not None:
                near(turn.phases[1].anchor, start, "pulled elsewhere", 0.0)
                near(own, local, "another own model than was trained", 0.0)
            else:
                share = mode.client.personal_weight
                wanted = mean_of([products(start), products(local)], [1 - share, share])
                near(products(own), wanted, "another mix than that of outputs")


def check_equal_rows_train_as_one(mode: LoadedMethod, row: Properties) -> None:
    """Seven clients with the same rows are one of them, round after round (five, where a method needs as many)."""
    fewer = Federation(mode, clients=row.fewest, owner=lambda _: 3).run((1, 2, 3))
    more = Federation(mode, clients=7, owner=lambda _: 3).run((1, 2, 3))
    if row.alone == "product":
        near(left_by(more.state), left_by(fewer.state), "seven equal clients")
    else:
        near_states(more.state, fewer.state, "seven equal clients")


def check_nothing_leaks(mode: LoadedMethod, row: Properties) -> None:
    """The order in which a process trains its clients, and another run in the same process, change no bit."""
    straight = Federation(mode).run((1,), MISSES.__getitem__)
    backwards = Federation(mode, backwards=not row.order_matters).run((1,), MISSES.__getitem__)
    other = Federation(mode, owner=lambda client: client + 50)
    for number in (2, 3):
        straight.run((number,), MISSES.__getitem__)
        other.run((number - 1,))
        backwards.run((number,), MISSES.__getitem__)
    assert _bits(straight) == _bits(backwards), "the order of training shows"
    assert _bits(Federation(mode).run((1, 2, 3), MISSES.__getitem__)) == _bits(straight), "another run shows"


def _bits(federation: Federation) -> list[str]:
    base = federation.state.base
    groups = [federation.state.adapter, *federation.state.slots.values(), base.background if base else {}]
    for _, memory in sorted(federation.memories.items()):
        groups += [memory.adapter or {}, *memory.slots.values()]
    return [fingerprint(group) for group in groups]


def check_resume(mode: LoadedMethod, row: Properties) -> None:
    """State and memories as bytes, and halves made anew: after any round the run goes on to the same bits."""
    whole, saved = Federation(mode), {}
    for number in (1, 2, 3, 4):
        whole.run((number,), MISSES.__getitem__)
        saved[number] = whole.saved()
    for stop in (1, 2, 3):
        anew = replace(mode, server=replace(mode.server), client=replace(mode.client))  # type: ignore[type-var]
        rest = whole.resumed(anew, saved[stop]).run(range(stop + 1, 5), MISSES.__getitem__)
        assert _bits(rest) == _bits(whole), f"resumed after round {stop}"


def check_shapes(mode: LoadedMethod, row: Properties) -> None:
    """Every round leaves an adapter of the shapes, type and keys it began with; the global one is that one."""
    federation = Federation(mode).run((1, 2))
    for wave in federation.waves:
        for key, value in federation.start.items():
            found = wave.after.adapter[key]
            assert (found.shape, found.dtype) == (value.shape, value.dtype), key
            assert found.is_contiguous(), key
        assert wave.after.adapter.keys() == federation.start.keys()
        named = mode.server.global_adapter(wave.after)
        assert (named is not None) == row.has_global
        if named is not None:
            near(named, wave.after.adapter, "the global adapter", 0.0)


def check_scale(mode: LoadedMethod, row: Properties) -> None:
    """Training B alone, `(s, eta)` and `(c s, eta / c^2)` give the same products `s B A`, in every round.

    d(s B A) is `s^2 eta G A^T A`; a missing alpha / r anywhere breaks it.
    """
    ways = []
    for factor in (1.0, 3.0):
        setup = Setup(scaling=1.5 * factor, rate=0.02 / factor**2)
        waves = Federation(mode, setup).run((1, 2, 3)).waves
        ways.append([{k: setup.scaling * v for k, v in left_by(wave.after).items()} for wave in waves])
    for one, other in zip(*ways, strict=True):
        near(one, other, "the same way at another scale")


EVERY_RUN: tuple[Check, ...] = (
    check_waves,
    check_first_step,
    check_one_step_is_centralised,
    check_halves,
    check_everybody_starts_alike,
    check_missed_rounds,
    check_equal_rows_train_as_one,
    check_beneath,
    check_nothing_leaks,
    check_resume,
    check_shapes,
)

ONLY: Mapping[Check, Callable[[LoadedMethod, Properties], bool]] = {
    check_waves: lambda mode, row: (
        row.combines in ("products", "cut") or (row.combines == "factors" and row.has_global)
    ),
    check_first_step: lambda mode, row: not row.order_matters,
    check_one_step_is_centralised: lambda mode, row: (
        row.combines in AVERAGED and row.has_global and not (row.order_matters or row.weighs_by_norm)
    ),
    check_missed_rounds: lambda mode, row: not row.order_matters and mode.order != "pooled",
    check_equal_rows_train_as_one: lambda mode, row: not row.order_matters,
}
"""Laws that do not hold of every mode: of which they do."""
