"""What a federated method adds to the gradient of a client's loss, step by step.

The gradients of one step lie in the factors; here they are read, and the method's own terms are added in place before
clipping and the optimizer see them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlora.types import AdapterState, Phase


class GradientTerms:
    """The terms of one phase over its trained `factors` (PEFT key -> parameter with a gradient)."""

    def __init__(self, phase: Phase, factors: Mapping[str, nn.Parameter], *, needs_mean: bool) -> None:
        self._factors = factors
        self._mu = phase.proximal_mu
        self._anchor = _place(phase.anchor, factors) if phase.anchor is not None and phase.proximal_mu else {}
        self._correction = _place(phase.correction, factors) if phase.correction is not None else {}
        self._sum = {key: torch.zeros_like(factor) for key, factor in factors.items()} if needs_mean else {}
        self._steps = 0

    @torch.no_grad()
    def add(self) -> None:
        """Count this step's own gradient, then add `mu * (x - anchor)` and the correction to it."""
        self._steps += 1
        for key, factor in self._factors.items():
            if factor.grad is None:
                raise ValueError(f"{key} is trained and has no gradient")
            if key in self._sum:
                self._sum[key] += factor.grad
            if key in self._anchor:
                factor.grad.add_(factor - self._anchor[key], alpha=self._mu)
            if key in self._correction:
                factor.grad.add_(self._correction[key])

    def mean(self) -> AdapterState | None:
        """The mean over all steps of the loss's own gradient, on the CPU; None when it was not asked for."""
        if not self._sum:
            return None
        return {key: (value / self._steps).to("cpu") for key, value in self._sum.items()}


def _place(state: AdapterState, factors: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Tensors beside the factors they belong to; a factor without one is an error, or the term would not be there."""
    for key, factor in factors.items():
        if state[key].shape != factor.shape:
            raise ValueError(f"{key}: shape {tuple(state[key].shape)}, expected {tuple(factor.shape)}")
    return {key: state[key].to(factor.device, factor.dtype) for key, factor in factors.items()}
