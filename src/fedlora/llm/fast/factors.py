"""The LoRA layers of projections that read one input, as one low-rank product beside their common weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fedlora.llm.dropout import drop
from fedlora.llm.fast.layer_parts import Projections
from fedlora.llm.fast.packed_rows import Pack


@dataclass(frozen=True)
class Factors:
    """A: (ranks, d_in), each layer's A one below the other; B: (sum of d_out, ranks), each layer's B times its scaling
    in the rows and columns that are its; both in the base's type. `kept` (n, d_in) per layer is what dropout keeps."""

    a: Tensor
    b: Tensor
    rank: int
    scalings: tuple[float, ...]
    rows: tuple[slice, ...]
    kept: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, projections: Projections, pack: Pack, chosen: Tensor | None = None) -> Factors | None:
        """The layers as they are now; None where none is adapted, or all are switched off.

        With `chosen` (m,) only these tokens of the pack go through the projections.
        """
        adapted = [(layer, rows) for layer, rows in projections.adapted if layer.active]
        if not adapted:
            return None
        dtype, rank = projections.weight.dtype, len(adapted[0][0].a)
        a = torch.cat([layer.a.detach() for layer, _ in adapted]).to(dtype)
        b = a.new_zeros(len(projections.weight), len(a))
        kept, scalings = [], []
        for number, (layer, rows) in enumerate(adapted):
            scaling = layer.scaling
            if layer.training and layer.noise.acts:
                scaling /= layer.noise.kept_share
                drawn = layer.noise.draw_packed(layer.number, pack.lengths, layer.a.shape[1])
                kept.append(drawn if chosen is None else drawn[chosen])
            b[rows, number * rank : (number + 1) * rank] = layer.b.detach() * scaling
            scalings.append(scaling)
        return cls(a, b, rank, tuple(scalings), tuple(rows for _, rows in adapted), tuple(kept))

    def low(self, x: Tensor) -> Tensor:
        """x (n, d_in) in the layers' ranks (n, ranks)."""
        if not self.kept:
            return x @ self.a.t()
        return torch.cat([drop(x, kept) @ a.t() for kept, a in self._by_layer()], dim=1)

    def add_to_x(self, to_x: Tensor, to_low: Tensor) -> None:
        """Add to the gradient of x what comes through the factors."""
        if not self.kept:
            to_x.addmm_(to_low, self.a)
            return
        for (kept, a), own in zip(self._by_layer(), to_low.split(self.rank, dim=1), strict=True):
            to_x += drop(own @ a, kept)

    def gradients(self, x: Tensor, low: Tensor, gradient: Tensor, to_low: Tensor) -> list[Tensor]:
        """The gradients of each layer's A and B, in float32."""
        to_b = (gradient.t() @ low).float()
        parts = to_low.split(self.rank, dim=1)
        if self.kept:
            to_a = [(own.t() @ drop(x, kept)).float() for own, kept in zip(parts, self.kept, strict=True)]
        else:
            to_a = list((to_low.t() @ x).float().split(self.rank))
        found = []
        for number, (rows, scaling) in enumerate(zip(self.rows, self.scalings, strict=True)):
            own = to_b[rows, number * self.rank : (number + 1) * self.rank]
            found += [to_a[number], own * scaling]
        return found

    def _by_layer(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.kept, self.a.split(self.rank), strict=True))


def project(x: Tensor, projections: Projections, factors: Factors | None) -> tuple[Tensor, Tensor | None]:
    """x (n, d_in) through layers side by side (n, sum of d_out), and its low-rank part (n, ranks)."""
    result = F.linear(x, projections.weight, projections.bias)
    if factors is None:
        return result, None
    low = factors.low(x)
    return result.addmm_(low, factors.b.t()), low


def project_back(
    gradient: Tensor, x: Tensor | None, low: Tensor | None, projections: Projections, factors: Factors | None
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x (n, d_in) and of the factors; x and low are needed where there are factors."""
    to_x = gradient @ projections.weight
    if factors is None or x is None or low is None:
        return to_x, []
    to_low = gradient @ factors.b
    factors.add_to_x(to_x, to_low)
    return to_x, factors.gradients(x, low, gradient, to_low)
