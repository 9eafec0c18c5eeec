"""The adapters of a committed round, for those who generate with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from fedlora.data.client_names import shown_client
from fedlora.errors import StorageError, UsageError
from fedlora.files import read_json
from fedlora.llm.adapter_config import load_spec
from fedlora.llm.adapter_files import BIN_NAME, CONFIG_NAME, GLOBAL_BIN_NAME, SAFETENSORS_NAME
from fedlora.llm.lora import LoraSpec
from fedlora.paths import OutputName, RunPaths, client_name, client_number, is_number
from fedlora.runs.base_chain import load_base
from fedlora.runs.checking import UPDATE_NAME, find_listed_fault, load_manifest
from fedlora.runs.run_folder import read_run
from fedlora.types import BaseDelta, ClientId


def adapter_file(paths: RunPaths, round_number: int, name: OutputName) -> Path:
    """The file of `global` or `client_<i>` in a round; UsageError names the rounds that have one."""
    folder = paths.round_folder(round_number)
    candidates = _candidates(folder, name)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if name.client_id is not None:
        _check_is_here(paths, round_number, name.client_id)
    having = [number for number in paths.committed_rounds() if _exists(paths.round_folder(number), name)]
    what = f"{name} adapter" if name.kind == "global" else f"adapter of {_shown(paths, name.client_id)}"
    known = "no round has one"
    if having:
        known = f"rounds {_ranges(having)} have one" if len(having) > 1 else f"round {having[0]} has one"
    hint = "choose one of these rounds" if having else "name who answers with --of, or --of all"
    raise UsageError(f"{folder}: no {what}; {known}", hint=hint)


def _shown(paths: RunPaths, client_id: ClientId) -> str:
    files = {facts.client_id: facts.file for facts in read_run(paths).clients} if paths.run_file.is_file() else {}
    return shown_client(client_id, files)


def _check_is_here(paths: RunPaths, round_number: int, client_id: ClientId) -> None:
    """UsageError when a client's model after a round is personal and stays on its node."""
    places = (paths.round_folder(number) / client_name(client_id) for number in reversed(paths.committed_rounds()))
    records = (place / UPDATE_NAME for place in places if int(place.parent.name) <= round_number)
    last = next((record for record in records if record.is_file()), None)
    if last is not None and read_json(last).get("adapter_stays"):
        raise UsageError(
            f"the model of {_shown(paths, client_id)} is personal and stays on its node",
            hint="its owner may share it: share_own_adapter: true in the node's configuration; then train again",
        )


def check_committed(paths: RunPaths, round_number: int, file: Path) -> None:
    """UsageError unless an adapter and the settings beside it are, byte for byte, what the round's manifest names."""
    folder = paths.round_folder(round_number)
    if fault := find_listed_fault(folder, [file, file.with_name(CONFIG_NAME)]):
        raise UsageError(
            fault, hint="restore the file from a copy; of the last round the same train command makes it again"
        )


def adapter_spec(paths: RunPaths, round_number: int, name: OutputName, *, base_model: str | None = None) -> LoraSpec:
    """The LoRA settings beside an adapter; another base than `base_model` in them is reported and not used."""
    return load_spec(adapter_file(paths, round_number, name).with_name(CONFIG_NAME), base_model=base_model)


def adapter_specs(
    paths: RunPaths, round_number: int, names: Sequence[OutputName], *, base_model: str
) -> dict[OutputName, LoraSpec]:
    """The settings of adapters that answer together: their ranks may differ; UsageError when layers or scaling do."""
    specs: dict[OutputName, LoraSpec] = {}
    for name in names:
        # what is to be said about the base is said once
        spec = adapter_spec(paths, round_number, name, base_model=None if specs else base_model)
        first = next(iter(specs.values()), spec)
        if spec.target_modules != first.target_modules or not math.isclose(spec.scaling, first.scaling):
            file = adapter_file(paths, round_number, name).with_name(CONFIG_NAME)
            raise UsageError(
                f"{file}: other layers or another scaling (lora_alpha / r) than the other adapters of the round",
                hint="restore the file, or answer with this adapter alone",
            )
        specs[name] = spec
    return specs


def find_additions(paths: RunPaths, round_number: int) -> BaseDelta | None:
    """The additions to the base on which a round's clients trained, or None.

    Their adapters are valid only on top of it; the global adapter of a round contains it. StorageError when a file of
    the chain is damaged.
    """
    chain = load_manifest(paths.round_folder(round_number)).base_delta
    if chain is None:
        return None
    base = load_base(paths, round_number - 1)
    if base is None or chain.get("parent_sha256") != base.sha256:
        raise StorageError(
            f"{paths.round_folder(round_number)}: its clients did not train on what the rounds before it added",
            hint="restore the folders of the run from a copy",
        )
    return base if base.links else None


def names_in_round(paths: RunPaths, round_number: int) -> list[OutputName]:
    """All adapters of a round: global first, then the clients by number."""
    folder = paths.round_folder(round_number)
    if not folder.is_dir():
        known = _ranges(paths.committed_rounds()) or "none"
        raise UsageError(f"{folder}: no such round; there are rounds {known}", hint="check --communication_rounds")
    numbers = [entry.name.removeprefix("client_") for entry in folder.iterdir() if entry.name.startswith("client_")]
    clients = [OutputName("client", number) for number in sorted(int(text) for text in numbers if is_number(text))]
    named = [OutputName("global"), *clients]
    return [name for name in named if _exists(folder, name)]


def find_personal(paths: RunPaths, last_round: int) -> dict[ClientId, Path]:
    """The newest adapter that each client keeps for itself, up to a round; empty where clients keep none."""
    found: dict[ClientId, Path] = {}
    for number in reversed([number for number in paths.committed_rounds() if number <= last_round]):
        for file in paths.round_folder(number).glob(f"client_*/{UPDATE_NAME}"):
            if read_json(file).get("keeps_adapter"):
                found.setdefault(client_number(file.parent.name), file.with_name(BIN_NAME))
    return dict(sorted(found.items()))


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
