"""One LoRA layer (Hu et al., arXiv 2106.09685) in the place of a linear layer.

The factors and their gradients are float32, their products run in the base's type: PEFT's layer casts
the activations up to float32 instead, which costs half the speed on hardware that is fast at bfloat16.
In float32 the two compute the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from fedlora.llm.background import Background
from fedlora.llm.dropout import DropoutNoise, drop


@dataclass(frozen=True)
class LoraSpec:
    """Shape of the adaptation: `dW = scaling * B @ A` on every target layer."""

    r: int
    alpha: float
    scaling: float
    dropout: float
    target_modules: tuple[str, ...]
    use_rslora: bool = False


class LowRankLinear(torch.autograd.Function):
    """`x W.T + bias + s (x A.T) B.T` for a frozen W: (d_out, d_in), in the fewest products.

    Backwards the two paths into x are one accumulating product, and nothing is computed for x when it needs no
    gradient (the first layer's input). x: (..., d_in) in the base's type; A and B float32, `casts` the two in x's
    type. Entries of x that are False in `kept` (x's shape) do not reach A; `scaling` makes up for them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        casts: tuple[Tensor, Tensor],
        scaling: float,
        kept: Tensor | None = None,
    ) -> Tensor:
        flat = x.flatten(0, -2)
        a_cast, b_cast = casts
        if kept is not None:
            kept = kept.flatten(0, -2)
        seen = flat if kept is None else drop(flat, kept)
        low = seen @ a_cast.t()
        result = F.linear(flat, weight, bias).addmm_(low, b_cast.t(), alpha=scaling)
        ctx.save_for_backward(seen, low, weight, a_cast, b_cast, kept)
        ctx.scaling = scaling
        # no view as autograd sees it: a model may change the output in place, which is forbidden for views made here
        return torch.ops.aten._unsafe_view(result, (*x.shape[:-1], len(weight)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        seen, low, weight, a_cast, b_cast, kept = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        to_low = (gradient @ b_cast).mul_(ctx.scaling)
        to_a = (to_low.t() @ seen).float()
        to_b = (gradient.t() @ low).float().mul_(ctx.scaling)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = gradient @ weight
            if kept is None:
                to_x.addmm_(to_low, a_cast)
            else:
                to_x += drop(to_low @ a_cast, kept)
            to_x = to_x.view(*gradients[0].shape[:-1], -1)
        return to_x, None, None, to_a, to_b, None, None, None


@dataclass
class Answerers:
    """Which of several stacked adapters answers each row: `mask` (rows, 1, adapters * r), ones for the row's own."""

    mask: Tensor = field(default_factory=lambda: torch.ones(()))


class LoraLinear(nn.Module):
    """A frozen linear layer plus `scaling * (dropout(x) @ A.T) @ B.T`; A: (r, d_in), B: (d_out, r) in float32."""

    def __init__(
        self,
        base: nn.Module,
        d_in: int,
        d_out: int,
        spec: LoraSpec,
        answerers: Answerers,
        noise: DropoutNoise,
        number: int = 0,
    ) -> None:
        super().__init__()
        device = next(base.parameters()).device
        self.base = base
        self.a = nn.Parameter(torch.zeros(spec.r, d_in, dtype=torch.float32, device=device))
        self.b = nn.Parameter(torch.zeros(d_out, spec.r, dtype=torch.float32, device=device))
        self.scaling = spec.scaling
        # the layer's `number` among those that share the noise
        self.noise, self.number = noise, number
        self.active = True
        self.answerers = answerers
        self.stack: tuple[Tensor, Tensor] | None = None
        self.background = Background()
        # what computes the layer's output in the place of a and b, where rows have factors of their own
        self.instead: Callable[[Tensor], Tensor] | None = None
        self._casts: tuple[Any, tuple[Tensor, Tensor]] | None = None

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code of a model that asks a layer for its type or device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return self.background.add_to(self.base(x), x)
        if self.stack is not None:
            return self._forward_stacked(x, *self.stack)
        if self.instead is not None:
            return self.instead(x)
        kept, scaling = self.draw_dropout(x)
        if type(self.base) is nn.Linear and self.background.is_empty:
            factors = (self.a, self.b, self._cast_factors(x.dtype))
            return LowRankLinear.apply(x, self.base.weight, self.base.bias, *factors, scaling, kept)  # type: ignore[return-value]
        result = self.background.add_to(self.base(x), x)
        if kept is not None:
            x = drop(x, kept)
        low = F.linear(x, self.a.to(x.dtype)).flatten(0, -2)
        total = torch.addmm(result.flatten(0, -2), low, self.b.to(x.dtype).t(), alpha=scaling)
        return total.view_as(result)

    def draw_dropout(self, x: Tensor) -> tuple[Tensor | None, float]:
        """Which entries of x are kept (None: all), and the scaling that makes up for those that are dropped."""
        if not (self.training and self.noise.acts):
            return None, self.scaling
        return self.noise.draw(self.number, x), self.scaling / self.noise.kept_share

    def _forward_stacked(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Every row through its own of several adapters: all of A at once, then only the row's part is multiplied by
        B."""
        low = (F.linear(x, a) * self.answerers.mask).flatten(0, -2)
        result = self.background.add_to(self.base(x), x)
        return torch.addmm(result.flatten(0, -2), low, b.t(), alpha=self.scaling).view_as(result)

    def _cast_factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B in `dtype`, cast once per change of the factors and not once per pass or decode step."""
        # what is made in inference mode cannot be used in training
        key = (self.a._version, self.b._version, dtype, torch.is_inference_mode_enabled())
        if self._casts is None or self._casts[0] != key:
            self._casts = (key, (self.a.detach().to(dtype), self.b.detach().to(dtype)))
        return self._casts[1]
