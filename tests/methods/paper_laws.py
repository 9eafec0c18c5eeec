"""What single papers promise beside the laws of every method: functions that raise BrokenLawError."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedlora.federated.adapters import fingerprint, zeros_like
from fedlora.laws.federation_of_one_round import LAYERS, adapter
from fedlora.laws.linear_federation import Federation, Setup, gradient_of, hand_in, train
from fedlora.laws.measures import hold, mean_of, near, products
from fedlora.laws.promises import Promises
from fedlora.laws.run_laws import MISSES
from fedlora.methods.choosing import LoadedMethod, load_method
from fedlora.types import ClientMemory, ServerState


def check_controls(mode: LoadedMethod, row: Promises) -> None:
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


def check_control_of_the_absent(mode: LoadedMethod, row: Promises) -> None:
    """SCAFFOLD: a client that was away is corrected by `c - c_k`, with the c_k of its own last round."""
    first, *_, last = Federation(mode).run((1, 2, 3, 4), MISSES.__getitem__).waves
    mine = first.turns[0].update.memory.slots["control"]
    wanted = {key: value - mine[key] for key, value in last.before.slots["control"].items()}
    found = last.turns[0].phases[0].correction
    hold(found is not None, "no correction")
    near(found or {}, wanted, "the correction of a client that was away")


def check_pull(mode: LoadedMethod, row: Promises) -> None:
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
    hold(ways == sorted(ways, reverse=True) and ways[0] > ways[-1] * 1.01, f"more mu, no less way: {ways}")


def check_own_models(mode: LoadedMethod, row: Promises) -> None:
    """Personal models stay with their clients: the server's way is FedAvg's to the bit. What they are is the paper's.

    Ditto's is pulled to the global adapter it was sent; FedDPA's mixes outputs, `(1 - a) B_g A_g + a B_l A_l`.
    """
    federation = Federation(mode).run((1, 2, 3), MISSES.__getitem__)
    plain_way = Federation(load_method("homo")).run((1, 2, 3), MISSES.__getitem__)
    hold(fingerprint(federation.state.adapter) == fingerprint(plain_way.state.adapter), "another way than FedAvg's")
    for wave in federation.waves:
        for turn in wave.turns.values():
            own, start, local = turn.update.memory.adapter, turn.download.adapter, turn.results[1].adapter
            hold(own is not None, "no personal model")
            own = own or {}
            if turn.phases[1].anchor is not None:
                near(turn.phases[1].anchor, start, "pulled elsewhere", 0.0)
                near(own, local, "another personal model than was trained", 0.0)
            else:
                share = mode.client.personal_weight
                wanted = mean_of([products(start), products(local)], [1 - share, share])
                near(products(own), wanted, "another mix than that of outputs")


def check_turns(mode: LoadedMethod, row: Promises) -> None:
    """FedRot turns by rotations: of determinant 1, also where a reflection would come nearer."""
    state, mirror = adapter(1), torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    reference = {key: mirror @ v if ".lora_A." in key else v @ mirror for key, v in state.items()}
    for number in (1, 2):
        download = mode.server.broadcast(ServerState(reference), 0, number)
        turned = hand_in(replace(mode, client=replace(mode.client, rotation_strength=1.0)), download, state)
        for layer in LAYERS:
            key = f"{layer}.lora_A.weight"
            turn = turned[key] @ torch.linalg.pinv(state[key])
            hold(abs(float(torch.linalg.det(turn)) - 1) <= 1e-9, f"{layer}: a reflection")
