"""A federation that really trains, in float64 and without a language model: linear regression through LoRA layers.

It obeys whatever a method says (waves, downloads, phases, memories) as the engines do, with `s` other than 1, and adds
to the gradient what `fedlora.llm.local_gradient` adds. Every wave is recorded, so that a law can be tried on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.engines.messages import pack, unpack
from fedlora.federated.adapters import pick_half, zeros_like
from fedlora.federated.base_delta import append
from fedlora.laws.federation_of_one_round import LAYERS, adapter
from fedlora.llm.local_gradient import GradientTerms
from fedlora.methods.choosing import LoadedMethod
from fedlora.paths import POOLED
from fedlora.types import (
    AdapterState,
    BaseDelta,
    ClientMemory,
    ClientUpdate,
    Download,
    LocalResult,
    Phase,
    RoundContext,
    ServerState,
)


@dataclass(frozen=True)
class Setup:
    """How every client trains: `steps` of SGD on the mean squared error over all of its rows."""

    steps: int = 3
    rate: float = 0.02
    scaling: float = 1.5


def fresh(seed: int = 0) -> dict[str, Tensor]:
    """An untrained adapter: A as drawn, B zero."""
    return {key: value * (".lora_A." in key) for key, value in adapter(seed).items()}


@cache
def rows_of(owners: tuple[int, ...], layer: str) -> tuple[Tensor, Tensor]:
    """Ten rows (x, y) of each owner; a teacher of its own makes y from x."""
    if len(owners) > 1:
        x, y = (torch.cat(part) for part in zip(*(rows_of((owner,), layer) for owner in owners), strict=True))
        return x, y
    d_out, d_in = LAYERS[layer]
    owner = next(iter(owners))
    draw = torch.Generator().manual_seed(1000 * owner + sum(map(ord, layer)))
    x = torch.randn(10, d_in, generator=draw, dtype=torch.float64)
    return x, x @ torch.randn(d_in, d_out, generator=draw, dtype=torch.float64)


def loss_of(factors: Mapping[str, Tensor], owners: Sequence[int], scaling: float) -> Tensor:
    """Half the mean squared error of `s B A x` over the owners' rows, summed over the layers."""
    total = torch.zeros((), dtype=torch.float64)
    for layer in LAYERS:
        a, b = (factors[f"{layer}.lora_{half}.weight"] for half in "AB")
        x, y = rows_of(tuple(owners), layer)
        total = total + 0.5 * (scaling * (x @ a.T) @ b.T - y).square().sum() / len(x)
    return total


def _behind(background: AdapterState, layer: str, x: Tensor) -> Tensor:
    """What the background makes of x: factors, or one dense matrix, with a scaling of 1."""
    if f"{layer}.delta.weight" in background:
        return x @ background[f"{layer}.delta.weight"].T
    if f"{layer}.lora_A.weight" in background:
        return (x @ background[f"{layer}.lora_A.weight"].T) @ background[f"{layer}.lora_B.weight"].T
    return torch.zeros((), dtype=torch.float64)


def gradient_of(state: AdapterState, owners: Sequence[int], setup: Setup = Setup()) -> dict[str, Tensor]:
    """The gradient of the loss alone at one place."""
    leaves = {key: value.clone().requires_grad_() for key, value in state.items()}
    loss_of(leaves, owners, setup.scaling).backward()
    return {key: value.grad if value.grad is not None else torch.zeros_like(value) for key, value in leaves.items()}


@torch.no_grad()
def train(phase: Phase, owners: Sequence[int], setup: Setup, *, needs_gradient: bool = False) -> LocalResult:
    """Plain SGD from the phase's start over the factors that it trains.

    The gradient is written out, which is several times as fast as autograd; `gradient_of` is the oracle for it.
    """
    place = {key: nn.Parameter(value.clone()) for key, value in phase.start.items()}
    factors = pick_half(place, phase.trainable)
    terms = GradientTerms(phase, factors, needs_mean=needs_gradient)
    scaling, rows = setup.scaling * phase.weight, {layer: rows_of(tuple(owners), layer) for layer in LAYERS}
    wanted = {layer: y - _behind(phase.background or {}, layer, x) for layer, (x, y) in rows.items()}
    for _ in range(setup.steps):
        for layer, (x, _) in rows.items():
            a, b = (place[f"{layer}.lora_{half}.weight"] for half in "AB")
            inner = x @ a.T
            slope = (scaling * inner @ b.T - wanted[layer]) * (scaling / len(x))
            a.grad, b.grad = (slope @ b).T @ x, slope.T @ inner
        terms.add()
        terms.count()
        for factor in factors.values():
            if factor.grad is not None:
                factor.sub_(factor.grad, alpha=setup.rate)
    return LocalResult({key: value.detach().clone() for key, value in place.items()}, terms.mean())


@dataclass(frozen=True)
class Turn:
    """What one client did in one wave; the server sees the first of its phases."""

    download: Download
    phases: tuple[Phase, ...]
    results: Sequence[LocalResult]
    update: ClientUpdate

    @property
    def start(self) -> AdapterState:
        return self.phases[0].start

    @property
    def trained(self) -> AdapterState:
        return self.results[0].adapter


@dataclass(frozen=True)
class WaveRecord:
    """One aggregation: the state before and after, and every member's turn by client."""

    round: int
    before: ServerState
    turns: Mapping[int, Turn]
    after: ServerState


