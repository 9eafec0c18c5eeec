"""What a federated method is to the rest of the code: one row of facts and options, without torch.

A fact that a row does not state is None, and what needs it is refused: nothing is assumed that its author has not said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fedlora.methods.source import Source

Order = Literal["parallel", "chain", "pooled"]
ServerSees = Literal["mean", "mean and more", "mean of several shapes", "mean of products", "single updates", "nothing"]


FAMILIES = MappingProxyType(
    {
        "average": "FedAvg, and its chain: one client after another",
        "baseline": "without federation: every client alone, or all rows in one place",
        "server optimizer": "the server takes an optimizer's step towards the mean",
        "client drift": "clients are kept from drifting apart while they train",
        "one factor": "one factor is trained at a time, so that the mean of factors is the mean of products",
        "alignment": "clients turn their factors towards each other before the mean",
        "exact": "what the mean of factors misses of the mean of products is added to the base",
        "robust": "single updates of any size cannot move the result far",
        "different ranks": "clients have ranks of their own (`--client_ranks 8,4,4,2`)",
        "personal": "each client gets a personal model",
        "own": "methods from outside: a file, a module or an installed package",
    }
)
"""Family -> what its methods do, in the order in which pages list them."""


@dataclass(frozen=True)
class Option:
    """A hyper-parameter of a method, and a flag of that name.

    `kind` is float, int or a Literal; gt, ge, lt and le bound a number. `below` and `at_least` name a field of the
    run's configuration that bounds it too. Where the default is None, `if_none` says what that means.
    """

    name: str
    default: Any
    help: str
    kind: Any = float
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    below: str = ""
    at_least: str = ""
    if_none: str = ""

    @property
    def limits(self) -> dict[str, float]:
        """The bounds that are set, by pydantic's names."""
        bounds = {"gt": self.gt, "ge": self.ge, "lt": self.lt, "le": self.le}
        return {name: bound for name, bound in bounds.items() if bound is not None}

    @property
    def shown_default(self) -> str:
        """The default as help and docs print it."""
        return (
            self.if_none if self.default is None else f"{self.default:g}" if self.kind is float else str(self.default)
        )


@dataclass(frozen=True)
class Method:
    """One federated method: its name, where its two halves are, and the facts that everything else is computed from.

    server, client: `module:Class`, loaded when needed; or instances, as in a method from outside, whose options are
    then their dataclass fields with the values they have as defaults. An `Option` in `options` adds a help text and
    limits to a field.
    order: how a cohort becomes waves. parallel: all clients in one; chain: one client a wave, each starting from what
    the one before left; pooled: one trainer with the rows of all clients.
    server_sees: all that the server computes from the clients' updates. "mean": one mean of the adapters they send;
    "mean and more": they send further tensors; "mean of several shapes": their ranks differ; "mean of products": of
    every client's B A; "single updates"; "nothing".
    rows_weigh: whether a client counts by its examples; (option, value): where that option has that value.
    rewrites_factors: whether a client starts from other factors than those it left, so that the moments of its
    optimizer mean nothing.
    changes_client_training: whether clients train, send or keep otherwise than FedAvg's.
    asks_everybody: whether some rounds train all clients instead of a drawn cohort.
    trains: how often a task trains on its rows.
    ranks_may_differ: whether clients may have ranks of their own (`client_ranks`).
    keeps_personal_model: whether each client gets a personal model, beside a global one or instead of it.
    has_global_model: whether a round leaves one adapter for everybody.
    adds_to_base: whether rounds add to the base, so that it grows.
    bound_to_length: whether rounds depend on how many the run has, so that it cannot be prolonged.
    is_baseline: whether every comparison has it as a row.
    source: where a method from outside comes from; None for those of this package.
    """

    name: str
    family: str = "own"
    summary: str = ""
    paper: str = ""
    server: Any = "fedlora.methods.fedavg:FedAvg"
    client: Any = "fedlora.methods.fedavg:TrainAndSend"
    order: Order = "parallel"
    options: tuple[Option, ...] = ()
    server_sees: ServerSees | None = None
    rows_weigh: bool | tuple[str, Any] | None = None
    rewrites_factors: bool | None = None
    changes_client_training: bool | None = None
    asks_everybody: bool | None = None
    trains: Literal["once", "twice"] | None = None
    ranks_may_differ: bool | None = None
    keeps_personal_model: bool | None = None
    has_global_model: bool | None = None
    adds_to_base: bool | None = None
    bound_to_length: bool | None = None
    is_baseline: bool = False
    source: Source | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.server, str) and isinstance(self.client, str)):
            from fedlora.methods.own_options import read_options

            object.__setattr__(self, "options", read_options(self))

    @property
    def pools_rows(self) -> bool:
        """Whether rows leave their owners, so that there is one trainer and no client."""
        return self.order == "pooled"

    @property
    def combines(self) -> bool:
        """Whether a server makes something of the clients' updates."""
        return self.server_sees != "nothing"

    @property
    def is_server_side(self) -> bool:
        """Whether it differs from FedAvg in nothing but what the server makes of the updates, so that its server can
        take those of any method whose clients send one adapter of one shape."""
        return (
            self.order == "parallel"
            and self.server_sees in ("mean", "single updates")
            and self.changes_client_training is False
            and self.asks_everybody is False
        )

    @property
    def place(self) -> Literal[0, 1, 2, 3, 4]:
        """Where reports list it: clients alone, one after another, their average, other methods, all rows together."""
        if not self.combines:
            return 0
        if self.order != "parallel":
            return 1 if self.order == "chain" else 4
        return 2 if self.family == "average" else 3

    @property
    def num_trainings(self) -> int:
        """How many times a task trains; a method that does not say so is counted once and measured on its first run."""
        return 2 if self.trains == "twice" else 1

    def option(self, name: str) -> Option | None:
        """The option of this name."""
        return next((option for option in self.options if option.name == name), None)

    def values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every option's value: the one in `given`, or the default."""
        return {option.name: given.get(option.name, option.default) for option in self.options}

    def counts_rows(self, given: Mapping[str, Any]) -> bool:
        """Whether a client counts by its examples, with these options given."""
        if isinstance(self.rows_weigh, tuple):
            name, value = self.rows_weigh
            return self.values(given)[name] == value
        return bool(self.rows_weigh)

    def fewest_rounds(self, given: Mapping[str, Any]) -> int:
        """The fewest rounds of a run: one more than the largest of its options that must be below their number."""
        values = self.values(given)
        return 1 + max((values[one.name] for one in self.options if one.below == "num_communication_rounds"), default=0)
