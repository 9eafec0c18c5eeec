"""The adapters of a committed round, for those who generate with them."""

from __future__ import annotations

from pathlib import Path

from fedlora.errors import StorageError, UsageError
from fedlora.llm.adapter_config import load_spec
from fedlora.llm.adapter_files import BIN_NAME, CONFIG_NAME, GLOBAL_BIN_NAME, SAFETENSORS_NAME
from fedlora.llm.lora import LoraSpec
from fedlora.paths import OutputName, RunPaths, is_number
from fedlora.runs.base_chain import FIELD, load_base
from fedlora.runs.checking import find_listed_fault, read_manifest
from fedlora.types import BaseDelta


def adapter_file(paths: RunPaths, round_number: int, name: OutputName) -> Path:
    """The file of `global` or `client_<i>` in a round; UsageError names the rounds that have one."""
    folder = paths.round_folder(round_number)
    candidates = _candidates(folder, name)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    having = [number for number in paths.committed_rounds() if _exists(paths.round_folder(number), name)]
    what = f"{name} adapter" if name.kind == "global" else f"adapter of client {name.client_id}"
    known = f"rounds {_ranges(having)} have one" if having else "no round has one"
    raise UsageError(f"{folder}: no {what}; {known}", hint="check --communication_rounds and --client_id")


def check_committed(paths: RunPaths, round_number: int, file: Path) -> None:
    """UsageError unless an adapter and the settings beside it are, byte for byte, what the round's manifest names."""
    folder = paths.round_folder(round_number)
    if fault := find_listed_fault(folder, [file, file.with_name(CONFIG_NAME)]):
        raise UsageError(
            fault, hint="restore the file from a copy; of the last round the same train command makes it again"
        )


def adapter_spec(paths: RunPaths, round_number: int, name: OutputName, *, base_model: str | None = None) -> LoraSpec:
    """The LoRA settings beside an adapter; another base than `base_model` in them is said, and not followed."""
    return load_spec(adapter_file(paths, round_number, name).with_name(CONFIG_NAME), base_model=base_model)


def find_additions(paths: RunPaths, round_number: int) -> BaseDelta | None:
    """What the base model had been given when a round's clients trained on it; None when nothing.

    Their adapters mean something on top of it only; the global adapter of a round holds it. StorageError when it is not
    what was written.
    """
    manifest = read_manifest(paths.round_folder(round_number)) or {}
    if FIELD not in manifest:
        return None
    base = load_base(paths, round_number - 1)
    if base is None or manifest[FIELD]["parent_sha256"] != base.sha256:
        raise StorageError(
            f"{paths.round_folder(round_number)}: its clients did not train on what the rounds before it added",
            hint="restore the folders of the run from a copy",
        )
    return base if base.links else None


def names_in_round(paths: RunPaths, round_number: int) -> list[OutputName]:
    """Everyone whose adapter lies in a round: global first, then the clients by number."""
    folder = paths.round_folder(round_number)
    if not folder.is_dir():
        known = _ranges(paths.committed_rounds()) or "none"
        raise UsageError(f"{folder}: no such round; there are rounds {known}", hint="check --communication_rounds")
    numbers = [entry.name.removeprefix("client_") for entry in folder.iterdir() if entry.name.startswith("client_")]
    clients = [OutputName("client", number) for number in sorted(int(text) for text in numbers if is_number(text))]
    named = [OutputName("global"), *clients]
    return [name for name in named if _exists(folder, name)]


def _candidates(folder: Path, name: OutputName) -> list[Path]:
    if name.kind == "global":
        return [folder / SAFETENSORS_NAME, folder / GLOBAL_BIN_NAME]
    return [folder / str(name) / SAFETENSORS_NAME, folder / str(name) / BIN_NAME]


def _exists(folder: Path, name: OutputName) -> bool:
    return any(candidate.is_file() for candidate in _candidates(folder, name))


def _ranges(numbers: list[int]) -> str:
    """`1-3, 7` for [1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
