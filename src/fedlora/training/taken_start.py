"""A run that starts from an adapter of another run: found, compared with this run's layers, and recorded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.config.train import TrainConfig
from fedlora.console import say
from fedlora.errors import UsageError
from fedlora.exporting.exported import read_adapter
from fedlora.federated.adapters import Shapes, make_adapter, shapes_of
from fedlora.files import write_bytes
from fedlora.llm.adapter_files import to_safetensors
from fedlora.llm.base_model import BaseModel
from fedlora.methods.choosing import LoadedMethod
from fedlora.paths import RunPaths
from fedlora.plain_text import one_line
from fedlora.runs.recorded_base import RecordedBase
from fedlora.runs.run_folder import read_run
from fedlora.runs.start_adapter import FIELD, describe_start, read_start
from fedlora.runs.subjects import find_adapters
from fedlora.types import AdapterState, ClientId


@dataclass(frozen=True)
class Start:
    """The adapter of the first round; `record` is what run.json says of one that was taken from another run."""

    adapter: AdapterState
    record: Mapping[str, Any]

    def write(self, paths: RunPaths) -> None:
        """The run's own copy of an adapter that was taken."""
        if self.record:
            write_bytes(paths.start_file, to_safetensors(self.adapter))


def open_start(
    config: TrainConfig, method: LoadedMethod, paths: RunPaths, base: BaseModel, shapes: Shapes, *, is_resumed: bool
) -> Start:
    """The start of a run: drawn, taken, or as an interrupted run has kept it.

    UsageError where the other adapter is not there, is of another base or shape, or where the method's clients could
    not start from it.
    """
    if not config.init_from:
        return Start(make_adapter(shapes, config.seed), {})
    if is_resumed:
        return Start(read_start(paths, shapes, config), {FIELD: dict(describe_start(paths))})
    start = _take(config, base, shapes)
    _check_arrives(method, start.adapter, list(range(config.num_clients)))
    if config.is_private:
        say("the guarantee covers what this run trains on, not what the adapter that it starts from has learnt")
    return start


def _take(config: TrainConfig, base: BaseModel, shapes: Shapes) -> Start:
    word = config.init_from if config.init_from.count("/") == 2 else f"{config.init_from}/global"
    (subject,) = find_adapters([word], run=config.exp_name, round_number=None, model_dir=config.model_dir)
    source = RunPaths(config.model_dir, subject.run)
    RecordedBase.of(read_run(source), base.name).check(base.identity)
    adapter, spec, _, _ = read_adapter(source, subject)
    named = f"init_from={config.init_from}"
    if different := [key for key, shape in shapes.items() if shapes_of(adapter).get(key) != shape]:
        rank = f"has rank {spec.r}, this run {config.lora_r}" if spec.r != config.lora_r else "adapts other layers"
        raise UsageError(
            f"{named}: the adapter {rank} (the first difference: {different[0]})",
            hint=f"give --lora_r {spec.r} --lora_target_modules {one_line(','.join(spec.target_modules))}",
        )
    if adapter.keys() != shapes.keys():
        raise UsageError(f"{named}: the adapter adapts more layers than this run", hint="name all of its layers")
    if not math.isclose(spec.scaling, config.lora_scaling):
        raise UsageError(
            f"{named}: the adapter is scaled by {spec.scaling:g}, this run by {config.lora_scaling:g}",
            hint=f"give --lora_alpha {spec.alpha:g}" + (" --use_rslora" if spec.use_rslora else ""),
        )
    content = to_safetensors(adapter)
    say(f"starts from {subject.word}")
    return Start(adapter, {FIELD: {"of": subject.word, "sha256": hashlib.sha256(content).hexdigest()}})


def _check_arrives(method: LoadedMethod, adapter: AdapterState, clients: Sequence[ClientId]) -> None:
    """UsageError for a method whose clients draw factors themselves instead of receiving them."""
    server = method.server
    download = server.broadcast(server.init(adapter, clients), clients[0], 1)
    if download.travels != "both":
        part = "nothing" if download.travels is None else f"{download.travels} alone"
        raise UsageError(
            f"init_from is not supported with {method.name}: its clients receive {part} and draw the rest",
            hint="choose a method whose server sends both factors",
        )
