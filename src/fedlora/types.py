"""The values that travel between the layers.

torch is imported for type checking only, so that the entry points can use these names and stay fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

AdapterState = Mapping[str, "Tensor"]
"""PEFT key -> float32 CPU tensor, A: (r, d_in), B: (d_out, r); never mutated."""

Half = Literal["both", "A", "B"]
"""Which of the two factors."""

ClientId = int
FailureKind = Literal["diverged", "invalid", "data", "crashed", "out_of_memory", "lost", "late", "refused"]
RETRYABLE: frozenset[FailureKind] = frozenset({"out_of_memory", "lost"})
"""Failures of the infrastructure; the others repeat themselves, for every draw of a client comes from its seed."""


@dataclass(frozen=True)
class BaseLink:
    """One increment of the base without its tensors: made in round `version`, of rank `ranks[layer]`.

    `sha256` is over the parent's and the tensors; `truncation_error` is what was cut of it, relative to the whole.
    """

    version: int
    parent_sha256: str | None
    sha256: str
    ranks: Mapping[str, int]
    truncation_error: float = 0.0


@dataclass(frozen=True)
class BaseDelta:
    """What a run has added to its base so far, kept beside it: one increment a round at most, chained by hash.

    `background` is the sum of all, as a `Phase` takes it: per layer factors, or one dense matrix once that is smaller;
    its scaling is 1. `newest` are the factors of the last increment. Made by `federated.base_delta` only.
    """

    links: tuple[BaseLink, ...] = ()
    background: AdapterState = field(default_factory=dict)
    newest: AdapterState = field(default_factory=dict)

    @property
    def sha256(self) -> str | None:
        """Stands for every bit that was added, in order; None before the first increment."""
        return self.links[-1].sha256 if self.links else None


@dataclass(frozen=True)
class Export:
    """A global model as one adapter of standard form; `relative_error` is what a limit on its `rank` cut off."""

    adapter: AdapterState | None
    rank: int = 0
    relative_error: float = 0.0


@dataclass(frozen=True)
class ServerState:
    """The server's state between rounds: the adapter that clients start from, and named tensors.

    `slots` (momentum, control variates, ...) have PEFT keys like the adapter; `base` is what the method has added to
    the base, None where it adds nothing. A checkpoint is these three. `notes` are numbers of the last
    round for its records (what was cut, say); no round computes from them.
    """

    adapter: AdapterState
    slots: Mapping[str, AdapterState] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)
    base: BaseDelta | None = None


@dataclass(frozen=True)
class Download:
    """What the server sends to a client for one task.

    `travels` names the factors that have to be sent (a client has the others already, or can draw them), `trainable`
    those that are trained and `shared` those that are sent back, where None is nothing; `extra` are further tensors
    with PEFT keys, such as the server's control variate; of `base` those increments are sent that the client has not
    had.
    """

    adapter: AdapterState
    travels: Half | None = "both"
    trainable: Half = "both"
    shared: Half | None = "both"
    extra: Mapping[str, AdapterState] = field(default_factory=dict)
    base: BaseDelta | None = None


class GradientTerm(Protocol):
    """A method's term of the gradient, added to `.grad` of the trained factors (PEFT key -> parameter)."""

    def add_gradient(self, factors: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Phase:
    """One stretch of local training from `start`.

    Each step's gradient is the loss's, plus `proximal_mu * (x - anchor)`, `correction` and `terms`. The update is
    `weight * s * B @ A`, beside a `background` that is not trained (factors, or dense as `<layer>.delta.weight`).
    """

    start: AdapterState
    trainable: Half = "both"
    proximal_mu: float = 0.0
    anchor: AdapterState | None = None
    correction: AdapterState | None = None
    background: AdapterState | None = None
    weight: float = 1.0
    terms: tuple[GradientTerm, ...] = ()


@dataclass(frozen=True)
class LocalResult:
    """What a phase left: the adapter and, where a rule needs it, the mean gradient: over its steps that which the
    optimizer got, with all terms and clipped, less the phase's correction."""

    adapter: AdapterState
    mean_gradient: AdapterState | None = None


@dataclass(frozen=True)
class ClientMemory:
    """What stays with a client between its tasks; committed together with the update it belongs to.

    `adapter` is the client's personal model, of any rank; `slots` are further tensors that its rule needs next time.
    """

    adapter: AdapterState | None = None
    optimizer: Mapping[str, Tensor] | None = None
    slots: Mapping[str, AdapterState] = field(default_factory=dict)


@dataclass(frozen=True)
class Upload:
    """What leaves a client: the shared factors of its adapter, and further tensors that its rule names."""

    adapter: AdapterState
    extra: Mapping[str, AdapterState] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainTask:
    """One client's work in one wave of one round.

    `id` is a hash of everything the answer depends on, which the client sends back: an update that answers another
    task is recognised, however similar it is. `rows_of` names the clients whose rows are used (the
    client itself, except in `pooled`); `accepted` is the round of this client's last committed update, whose memory it
    starts from.
    """

    id: str
    round: int
    wave: int
    client_id: ClientId
    rows_of: tuple[ClientId, ...]
    download: Download
    accepted: int | None = None


@dataclass(frozen=True)
class ClientUpdate:
    """What one client's training left: `upload` and `extra` go to the server, `memory` stays with the client.

    `upload` holds the factors that the task shares, `extra` what the client's rule sends besides. An adapter that was
    trained on a base with additions means something on that base only, which `base_sha256` names. Where a client is
    another machine its memory does not come along; `adapter_stays` says that an adapter of its own is in it.
    """

    task_id: str
    round: int
    client_id: ClientId
    upload: AdapterState | None
    memory: ClientMemory
    num_examples: int
    num_tokens: int
    num_steps: int
    started_from: str
    metrics: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, AdapterState] = field(default_factory=dict)
    base_sha256: str | None = None
    adapter_stays: bool = False


