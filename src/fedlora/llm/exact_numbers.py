"""Computing in float32 with weights of fewer bits, and how far logits are from what that gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_SHORT = (torch.bfloat16, torch.float16)

TOLERANCE = 1e-5
"""Largest relative difference of logits in float32: what another order of the same sums makes."""

NOISE = 2.0
"""How much farther from float32 than the model's own path ours may be, in the median over positions: rounding is drawn
again on every path."""


MOST_KEPT_BYTES = 2 << 30
"""Room for a second copy of the weights in float32."""


class ExactNumbers:
    """`with` it a model of bfloat16 or float16 computes in float32 with the same weights, and so do its results.

    A small model gets its weights in float32 while inside; of a large one each operation casts its operands, which
    takes no memory and a few times as long.
    """

    def __init__(self, model: Any) -> None:
        self._short = [one for one in (*model.parameters(), *model.buffers()) if one.dtype in _SHORT]
        self._wide: list[Tensor] = []
        self._fits = sum(4 * one.numel() for one in self._short) <= MOST_KEPT_BYTES
        self._mode = _CastOperands()

    def __enter__(self) -> None:
        if not self._fits:
            self._mode.__enter__()
            return
        self._wide = self._wide or [one.data.float() for one in self._short]
        self._swap()

    def __exit__(self, *error: Any) -> None:
        if self._fits:
            self._swap()
        else:
            self._mode.__exit__(*error)

    def _swap(self) -> None:
        for index, tensor in enumerate(self._short):
            tensor.data, self._wide[index] = self._wide[index], tensor.data


class _CastOperands(TorchDispatchMode):
    """Inside, every short operand is cast to float32, and every result of such a type is float32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            # few of the rows are looked up, and they are cast at their use
            return func(*args, **(kwargs or {}))
        return func(*tree_map(_widen, args), **tree_map(_widen, kwargs or {}))


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _SHORT else value
    return torch.float32 if isinstance(value, torch.dtype) and value in _SHORT else value


def find_difference(found: Sequence[Tensor], truth: Sequence[Tensor], most: float = TOLERANCE) -> str | None:
    """The largest relative difference of a row's logits, in words; None up to `most`."""
    worst = 0.0
    for mine, own in zip(found, truth, strict=True):
        if mine.shape != own.shape:
            return f"logits of shape {tuple(mine.shape)}, not {tuple(own.shape)}"
        part = float((mine.float() - own.float()).norm() / own.float().norm().clamp(min=1e-30))
        worst = part if not part <= worst else worst
    return None if worst <= most else f"logits differ by {worst:.0e} of their size"


def find_excess(found: Sequence[Tensor], own: Sequence[Tensor], truth: Sequence[Tensor]) -> str | None:
    """How much farther from the float32 `truth` some logits are than the model's `own`; None where they are not."""
    mine, theirs = _median_error(found, truth), _median_error(own, truth)
    if mine <= NOISE * theirs + float(torch.finfo(found[0].dtype).eps):
        return None
    return f"in this type logits are {mine:.0e} from float32, the model's own {theirs:.0e}"


def _median_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The relative error of a position's logits, in the middle of all positions."""
    errors = [(a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1) for a, b in zip(found, truth, strict=True)]
    return float(torch.cat(errors).median())
