"""Adapters as bytes: PEFT's two formats, their configuration, and a reader that trusts nothing.

The configuration is written by us, with sorted keys: PEFT's own is not the same from process to
process. Reading checks keys, shapes and types against what the run expects before any value is used.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fedlora.errors import UsageError
from fedlora.federated.adapters import Shapes
from fedlora.federated.validation import find_fault
from fedlora.files import json_text
from fedlora.llm.bin_layout import BinLayout
from fedlora.llm.lora import LoraSpec
from fedlora.types import AdapterState

SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
GLOBAL_BIN_NAME = "global_adapter_model.bin"
CONFIG_NAME = "adapter_config.json"


def to_safetensors(state: AdapterState) -> bytes:
    """safetensors bytes; equal tensors give equal bytes."""
    return safetensors.torch.save({key: state[key].contiguous() for key in sorted(state)}, metadata={"format": "pt"})


def to_bin(state: AdapterState) -> bytes:
    """`torch.save` bytes of clones in key order, so that no view drags a larger storage along."""
    buffer = io.BytesIO()
    torch.save({key: state[key].clone() for key in sorted(state)}, buffer)
    return buffer.getvalue()


def make_peft_config(spec: LoraSpec, base_model: str, *, fan_in_fan_out: bool, layers: list[str]) -> str:
    """`adapter_config.json`: what PEFT needs to load the adapter onto the base. `layers` are the full names
    of the adapted layers, written out where the target was all-linear."""
    targets = sorted(layers) if spec.target_modules == ("all-linear",) else sorted(spec.target_modules)
    value: dict[str, Any] = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "lora_dropout": spec.dropout,
        "peft_type": "LORA",
        "r": spec.r,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_rslora": spec.use_rslora,
    }
    return json_text(value)


def load_adapter(path: Path, expected: Shapes, *, layout: BinLayout | None = None) -> dict[str, torch.Tensor]:
    """Read `.safetensors` or `.bin`; UsageError when missing, unreadable, or not an adapter for this model.

    With `layout`, a `.bin` as this project writes it is read without unpickling.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such adapter", hint="train first, or check exp_name, round and client")
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        elif layout is None or (state := layout.read(path)) is None:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many kinds; every one means the file is not an adapter
        raise UsageError(f"{path}: not a readable adapter ({type(error).__name__})", hint="train again") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"{path}: holds no tensors by name", hint="train again")
    if fault := find_fault(state, expected):
        raise UsageError(f"{path}: does not fit the base model: {fault}", hint="check base_model and the LoRA settings")
    return state


def load_spec(path: Path) -> LoraSpec:
    """The shape of an adapter from its `adapter_config.json`; UsageError on anything we would not have written."""
    from fedlora.files import read_text

    try:
        value = json.loads(read_text(path))
        alpha, r, rslora = float(value["lora_alpha"]), int(value["r"]), bool(value.get("use_rslora", False))
        targets = tuple(str(name) for name in value["target_modules"])
        if not isinstance(value["target_modules"], list) or not 1 <= r <= 4096:
            raise ValueError("target_modules must be a list and r between 1 and 4096")
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a LoRA configuration ({error})", hint="train again") from None
    scaling = alpha / (r**0.5 if rslora else r)
    return LoraSpec(r, alpha, scaling, float(value.get("lora_dropout", 0.0)), targets, rslora)
