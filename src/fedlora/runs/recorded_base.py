"""The base model of a recorded run: which one it is, wherever it lies now.

A run knows its base by identity. So the base may have moved, or be spelled otherwise, and another base that has taken
its place is refused. A run that is older than identities knows its base by name alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from fedlora.console import say
from fedlora.errors import UsageError
from fedlora.llm.base_identity import BaseIdentity, find_folder, find_identity, identify
from fedlora.runs.run_records import RunRecord

if TYPE_CHECKING:
    from fedlora.llm.base_model import BaseModel

HINT = "restore that base, or give --base_model with the folder where it lies now; another base needs another run"


@dataclass(frozen=True)
class RecordedBase:
    """The base model that a run was trained on."""

    run: str
    name: str
    """As the run recorded it."""
    place: str
    """Where it lies now: what is loaded."""
    identity: BaseIdentity | None

    @classmethod
    def of(cls, recorded: RunRecord, place: str = "") -> Self:
        """The base of a run at a place, by default where it was; whether it is that one is not looked at."""
        identity = BaseIdentity.from_record(recorded.base_identity)
        return cls(recorded.exp_name, recorded.base_model, place or recorded.base_model, identity)

    def load(self, load: Callable[..., BaseModel], **options: Any) -> BaseModel:
        """The base from its place, as `load` loads it; UsageError when another one lies there, or none."""
        try:
            base = load(self.place, **options)
        except UsageError as error:
            if self.identity is None or find_folder(self.place) is not None:
                raise
            what = f"run {self.run} was trained on {self.name!r} with the identity {self.identity}"
            raise UsageError(f"{error}; {what}", hint=HINT) from error
        self.check(base.identity)
        return base

    def load_instead(self, _: str, **options: Any) -> BaseModel:
        """Takes the place of `load_base_model`, whatever name it is called with."""
        from fedlora.llm.base_model import load_base_model

        return self.load(load_base_model, **options)

    def find_fault(self, found: BaseIdentity | None) -> str | None:
        """Why what was found at the place is not this base; None where it is, or where one of both is not known."""
        if self.identity is None or found is None or not (parts := self.identity.differences(found)):
            return None
        return (
            f"base_model={self.place!r} is not the base that run {self.run} was trained on: its identity is "
            f"{found}, not {self.identity} (different: {', '.join(parts)})"
        )

    def check(self, found: BaseIdentity | None) -> None:
        """UsageError when what was found at the place is another base, or this one with a damaged file."""
        if fault := self.find_fault(found):
            if (folder := find_folder(self.place)) is not None:
                from fedlora.llm.base_files import check_files

                check_files(folder)
            raise UsageError(fault, hint=HINT)

    def check_records_every_byte(self) -> None:
        """UsageError when the run was not started with `verify_base`."""
        if self.identity is None or not self.identity.every_byte:
            raise UsageError(
                f"verify_base: run {self.run} records no hash of every byte of its base model",
                hint="leave it out; a run that is started with --verify_base records one",
            )


def find_base(recorded: RunRecord, asked: str = "") -> RecordedBase:
    """The base of a run, at the place that is `asked` for, by default where it was.

    Where it is on this machine it is compared before anything is loaded; UsageError for another base.
    """
    base = RecordedBase.of(recorded, asked)
    if base.identity is None:
        if base.place != base.name:
            raise UsageError(
                f"base_model={asked!r}, but run {base.run} was trained on {base.name!r}",
                hint="leave --base_model out, or choose another --exp_name for answers of that base",
            )
        _say_unknown(base.run)
    elif (folder := find_folder(base.place)) is not None:
        base.check(identify(folder))
    return base


def check_identity(recorded: RunRecord, loaded: BaseModel, *, every_byte: bool) -> None:
    """UsageError when a loaded base is not that of the run."""
    base = RecordedBase.of(recorded, loaded.name)
    base.check(loaded.identity)
    if every_byte:
        base.check_records_every_byte()
        base.check(find_identity(loaded.name, every_byte=True))


def record_identity(loaded: BaseModel, *, every_byte: bool) -> dict[str, str] | None:
    """The identity of a loaded base, as run.json keeps it; UsageError where `every_byte` is not on this machine."""
    identity = find_identity(loaded.name, every_byte=True) if every_byte else loaded.identity
    if every_byte and not (identity and identity.every_byte):
        raise UsageError(
            f"verify_base: the weights of base_model={loaded.name!r} are not on this machine", hint="leave it out"
        )
    return identity.record() if identity else None


_told: set[str] = set()
"""Runs of which it was said that they do not know the identity of their base."""


def _say_unknown(run: str) -> None:
    if run not in _told:
        _told.add(run)
        say(f"run {run} is older than identities of base models: its base is known by its name alone")
