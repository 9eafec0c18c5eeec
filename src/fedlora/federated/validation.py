"""Check an update before it is aggregated.

Loaders accept missing keys and NaN silently, and broadcasting accepts wrong shapes; nothing here does. Nothing is cast
either: an update of another type than float32 is refused with that reason. Shapes are compared before any value is
touched, so a view that would expand to terabytes costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedlora.federated.adapters import Shapes, pick_half, shapes_of
from fedlora.federated.ranks import rank_in, shapes_at
from fedlora.types import AdapterState, ClientUpdate, TrainTask

COUNTS = {"num_examples": (1, 10**9), "num_steps": (0, 10**12), "num_tokens": (0, 10**15)}
"""Fewest and most of what a client counts; a claim beyond is not believed."""

MOST_METRIC = 1e15
"""No honest metric is larger, and a product of two is still finite."""
LONGEST_TENSOR = 1e15
"""Most that the Euclidean norm of a client's tensor may be: products of two such are far from float32's end."""
MOST_REASON = 300
NEEDED_METRICS = ("loss", "num_response_tokens", "update_norm")
"""What a round's own line is computed from, and how far the client moved."""


def find_update_fault(
    update: ClientUpdate,
    task: TrainTask,
    expected: Shapes,
    sends: Sequence[str] = (),
    *,
    may_be_smaller: bool = False,
    keeps: Shapes | None = None,
    is_clipped: bool = False,
) -> str | None:
    """The first reason why `update` cannot be used as the answer to `task`, or None: task, counts, metrics, tensors.

    `expected` are the shapes of a whole adapter of the largest rank, the client's own is that of what it was sent, or
    with `may_be_smaller` any below. An upload holds the factors that the task shares, and so does each further group of
    tensors, which are those named by `sends`. `keeps` are the shapes of the model that the client keeps, where they are
    others. No tensor is longer than LONGEST_TENSOR, for one that is finite may overflow in a product; but an upload may
    be, where it `is_clipped` before anything is made of it.
    """
    expected = _own_shapes(expected, task)
    if (update.round, update.client_id, update.task_id) != (task.round, task.client_id, task.id):
        return f"it answers another task, of round {update.round!r} and client {update.client_id!r}"
    if fault := _find_count_fault(update) or _find_metric_fault(update.metrics):
        return fault
    if update.upload is None and update.memory.adapter is None and not update.adapter_stays:
        return "it holds no adapter"
    if update.upload is None and task.download.shared is not None:
        return "it sends nothing"
    if sorted(update.extra) != sorted(sends if update.upload is not None else ()):
        return f"it sends {sorted(update.extra)} besides, where {sorted(sends)} is expected"
    if may_be_smaller and update.upload:
        expected = _smaller_shapes(expected, update.upload)
    shared = pick_half(expected, task.download.shared)
    groups = [(state, shared) for state in (update.upload, *update.extra.values())]
    groups.append((update.memory.adapter, keeps or expected))
    for number, (state, shapes) in enumerate(groups):
        may_be_long = is_clipped and number == 0
        if state is not None and (fault := find_fault(state, shapes) or (not may_be_long and _find_long_tensor(state))):
            return fault
    return None


def find_not_finite(state: AdapterState) -> str | None:
    """The first key whose tensor holds NaN or infinity, or None."""
    return next((key for key in sorted(state) if not bool(torch.isfinite(state[key]).all())), None)


def one_line(text: str) -> str:
    """A client's text made fit for a log and a manifest: short, printable, one line."""
    return "".join(char for char in text[:MOST_REASON] if char.isprintable())


def find_fault(state: AdapterState, expected: Shapes) -> str | None:
    """The first reason why `state` cannot be used, or None: keys, shapes, type, finiteness, in this order."""
    missing = sorted(expected.keys() - state.keys())
    foreign = sorted(map(str, state.keys() - expected.keys()))
    if missing:
        return f"{len(missing)} missing keys: {', '.join(missing[:3])}"
    if foreign:
        return f"{len(foreign)} unknown keys: {', '.join(foreign[:3])}"
    for key in sorted(expected):
        if fault := _find_tensor_fault(key, state[key], expected[key]):
            return fault
    return None


def _own_shapes(expected: Shapes, task: TrainTask) -> Shapes:
    factors = {key: shape for key, shape in shapes_of(task.download.adapter).items() if key in expected}
    return shapes_at(expected, rank_in(factors)) if factors else expected


def _smaller_shapes(expected: Shapes, sent: AdapterState) -> Shapes:
    """The expected shapes at the rank that the first tensor claims to have, where that is a possible one."""
    key = min(expected)
    value = sent.get(key)
    if not isinstance(value, torch.Tensor) or value.dim() != len(expected[key]):
        return expected
    claimed = rank_in({key: tuple(value.shape)})
    return shapes_at(expected, claimed) if 1 <= claimed < rank_in(expected) else expected


def _find_tensor_fault(key: str, value: Any, shape: tuple[int, ...]) -> str | None:
    if not isinstance(value, torch.Tensor):
        return f"{key} is not a tensor but {type(value).__name__}"
    if tuple(value.shape) != tuple(shape):
        return f"{key} has shape {tuple(value.shape)}, expected {tuple(shape)}"
    if value.dtype != torch.float32:
        return f"{key} has type {value.dtype}, expected torch.float32"
    if value.layout != torch.strided or value.device.type != "cpu":
        return f"{key} is {value.layout} on {value.device}, expected a dense tensor in memory"
    # a finite sum has finite terms, and costs a tenth of looking at each; finite terms may still overflow it
    if not math.isfinite(float(value.sum())) and not bool(torch.isfinite(value).all()):
        return f"non-finite tensor {key}"
    return None


def _find_long_tensor(state: AdapterState) -> str | None:
    for key, value in state.items():
        norm = float(torch.linalg.vector_norm(value, dtype=torch.float64))
        if norm > LONGEST_TENSOR:
            return f"the norm of {key} is {norm:.3g}, and above {LONGEST_TENSOR:g}"
    return None


def _find_count_fault(update: ClientUpdate) -> str | None:
    for name, (fewest, most) in COUNTS.items():
        value = getattr(update, name)
        # True is an int to Python, and "7" or 7.0 may be one to a careless server
        if type(value) is not int:
            return f"{name}={value!r} is not a whole number"
        if not fewest <= value <= most:
            return f"{name}={value} is not between {fewest} and {most}"
    return None


def _find_metric_fault(metrics: Mapping[str, Any]) -> str | None:
    for name in NEEDED_METRICS:
        if name not in metrics:
            return f"the metric {name} is missing"
    for name, value in metrics.items():
        # JSON has no NaN: one would end the run when the round is written down
        if type(value) not in (int, float) or not -MOST_METRIC <= value <= MOST_METRIC:
            return f"the metric {name} is {value!r}, not a finite number of at most {MOST_METRIC:g}"
    if metrics["num_response_tokens"] <= 0:
        return f"num_response_tokens={metrics['num_response_tokens']} is not positive"
    return None
