"""What is added to a frozen layer beside the adapter, and not trained: factors, or one dense matrix.

It stays beside the weights: added into them it would mostly be lost, in bfloat16 or in fewer bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from fedlora.types import AdapterState


def as_background(adapter: AdapterState, scaling: float) -> dict[str, Tensor]:
    """An adapter of any rank with its scaling in B: the form that `LoraModel.set_background` takes."""
    return {key: value * scaling if ".lora_B." in key else value for key, value in adapter.items()}


class Background:
    """The background of one layer. `parts` are the tensors that
    follow one another from the input: (A, B) of shapes (R, d_in), (d_out, R), or one of shape (d_out, d_in); no
    scaling is applied.
    """

    def __init__(self, *parts: Tensor) -> None:
        self._parts = parts
        self._casts: dict[tuple[torch.dtype, bool], tuple[Tensor, ...]] = {}

    @property
    def is_empty(self) -> bool:
        return not self._parts

    def add_to(self, result: Tensor, x: Tensor) -> Tensor:
        """`result` (..., d_out) plus what the background makes of x (..., d_in)."""
        if not self._parts:
            return result
        # what is made in inference mode cannot be used in training
        key = (x.dtype, torch.is_inference_mode_enabled())
        if key not in self._casts:
            self._casts[key] = tuple(part.to(x.dtype) for part in self._parts)
        for part in self._casts[key]:
            x = F.linear(x, part)
        return result + x