@dataclass
class Federation:
    """A run of one method; `owner` says whose rows a client holds, `rows` how many it claims to have."""

    mode: LoadedMethod
    setup: Setup = Setup()
    clients: int = 7
    owner: Callable[[int], int] = lambda client: client
    rows: Callable[[int], int] = lambda client: (5, 2, 9, 1, 4, 7, 3)[client % 7]
    start: AdapterState = field(default_factory=fresh)
    backwards: bool = False
    waves: list[WaveRecord] = field(default_factory=list)
    memories: dict[int, ClientMemory] = field(default_factory=dict)
    resumed_from: ServerState | None = None

    def __post_init__(self) -> None:
        begun = self.mode.server.init(self.start, tuple(range(self.clients)))
        self.state = begun if self.resumed_from is None else self.resumed_from

    def run(self, rounds: Sequence[int], cohort: Callable[[int], Sequence[int]] | None = None) -> Federation:
        """Several rounds; returns itself."""
        for number in rounds:
            members = tuple(cohort(number)) if cohort else tuple(range(self.clients))
            for index, wave in enumerate(self.mode.waves(members, shuffle=False, seed=0, round_number=number)):
                everybody, scaling = tuple(range(self.clients)), self.setup.scaling
                self._run_wave(RoundContext(number, index, everybody, members, scaling=scaling), wave)
        return self

    def _run_wave(self, context: RoundContext, wave: Any) -> None:
        before = self.state
        # the order in which clients train must not reach a result, so no client sees another's draws
        turns = {client: self._train(client, rows_of, context) for client, rows_of in self._in_order(wave)}
        updates = [turns[client].update for client in sorted(turns)]
        self.state = self.mode.server.aggregate(before, updates, context)
        self.memories |= {update.client_id: update.memory for update in updates}
        self.waves.append(WaveRecord(context.round, before, turns, self.state))

    def _in_order(self, wave: Any) -> Sequence[Any]:
        return list(reversed(wave)) if self.backwards else wave

    def _train(self, client: int, rows_of: Sequence[int], context: RoundContext) -> Turn:
        strategy, rule = self.mode.server, self.mode.client
        memory = self.memories.get(client, ClientMemory())
        download = strategy.broadcast(self.state, client, context.round)
        phases, owners = rule.phases(download, memory), [self.owner(member) for member in rows_of]
        results = [train(phase, owners, self.setup, needs_gradient=rule.needs_gradient) for phase in phases]
        upload, memory = rule.upload(results, download, memory)
        sent, extra = (upload.adapter, upload.extra) if upload else (None, {})
        rows = sum(self.rows(member) for member in rows_of) if client == POOLED else self.rows(client)
        update = ClientUpdate("", context.round, client, sent, memory, rows, 1, self.setup.steps, "", {}, extra)
        return Turn(download, phases, results, update)

    def saved(self) -> bytes:
        """State and memories as bytes: what a checkpoint holds."""
        groups: dict[str, AdapterState] = {"adapter": self.state.adapter}
        groups |= {f"slot:{name}": group for name, group in self.state.slots.items()}
        for client, memory in self.memories.items():
            groups |= {f"memory:{client}:{name}": group for name, group in memory.slots.items()}
            groups |= {f"own:{client}": memory.adapter} if memory.adapter is not None else {}
        increments = self._increments()
        groups |= {f"base:{number}": factors for number, factors in increments or []}
        header = {"clients": sorted(self.memories), "has_base": increments is not None}
        return pack(header, groups)

    def _increments(self) -> list[tuple[int, AdapterState]] | None:
        """What each round added to the base, None where the method never does."""
        if self.state.base is None:
            return None
        grown = [wave for wave in self.waves if _links(wave.after) > _links(wave.before)]
        return [(wave.round, wave.after.base.newest) for wave in grown if wave.after.base]

    def resumed(self, mode: LoadedMethod, saved: bytes) -> Federation:
        """A run that resumes from a checkpoint and has never seen anything else."""
        header, groups = unpack(saved)
        base = BaseDelta() if header["has_base"] else None
        for number, factors in _named("base", groups).items():
            base = append(base or BaseDelta(), int(number), factors)
        memories = {
            client: ClientMemory(groups.get(f"own:{client}"), slots=_named(f"memory:{client}", groups))
            for client in header["clients"]
        }
        state = ServerState(groups["adapter"] or {}, _named("slot", groups), base=base)
        return replace(self, mode=mode, waves=[], memories=memories, resumed_from=state)


def _named(kind: str, groups: Mapping[str, AdapterState | None]) -> dict[str, AdapterState]:
    """Name -> group, of those that were saved as `kind:name`, in their order."""
    return {name.removeprefix(f"{kind}:"): group or {} for name, group in groups.items() if name.startswith(f"{kind}:")}


def _links(state: ServerState) -> int:
    return len(state.base.links) if state.base else 0


def hand_in(mode: LoadedMethod, download: Download, trained: AdapterState) -> AdapterState:
    """What a client without memory sends of a trained adapter."""
    phases = mode.client.phases(download, ClientMemory())
    results = [LocalResult(trained, zeros_like(trained)) for _ in phases]
    upload, _ = mode.client.upload(results, download, ClientMemory())
    return upload.adapter if upload else {}
