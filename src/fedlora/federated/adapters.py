"""Arithmetic on adapters: sums, norms, sizes and fingerprints of PEFT-keyed tensors, and how an adapter begins.

Sums over clients run in float64 in the order given (client-id order) and are cast once at the end:
float32 sums depend on the order in which clients arrive.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedlora.seeds import derive_seed
from fedlora.types import AdapterState, Half

Shapes = Mapping[str, tuple[int, ...]]
Value = TypeVar("Value")


def weighted_mean(
    pairs: Iterable[tuple[AdapterState, float]], *, dtype: torch.dtype | None = None
) -> dict[str, Tensor] | None:
    """Mean of adapters with the given positive weights: `sum(w * x) / sum(w)`; None without a pair.

    Summed in float64 and cast once, to `dtype` or the type of the adapters. Take float64 to compute further with the
    mean: otherwise the first rounding loses a small change of a large value. Holds the sum and one adapter at a time.
    Raises ValueError on a weight that is not positive or on keys or shapes that differ.
    """
    totals: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    weights = 0.0
    for state, weight in pairs:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weight {weight} is not positive")
        if not totals:
            totals = {key: torch.zeros(value.shape, dtype=torch.float64) for key, value in state.items()}
            kinds = {key: dtype or value.dtype for key, value in state.items()}
        if state.keys() != totals.keys():
            raise ValueError("adapters with different keys cannot be averaged")
        for key, total in totals.items():
            if state[key].shape != total.shape:
                raise ValueError(f"{key}: shapes {tuple(state[key].shape)} and {tuple(total.shape)} differ")
            total.add_(state[key].to(torch.float64), alpha=weight)
        weights += weight
    if not totals:
        return None
    return {key: (total / weights).to(kinds[key]) for key, total in totals.items()}


def difference_norm(after: AdapterState, before: AdapterState) -> float:
    """Euclidean norm of `after - before` over all tensors together, in float64.

    Summed in key order: an adapter that was read from a file has its keys in any.
    """
    total = 0.0
    for key in sorted(after):
        total += float((after[key].to(torch.float64) - before[key].to(torch.float64)).square().sum())
    return math.sqrt(total)


def compact(value: Tensor) -> Tensor:
    """The tensor itself, or a copy where it is a view: one tensor of a file's buffer would keep all of the file."""
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value


def num_bytes(state: AdapterState | None) -> int:
    """Bytes of the tensors as they travel."""
    return sum(value.numel() * value.element_size() for value in state.values()) if state else 0


def fingerprint(state: AdapterState) -> str:
    """Hex SHA-256 over keys, shapes and values in key order."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].contiguous()
        digest.update(f"{key}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def shapes_of(state: AdapterState) -> dict[str, tuple[int, ...]]:
    """Key -> shape."""
    return {key: tuple(value.shape) for key, value in state.items()}


def pick_half(state: Mapping[str, Value], half: Half | None) -> Mapping[str, Value]:
    """What belongs to the factors A, to the factors B, to all of them, or to none, by PEFT key."""
    if half is None:
        return {}
    if half == "both":
        return state
    return {key: value for key, value in state.items() if f".lora_{half}." in key}


def find_half(part: Mapping[str, Any], whole: Mapping[str, Any]) -> Half:
    """Which of the factors of `whole` are in `part`; ValueError when it is neither A nor B nor both."""
    halves: tuple[Half, ...] = ("both", "A", "B")
    for half in halves:
        if part.keys() == pick_half(whole, half).keys():
            return half
    raise ValueError("neither all factors A, nor all factors B, nor both")


def layer_pairs(state: AdapterState) -> dict[str, tuple[str, str]]:
    """Layer -> its keys of A and B."""
    names = sorted(key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight"))
    return {name: (f"{name}.lora_A.weight", f"{name}.lora_B.weight") for name in names}


def combine(function: Callable[..., Tensor], *states: AdapterState) -> dict[str, Tensor]:
    """`function` of the tensors under each key, computed in float64 and cast to the type of the first."""
    first, *others = states
    return {
        key: function(value.to(torch.float64), *(other[key].to(torch.float64) for other in others)).to(value.dtype)
        for key, value in first.items()
    }


def zeros_like(state: AdapterState) -> dict[str, Tensor]:
    """The same keys and shapes, all zero."""
    return {key: torch.zeros_like(value) for key, value in state.items()}


def make_adapter(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """The untrained adapter: A Kaiming-uniform with a = sqrt(5) as in PEFT, so U(-1/sqrt(d_in), 1/sqrt(d_in)); B zero.

    Each tensor draws from a stream of its own, so the values do not depend on the other layers.
    """
    state: dict[str, Tensor] = {}
    for key, shape in sorted(shapes.items()):
        state[key] = torch.zeros(shape, dtype=torch.float32)
        if key.endswith("lora_A.weight"):
            number = int.from_bytes(key.encode(), "big") % (1 << 61)
            generator = torch.Generator().manual_seed(derive_seed(seed, "lora_init", number))
            bound = 1 / math.sqrt(shape[1])
            state[key].uniform_(-bound, bound, generator=generator)
    return state
