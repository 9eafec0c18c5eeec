"""Adapters that another program left in a folder: which files, of which round, of whom.

Known are a PEFT folder, the rounds of the reference project (`<round>/global_adapter_model.bin`, `client_<i>/`), and
those of Shepherd (`<round>/adapter_model.bin`, one configuration above them).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedlora.errors import UsageError
from fedlora.llm.adapter_files import BIN_NAME, CONFIG_NAME, GLOBAL_BIN_NAME, SAFETENSORS_NAME
from fedlora.paths import OutputName, is_number

PEFT, REFERENCE, SHEPHERD = "PEFT", "reference project", "Shepherd"


@dataclass(frozen=True)
class ForeignAdapter:
    """One adapter and the configuration that belongs to it."""

    name: OutputName
    file: Path
    config: Path


@dataclass(frozen=True)
class ForeignRound:
    """The adapters of one round under the number that the other program gave it; a PEFT folder has none."""

    number: int | None
    adapters: tuple[ForeignAdapter, ...]


@dataclass(frozen=True)
class ForeignRun:
    """All adapters of a folder, in the order of their rounds."""

    folder: Path
    layout: str
    rounds: tuple[ForeignRound, ...]

    @property
    def adapters(self) -> list[ForeignAdapter]:
        """Of all rounds."""
        return [one for each in self.rounds for one in each.adapters]


def find_foreign(folder: Path) -> ForeignRun:
    """What a folder holds; UsageError where it is none, or holds no adapter of a kind that is known."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder", hint="give the folder that holds the adapter, or its rounds")
    if file := _first(folder, SAFETENSORS_NAME, BIN_NAME):
        adapter = ForeignAdapter(OutputName("global"), file, folder / CONFIG_NAME)
        return ForeignRun(folder, PEFT, (ForeignRound(None, (adapter,)),))
    numbers = sorted(int(entry.name) for entry in folder.iterdir() if is_number(entry.name) and entry.is_dir())
    rounds = [ForeignRound(number, _adapters_of(folder / str(number))) for number in numbers]
    rounds = [one for one in rounds if one.adapters]
    if not rounds:
        raise UsageError(
            f"{folder}: holds no adapter",
            hint=f"it needs {SAFETENSORS_NAME} or {BIN_NAME}, or folders 0, 1, 2 with {GLOBAL_BIN_NAME} or {BIN_NAME}",
        )
    is_reference = any(one.file.name == GLOBAL_BIN_NAME or one.name.kind == "client" for one in rounds[0].adapters)
    return ForeignRun(folder, REFERENCE if is_reference else SHEPHERD, tuple(rounds))


def _adapters_of(folder: Path) -> tuple[ForeignAdapter, ...]:
    """The global adapter of a round and its clients' in their folders."""
    own = folder / CONFIG_NAME
    shared = own if own.is_file() else folder.with_name(CONFIG_NAME)
    found = []
    if file := _first(folder, SAFETENSORS_NAME, GLOBAL_BIN_NAME, BIN_NAME):
        found.append(ForeignAdapter(OutputName("global"), file, shared))
    for entry in sorted(folder.iterdir()):
        name = OutputName.of_stem(entry.name)
        if name is not None and name.kind == "client" and (file := _first(entry, SAFETENSORS_NAME, BIN_NAME)):
            config = entry / CONFIG_NAME
            found.append(ForeignAdapter(name, file, config if config.is_file() else shared))
    return tuple(sorted(found, key=lambda one: one.name.place))


def _first(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)
