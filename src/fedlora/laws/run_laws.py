"""Laws of runs that train: functions that raise BrokenLawError where a method breaks a promise.

They hold a federation of linear regressions (`linear_federation.py`) against the promises, wave by wave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedlora.federated.adapters import fingerprint, pick_half
from fedlora.laws.federation_of_one_round import LAYERS
from fedlora.laws.linear_federation import Federation, Setup
from fedlora.laws.measures import (
    Check,
    beneath,
    best_of_rank,
    hold,
    largest,
    left_by,
    mean_of,
    near,
    near_results,
    plain,
    plus,
    products,
    same_bits,
    weights_of,
)
from fedlora.laws.promises import Promises
from fedlora.methods.choosing import LoadedMethod, load_method
from fedlora.types import BaseDelta, ServerState

MISSES = {1: (0, 1, 2, 3, 4, 5, 6), 2: (1, 2, 3, 4, 5), 3: (2, 3, 4, 5, 6), 4: (0, 1, 2, 3, 4)}
"""Cohorts of four rounds: client 0 takes part in the first and the last."""

AVERAGED = ("products", "cut", "factors")
"""Values of `combines` of methods whose clients are averaged."""


def check_waves(mode: LoadedMethod, row: Promises) -> None:
    """Every wave of a run leaves the promised mean."""
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
            off = max(float((found[layer] - wanted[layer]).abs().max()) for layer in LAYERS)
            hold(off > 1e-8, f"round {wave.round}: called inexact and is {off:.3g} from the mean of products")


def check_first_step(mode: LoadedMethod, row: Promises) -> None:
    """From B = 0 one plain step trains B and leaves A as it is.

    So even the mean of factors is exact after one step, and not after eight. The step is `-eta s dL/d(s B A) A^T`: it
    moves B wherever B is trained.
    """
    for steps, exact in ((1, True), (8, row.combines == "products")):
        mode_ = plain(mode, row)
        (wave,) = Federation(mode_, Setup(steps=steps)).run((1,)).waves
        moved = [turn.trained for _, turn in sorted(wave.turns.items())]
        for one in moved:
            still = [key for key, value in pick_half(one, "B").items() if float(value.abs().max()) <= 1e-6]
            hold(not still, f"the first round trains no B: {still[:1]} stays zero")
        if steps == 1:
            for one in moved:
                same_bits(pick_half(one, "A"), pick_half(wave.before.adapter, "A"), "one step from B = 0 moves A")
        if row.combines in AVERAGED and row.has_global:
            rows = [turn.update.num_examples for _, turn in sorted(wave.turns.items())]
            made = [products(one) for one in moved]
            off = largest(mean_of(made, weights_of(row, rows, made)), left_by(wave.after))
            hold((off <= 1e-10) == exact, f"{steps} steps: {off:.3g} from the mean of products")


def check_one_step_is_centralised(mode: LoadedMethod, row: Promises) -> None:
    """One plain step of all clients is one step of a trainer with all rows."""
    together = Federation(load_method("pooled"), Setup(steps=1)).run((1,))
    apart = Federation(plain(mode, row), Setup(steps=1), rows=lambda _: 10).run((1,))
    near(left_by(apart.state), left_by(together.state), "one step on everybody's rows")


def check_halves(mode: LoadedMethod, row: Promises) -> None:
    """Clients train, send and get the factors that broadcast names; the others stay to the bit."""
    federation = Federation(mode).run((1, 2, 3, 4))
    for wave in federation.waves:
        trains, shares = row.of_round(row.trains, wave.round), row.of_round(row.shares, wave.round)
        travels = row.of_round(row.travels, wave.round)
        for turn in wave.turns.values():
            found = (turn.download.trainable, turn.download.shared, turn.download.travels)
            hold(found == (trains, shares, travels), f"round {wave.round} trains, shares and sends {found}")
            start, end = turn.start, turn.trained
            idle = start.keys() - pick_half(start, trains).keys()
            same_bits(start, end, "a factor that is not trained moved", idle)
            wanted = pick_half(start, shares).keys() if row.combines != "nothing" else set()
            sent = (turn.update.upload or {}).keys()
            hold(sent == wanted, f"round {wave.round} sends {len(sent)} tensors, {len(wanted)} are shared")
        before, after = wave.before.adapter, wave.after.adapter
        still = before.keys() - pick_half(before, shares).keys()
        if not row.server_rewrites:
            same_bits(before, after, "a factor that is not shared moved", still)
        # who has a factor already must have the one that the server means
        absent = before.keys() - pick_half(before, travels).keys()
        if row.has_global and not row.draws_anew:
            same_bits(federation.start, before, "a factor that is not sent has changed", absent)


def check_everybody_starts_alike(mode: LoadedMethod, row: Promises) -> None:
    """All clients of a round get the same adapter and start from it, except for what is their own."""
    for wave in Federation(mode).run((1, 2)).waves:
        handed = next(iter(wave.turns.values())).download.adapter if row.combines is None else wave.before.adapter
        for turn in wave.turns.values():
            near(turn.download.adapter, handed, "clients are handed different adapters", 0.0)
            own = {} if row.keeps == "none" or row.keeps is None else pick_half(turn.start, row.keeps)
            common = turn.start.keys() - own.keys()
            same_bits(turn.start, handed, "another start", common)


def check_missed_rounds(mode: LoadedMethod, row: Promises) -> None:
    """A client that missed rounds starts from the server's adapter and from what it kept."""
    federation = Federation(mode).run((1, 2, 3, 4), MISSES.__getitem__)
    first, *_, last = federation.waves
    before, turn = first.turns[0], last.turns[0]
    keeps = row.keeps or "none"
    own = pick_half(before.trained, keeps) if keeps != "none" else {}
    near(turn.start, {**turn.download.adapter, **own}, "where a client starts that was away", 0.0)
    has_memory = before.update.memory.adapter is not None
    hold(has_memory == (keeps != "none" or row.has_own_model), f"a client keeps an adapter: {has_memory}")
    if row.slots is not None:
        found = frozenset(last.after.slots)
        hold(found == row.slots, f"the server's state is {sorted(found)}, promised {sorted(row.slots)}")


