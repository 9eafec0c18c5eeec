"""What an update must be before it may touch the global adapter.

Loaders accept missing keys and NaN silently, and broadcasting accepts wrong shapes; nothing here does.
"""

from __future__ import annotations

import math

import torch

from fedlora.federated.adapters import Shapes
from fedlora.types import AdapterState


def find_fault(state: AdapterState, expected: Shapes) -> str | None:
    """The first reason why `state` cannot be used, or None: keys, shapes, type, finiteness, in this order."""
    missing = sorted(expected.keys() - state.keys())
    foreign = sorted(state.keys() - expected.keys())
    if missing:
        return f"{len(missing)} missing keys: {', '.join(missing[:3])}"
    if foreign:
        return f"{len(foreign)} unknown keys: {', '.join(foreign[:3])}"
    for key in sorted(expected):
        value = state[key]
        if tuple(value.shape) != tuple(expected[key]):
            return f"{key} has shape {tuple(value.shape)}, expected {tuple(expected[key])}"
        if value.dtype != torch.float32:
            return f"{key} has type {value.dtype}, expected torch.float32"
        # a finite sum has finite terms, and costs a tenth of looking at each; finite terms may still overflow it
        if not math.isfinite(float(value.sum())) and not bool(torch.isfinite(value).all()):
            return f"non-finite tensor {key}"
    return None
