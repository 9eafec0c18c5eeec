"""A server's state between rounds, as `state.safetensors` of a round, and other named groups of tensors.

Only tensors that the round does not hold already are written: a strategy whose state is the global adapter leaves no
file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import safetensors.torch

from fedlora.errors import StorageError
from fedlora.federated.adapters import Shapes
from fedlora.llm.adapter_files import SAFETENSORS_NAME, load_adapter
from fedlora.paths import RunPaths
from fedlora.runs.base_chain import BaseChain
from fedlora.stopping import stop_if_asked
from fedlora.types import AdapterState, ServerState

STATE_NAME = "state.safetensors"
_ADAPTER = "adapter"


def state_to_bytes(state: ServerState, global_adapter: AdapterState | None) -> bytes | None:
    """The state's slots, and its adapter where the round's global adapter is another; None when nothing is left."""
    groups = dict(state.slots)
    if state.adapter is not global_adapter:
        groups[_ADAPTER] = state.adapter
    return groups_to_bytes(groups) if groups else None


def load_state(folder: Path, shapes: Shapes) -> ServerState | None:
    """The state that an intact round left; None when it left neither a state nor a global adapter."""
    file, adapter_file = folder / STATE_NAME, folder / SAFETENSORS_NAME
    groups = load_groups(file) if file.is_file() else {}
    if _ADAPTER in groups:
        return ServerState(groups.pop(_ADAPTER), groups)
    return ServerState(load_adapter(adapter_file, shapes), groups) if adapter_file.is_file() else None


def load_server(chain: BaseChain, paths: RunPaths, number: int, shapes: Shapes) -> ServerState | None:
    """The state that an intact round left, with the additions to the base up to it; StorageError when one of these is
    damaged."""
    state, base = load_state(paths.round_folder(number), shapes), chain.up_to(number)
    return state if state is None or base is None else replace(state, base=base)


def groups_to_bytes(groups: Mapping[str, AdapterState]) -> bytes:
    """Named groups of tensors as safetensors with keys `group/key`; equal groups give equal bytes."""
    tensors = {
        f"{name}/{key}": groups[name][key].contiguous() for name in sorted(groups) for key in sorted(groups[name])
    }
    return safetensors.torch.save(tensors)


def load_groups(path: Path) -> dict[str, AdapterState]:
    """The groups of a file by `groups_to_bytes`, whose hash the caller has compared; StorageError for other files."""
    groups: dict[str, dict] = {}
    try:
        tensors = safetensors.torch.load_file(path)
    except Exception as error:  # the reader raises many kinds
        stop_if_asked()
        raise StorageError(f"{path}: not readable ({type(error).__name__})", hint="train that round again") from None
    for key, value in tensors.items():
        name, _, rest = key.partition("/")
        groups.setdefault(name, {})[rest] = value
    return {**groups}