def check_beneath(mode: LoadedMethod, row: Promises) -> None:
    """Every client trains on all that earlier rounds added to the base model."""
    for wave in Federation(mode).run((1, 2, 3, 4), MISSES.__getitem__).waves:
        wanted = beneath(wave.before)
        for turn in wave.turns.values():
            given = ServerState({}, base=BaseDelta(background=turn.phases[0].background or {}))
            near(beneath(given), wanted, "another base than the server's")


def check_equal_rows_train_as_one(mode: LoadedMethod, row: Promises) -> None:
    """Clients with the same rows train as one client."""
    fewer = Federation(mode, clients=row.fewest, owner=lambda _: 3).run((1, 2, 3))
    more = Federation(mode, clients=7, owner=lambda _: 3).run((1, 2, 3))
    near_results(more.state, fewer.state, "seven equal clients", row)


def check_nothing_leaks(mode: LoadedMethod, row: Promises) -> None:
    """Neither the order of training nor another run in the process changes a bit."""
    straight = Federation(mode).run((1,), MISSES.__getitem__)
    backwards = Federation(mode, backwards=not row.order_matters).run((1,), MISSES.__getitem__)
    other = Federation(mode, owner=lambda client: client + 50)
    for number in (2, 3):
        straight.run((number,), MISSES.__getitem__)
        other.run((number - 1,))
        backwards.run((number,), MISSES.__getitem__)
    hold(_bits(straight) == _bits(backwards), "the order of training changes bits")
    again = Federation(mode).run((1, 2, 3), MISSES.__getitem__)
    hold(_bits(again) == _bits(straight), "another run in the process changes bits")


def _bits(federation: Federation) -> list[str]:
    base = federation.state.base
    groups = [federation.state.adapter, *federation.state.slots.values(), base.background if base else {}]
    for _, memory in sorted(federation.memories.items()):
        groups += [memory.adapter or {}, *memory.slots.values()]
    return [fingerprint(group) for group in groups]


def check_resume(mode: LoadedMethod, row: Promises) -> None:
    """A run that is resumed from its stored state ends with the same bits."""
    whole, saved = Federation(mode), {}
    for number in (1, 2, 3, 4):
        whole.run((number,), MISSES.__getitem__)
        saved[number] = whole.saved()
    for stop in (1, 2, 3):
        rest = whole.resumed(mode.with_values({}), saved[stop]).run(range(stop + 1, 5), MISSES.__getitem__)
        hold(_bits(rest) == _bits(whole), f"resumed after round {stop} it ends with other bits")


def check_shapes(mode: LoadedMethod, row: Promises) -> None:
    """Rounds leave an adapter of the same keys, shapes and types, with finite numbers."""
    federation = Federation(mode).run((1, 2))
    for wave in federation.waves:
        hold(wave.after.adapter.keys() == federation.start.keys(), f"round {wave.round} leaves other keys")
        named = mode.server.global_adapter(wave.after)
        hold((named is not None) == row.has_global, f"there is a global model: {named is not None}")
        for group in (wave.after.adapter, *([named] if named is not None else [])):
            for key, value in federation.start.items():
                hold(key in group, f"{key} is missing")
                found = group[key]
                hold((found.shape, found.dtype) == (value.shape, value.dtype), f"{key}: {found.shape}, {found.dtype}")
                hold(found.is_contiguous(), f"{key} is not contiguous")
                hold(bool(found.isfinite().all()), f"round {wave.round}: {key} is not finite")
        if named is not None and row.combines is not None:
            near(named, wave.after.adapter, "the global adapter", 0.0)


def check_scale(mode: LoadedMethod, row: Promises) -> None:
    """Where B alone is trained, scaling and learning rate share the step: `(s, eta)` is `(c s, eta / c^2)`.

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
    check_scale,
)

_CHAIN, _UNKEPT = "the order of clients counts", "`keeps` is not promised"

WHY_NOT: Mapping[Check, Callable[[LoadedMethod, Promises], str]] = {
    check_waves: lambda mode, row: (
        "`combines` is not promised"
        if row.combines is None
        else ""
        if row.combines in ("products", "cut") or (row.combines == "factors" and row.has_global)
        else "no mean is promised"
    ),
    check_first_step: lambda mode, row: _CHAIN if row.order_matters else "",
    check_one_step_is_centralised: lambda mode, row: (
        "`combines` is not promised"
        if row.combines is None
        else "no mean is promised"
        if row.combines not in AVERAGED or not row.has_global or row.weighs_by_norm
        else _CHAIN
        if row.order_matters
        else ""
    ),
    check_everybody_starts_alike: lambda mode, row: _UNKEPT if row.keeps is None else "",
    check_missed_rounds: lambda mode, row: (
        _UNKEPT
        if row.keeps is None
        else _CHAIN
        if row.order_matters
        else "there is one trainer"
        if mode.order == "pooled"
        else ""
    ),
    check_equal_rows_train_as_one: lambda mode, row: _CHAIN if row.order_matters else "",
    check_scale: lambda mode, row: "" if set(row.trains) == {"B"} else "more than B is trained",
}
"""Law -> why a method is not held to it; empty where it is."""
