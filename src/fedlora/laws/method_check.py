"""The public check of a method: every law on it, in seconds and without a language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from fedlora.config.method_options import read_values
from fedlora.errors import UsageError
from fedlora.laws import aggregation_laws, row_laws, run_laws
from fedlora.laws.measures import ROWS, BrokenLawError, Check
from fedlora.laws.promises import Promises, promises_of
from fedlora.methods.choosing import LoadedMethod, load_method
from fedlora.methods.row import Method
from fedlora.methods.table import find_method
from fedlora.nearest import suggest
from fedlora.plain_text import one_line, table_text
from fedlora.results import Result

GROUPS = (
    (row_laws.EVERY_FACT, row_laws.WHY_NOT),
    (aggregation_laws.EVERY_AGGREGATION, aggregation_laws.WHY_NOT),
    (run_laws.EVERY_RUN, run_laws.WHY_NOT),
)
PROMISES = frozenset(Promises.__dataclass_fields__) - {"settings"}
Outcome = Literal["held", "not applicable", "broken"]


@dataclass(frozen=True)
class Law:
    """What came of one law: `detail` is why it does not apply, or what is broken and by how much."""

    name: str
    outcome: Outcome
    about: str
    detail: str = ""


@dataclass(frozen=True, repr=False)
class MethodCheck(Result):
    """The laws of federated methods, tried on one."""

    method: str
    laws: tuple[Law, ...]

    @property
    def broken(self) -> tuple[Law, ...]:
        """The laws that the method breaks."""
        return tuple(law for law in self.laws if law.outcome == "broken")

    @property
    def is_sound(self) -> bool:
        """Whether no law is broken."""
        return not self.broken

    def parts(self) -> list[str]:
        """The table of laws, then their number by outcome, then what is broken."""
        rows = [(law.outcome, law.name, one_line(law.detail or law.about)) for law in self.laws]
        counts = [
            f"{sum(law.outcome == each for law in self.laws)} {each}" for each in ("held", "not applicable", "broken")
        ]
        head = f"{self.method}: {len(self.laws)} laws: {', '.join(counts)}"
        found = [f"  {law.name}: {one_line(law.detail)}" for law in self.broken]
        return [table_text(("outcome", "law", "about"), rows, left=(0, 1, 2)), head, *found]

    def as_dict(self) -> dict[str, Any]:
        """The method, whether it is sound, and every law."""
        laws = {law.name: {"outcome": law.outcome, "about": law.about, "detail": law.detail} for law in self.laws}
        return {"method": self.method, "sound": self.is_sound, "laws": laws}


def check_method(method: Method | str, *, options: Mapping[str, Any] | None = None, **promises: Any) -> MethodCheck:
    """Try the laws of federated methods on one method, and report each: held, not applicable, or broken.

    `method` is a `Method`, a name, or a place such as `part_way.py:part_way`; `options` are values of its options.
    `promises` are fields of `fedlora.laws.promises.Promises`: `combines="factors"` says that the server goes to the
    mean of the clients' factors, and `plain={"step": 1.0}` with which options it does. A promise that is not given is
    taken from the row and the code, or not tried.

    Raises UsageError for a method that cannot be loaded and for promises and options that there are not. A law that is
    broken raises nothing: see `MethodCheck.broken`.

        >>> check_method("fedavgm", combines="factors", plain={"server_momentum": 0.0}).is_sound
        True
    """
    row = find_method(method) if isinstance(method, str) else method
    loaded = load_method(row, read_values(row, options or {}))
    return try_laws(loaded, _read_promises(loaded, promises))


def try_laws(method: LoadedMethod, promises: Promises) -> MethodCheck:
    """Every law on a method that has its options."""
    if promises.fewest > len(ROWS):
        raise UsageError(
            f"method {method.name} needs {promises.fewest} clients; the laws are tried with {len(ROWS)}",
            hint="give options with which it needs fewer",
        )
    method = method.with_values(promises.settings)
    laws = [_try_law(law, why_not.get(law), method, promises) for every, why_not in GROUPS for law in every]
    return MethodCheck(method.name, tuple(laws))


def _try_law(
    law: Check, why_not: Callable[[LoadedMethod, Promises], str] | None, method: LoadedMethod, promises: Promises
) -> Law:
    name = law.__name__.removeprefix("check_").replace("_", " ")
    about = (law.__doc__ or "").strip().partition("\n")[0]
    if why_not is not None and (reason := why_not(method, promises)):
        return Law(name, "not applicable", about, reason)
    try:
        law(method, promises)
    except BrokenLawError as error:
        return Law(name, "broken", about, str(error))
    except Exception as error:  # of the method's own code
        return Law(name, "broken", about, f"raised {type(error).__name__}: {error}")
    return Law(name, "held", about)


def _read_promises(method: LoadedMethod, given: Mapping[str, Any]) -> Promises:
    if unknown := sorted(given.keys() - PROMISES):
        hint = suggest(unknown[0], PROMISES) or f"the promises are {', '.join(sorted(PROMISES))}"
        raise UsageError(f"{unknown[0]} is no promise of a method", hint=hint)
    try:
        known = {**given, **({"plain": read_values(method, given["plain"])} if "plain" in given else {})}
        return TypeAdapter(Promises).validate_python(_derive(method, known).__dict__)
    except ValidationError as error:
        first = error.errors()[0]
        name = first["loc"][0] if first["loc"] else "promises"
        raise UsageError(f"{name}={first['input']!r}: {first['msg']}", hint="see fedlora.laws.promises") from None


def _derive(method: LoadedMethod, given: Mapping[str, Any]) -> Promises:
    try:
        return promises_of(method, given)
    except Exception as error:  # of the method's own code
        raise UsageError(
            f"method {method.name}: init or broadcast raised {type(error).__name__}: {error}",
            hint="both are tried with an adapter of six layers and seven clients",
        ) from error
