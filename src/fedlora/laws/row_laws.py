"""Laws of the row: what it states about a method is what the code does. A fact that is not stated is not tried.

Privacy, limits, kept moments and `reaggregate` are computed from these facts, so a wrong one is a wrong promise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedlora.federated.ranks import rank_of_adapter
from fedlora.laws.linear_federation import Federation, Turn
from fedlora.laws.measures import Check, begin, hold, same_bits
from fedlora.laws.promises import Promises
from fedlora.methods.choosing import LoadedMethod
from fedlora.types import ClientMemory

RANKS = (1, 2, 1, 2, 1, 2, 2)


def check_states_server_sees(mode: LoadedMethod, row: Promises) -> None:
    """server_sees: clients send no further tensors beside a mean, and nothing where nothing is seen."""
    for turn in _turns(mode):
        upload, extra = turn.update.upload, turn.update.extra
        if mode.server_sees == "mean":
            hold(not extra and not mode.client.sends, f"clients send further tensors: {', '.join(sorted(extra))}")
        if mode.server_sees == "nothing":
            hold(upload is None, "clients send an adapter to a server that sees nothing")
        else:
            hold(upload is not None, "clients send nothing")


def check_states_trains(mode: LoadedMethod, row: Promises) -> None:
    """trains: how often a client trains on its rows in a round."""
    wanted = 2 if mode.trains == "twice" else 1
    found = sorted({len(turn.phases) for turn in _turns(mode)})
    hold(found == [wanted], f"a client has {found} phases in a round, the row says {wanted}")


def check_states_keeps_personal_model(mode: LoadedMethod, row: Promises) -> None:
    """keeps_personal_model: whether clients keep an adapter between rounds."""
    found = mode.client.own_ranks > 0 or any(turn.update.memory.adapter is not None for turn in _turns(mode))
    hold(found == mode.keeps_personal_model, f"clients keep an adapter: {found}")


def check_states_adds_to_base(mode: LoadedMethod, row: Promises) -> None:
    """adds_to_base: whether rounds add to the base model."""
    state = Federation(mode).run((1, 2)).state
    found = state.base is not None and bool(state.base.links)
    hold(found == mode.adds_to_base, f"rounds add to the base: {found}")


def check_states_asks_everybody(mode: LoadedMethod, row: Promises) -> None:
    """asks_everybody: whether some rounds train all clients instead of a drawn cohort."""
    asked = [number for number in range(1, 101) if mode.server.asks_everybody(number)]
    hold(not asked, f"round {asked[:1]} asks everybody")


def check_states_changes_client_training(mode: LoadedMethod, row: Promises) -> None:
    """changes_client_training: false where clients train, send and keep as FedAvg's."""
    state = begin(mode)
    download = mode.server.broadcast(state, 0, 1)
    hold((download.trainable, download.shared) == ("both", "both"), "not both factors are trained and shared")
    phases = mode.client.phases(download, ClientMemory())
    hold(len(phases) == 1, f"a client has {len(phases)} phases")
    phase = phases[0]
    same_bits(phase.start, download.adapter, "a client starts elsewhere than at what it was sent")
    terms = (phase.proximal_mu, phase.correction, phase.terms, phase.weight)
    hold(phase.trainable == "both" and terms == (0.0, None, (), 1.0), "a client's training has terms of its own")
    for turn in _turns(mode):
        hold(turn.update.upload is not None, "a client sends nothing")
        same_bits(turn.update.upload or {}, turn.trained, "a client sends another adapter than it trained")
        kept = turn.update.memory
        hold(kept.adapter is None and not kept.slots, "a client keeps something")


def check_states_ranks_may_differ(mode: LoadedMethod, row: Promises) -> None:
    """ranks_may_differ: every client is handed an adapter of its own rank, and a round with several ranks works."""
    ranked = mode.with_values({"client_ranks": RANKS})
    for wave in Federation(ranked).run((1, 2)).waves:
        for client, turn in wave.turns.items():
            found = rank_of_adapter(turn.download.adapter)
            hold(found == RANKS[client], f"client {client} is handed rank {found}, its own is {RANKS[client]}")


def check_states_bound_to_length(mode: LoadedMethod, row: Promises) -> None:
    """bound_to_length: false where no round depends on how many the run has."""
    reads = [half for half in ("server", "client") if hasattr(getattr(mode, half), "num_communication_rounds")]
    hold(not reads, f"the {' and '.join(reads)} has a field num_communication_rounds")


EVERY_FACT: tuple[Check, ...] = (
    check_states_server_sees,
    check_states_trains,
    check_states_keeps_personal_model,
    check_states_adds_to_base,
    check_states_asks_everybody,
    check_states_changes_client_training,
    check_states_ranks_may_differ,
    check_states_bound_to_length,
)


def _stated(name: str) -> Callable[[LoadedMethod, Promises], str]:
    return lambda mode, row: f"the row does not state {name}" if getattr(mode, name) is None else ""


def _stated_false(name: str, reason: str) -> Callable[[LoadedMethod, Promises], str]:
    return lambda mode, row: _stated(name)(mode, row) or (reason if getattr(mode, name) else "")


WHY_NOT: Mapping[Check, Callable[[LoadedMethod, Promises], str]] = {
    check_states_server_sees: _stated("server_sees"),
    check_states_trains: _stated("trains"),
    check_states_keeps_personal_model: _stated("keeps_personal_model"),
    check_states_adds_to_base: _stated("adds_to_base"),
    check_states_asks_everybody: _stated_false("asks_everybody", "the row says that some rounds do"),
    check_states_changes_client_training: _stated_false("changes_client_training", "the row says that clients differ"),
    check_states_ranks_may_differ: lambda mode, row: (
        "" if mode.ranks_may_differ else "the row does not say that ranks may differ"
    ),
    check_states_bound_to_length: _stated_false("bound_to_length", "the row says that they are"),
}
"""Law -> why a method is not held to it; empty where it is."""


def _turns(mode: LoadedMethod) -> list[Turn]:
    return [turn for wave in Federation(mode).run((1, 2)).waves for turn in wave.turns.values()]