@dataclass(frozen=True)
class Step:
    """One optimizer step of a client's training: `step` of `steps`, both counted from 1.

    `part` is 2 where a method trains a client's personal model after the shared one. `loss` is in nats per response
    token, None where a private lot was empty; tokens are those of whole examples, prompts included.
    """

    round: int
    client_id: ClientId
    step: int
    steps: int
    loss: float | None
    num_examples: int
    num_tokens: int
    seconds: float
    learning_rate: float
    part: int = 1


def no_step(step: Step) -> None:
    """For who watches no steps."""


@dataclass(frozen=True)
class ClientFailure:
    """A client that gave no usable update, and why."""

    client_id: ClientId
    kind: FailureKind
    reason: str

    @property
    def is_retryable(self) -> bool:
        """Whether the same task may succeed at another moment."""
        return self.kind in RETRYABLE

    def record(self) -> dict[str, Any]:
        """The failure as JSON values, for manifest and metrics."""
        return {"client_id": self.client_id, "kind": self.kind, "reason": self.reason}


class Updates(Protocol):
    """The updates of one wave: re-iterable, in client-id order, one in memory at a time."""

    def __iter__(self) -> Iterator[ClientUpdate]: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class RoundContext:
    """What a strategy may know about the round it aggregates; `scaling` is `s` in `dW = s * B @ A`."""

    round: int
    wave: int
    clients: Sequence[ClientId]
    cohort: Sequence[ClientId]
    seed: int = 0
    scaling: float = 1.0


@dataclass(frozen=True)
class RoundResult:
    """One finished round, without tensors except the global model it ended with: an adapter, on `base` where the
    method has added to the base.

    `metrics` belong to all of it: what the error meter found, and what the server noted; `privacy` is what the run has
    spent so far, where it is private.
    """

    round: int
    global_adapter: AdapterState | None
    records: Sequence[Mapping[str, Any]]
    failures: Sequence[ClientFailure]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    privacy: Mapping[str, Any] | None = None
    base: BaseDelta | None = None


class ClientPool(Protocol):
    """The clients that train: simulated in this process, or real ones elsewhere."""

    def clients(self) -> Sequence[ClientId]: ...
    def train(self, tasks: Sequence[TrainTask]) -> Iterator[ClientUpdate | ClientFailure]: ...
