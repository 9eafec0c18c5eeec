"""What a federated method adds to the gradient of a client's loss, step by step.

The gradients of one step are in the factors. The method's terms are added to them in place before clipping; the
gradient that the optimizer gets is counted after it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlora.federated.ranks import cut_like, pad_like
from fedlora.types import AdapterState, Phase


class GradientTerms:
    """The terms of one phase over its trained `factors` (PEFT key -> parameter with a gradient)."""

    def __init__(self, phase: Phase, factors: Mapping[str, nn.Parameter], *, needs_mean: bool) -> None:
        self._factors = factors
        self._start = phase.start
        self._terms = phase.terms
        self._mu = phase.proximal_mu
        self._anchor = _place(phase.anchor, factors) if phase.anchor is not None and phase.proximal_mu else {}
        self._correction = _place(phase.correction, factors) if phase.correction is not None else {}
        self._sum = {key: torch.zeros_like(factor) for key, factor in factors.items()} if needs_mean else {}
        self._steps = 0

    @torch.no_grad()
    def add(self) -> None:
        """Add `mu * (x - anchor)`, the correction and the method's terms to this step's own."""
        for key, factor in self._factors.items():
            gradient = _gradient_of(factor)
            if key in self._anchor:
                gradient.add_(factor - self._anchor[key], alpha=self._mu)
            if key in self._correction:
                gradient.add_(self._correction[key])
        for term in self._terms:
            term.add_gradient(self._factors)

    @torch.no_grad()
    def count(self) -> None:
        """Count this step's gradient as the optimizer gets it: with all terms, and clipped."""
        self._steps += 1
        for key, total in self._sum.items():
            total += _gradient_of(self._factors[key])

    def mean(self) -> AdapterState | None:
        """The mean of the counted gradients less the correction, on the CPU; None when it was not asked for."""
        if not self._sum:
            return None
        mean = {key: value / self._steps for key, value in self._sum.items()}
        mean = {key: (value - self._correction.get(key, 0.0)).to("cpu") for key, value in mean.items()}
        return cut_like(mean, {key: self._start[key] for key in mean}) if self._start else mean


def _gradient_of(factor: nn.Parameter) -> Tensor:
    """The gradient, zero where no token of the step reached the layer: an expert of a mixture."""
    if factor.grad is None:
        factor.grad = torch.zeros_like(factor)
    return factor.grad


def _place(state: AdapterState, factors: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Tensors beside the factors they belong to, of a smaller rank filled up with zeros; a factor without one is an
    error, or the term would not be there."""
    state = pad_like({key: state[key] for key in factors}, factors)
    for key, factor in factors.items():
        if state[key].shape != factor.shape:
            raise ValueError(f"{key}: shape {tuple(state[key].shape)}, expected {tuple(factor.shape)}")
    return {key: state[key].to(factor.device, factor.dtype) for key, factor in factors.items()}
