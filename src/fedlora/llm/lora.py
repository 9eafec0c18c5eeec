"""LoRA layers (Hu et al., arXiv 2106.09685) with PEFT's names, swapped in place.

The factors and their gradients are float32, their products run in the base's type: PEFT's layer casts
the activations up to float32 instead, which costs half the speed on hardware that is fast at bfloat16.
In float32 the two compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from fedlora.federated.adapters import Shapes
from fedlora.llm.background import Background
from fedlora.llm.dropout import DropoutNoise, drop
from fedlora.llm.targets import find_targets, is_conv1d
from fedlora.types import AdapterState

KEY_PREFIX = "base_model.model."


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
        return result.view(*x.shape[:-1], -1)

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


class LoraModel:
    """A causal language model with LoRA layers in it, whose adapter is loaded and read as PEFT-keyed tensors."""

    def __init__(self, model: Any, spec: LoraSpec) -> None:
        self.model = model
        self.spec = spec
        self.layers: dict[str, LoraLinear] = {}
        self._answerers = Answerers()
        self._background: AdapterState | None = None
        self._sizes: dict[str, tuple[int, int]] = {}
        self._stacked_rank = spec.r
        model.requires_grad_(False)
        targets = find_targets(model, spec.target_modules)
        self.noise = DropoutNoise(spec.dropout, len(targets))
        for number, (name, base, d_in, d_out) in enumerate(targets):
            layer = LoraLinear(base, d_in, d_out, spec, self._answerers, self.noise, number)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
            self.layers[name] = layer
        factors = [(f"{KEY_PREFIX}{name}.lora_A.weight", layer.a) for name, layer in self.layers.items()]
        factors += [(f"{KEY_PREFIX}{name}.lora_B.weight", layer.b) for name, layer in self.layers.items()]
        self._factors = sorted(factors, key=lambda pair: pair[0])
        # new modules start in training mode: without this, dropout would act while generating
        model.eval()

    def named_factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """PEFT key and parameter of every factor, in key order."""
        yield from self._factors

    def shapes(self) -> Shapes:
        """Key -> shape of a full adapter, of the layers' rank."""
        return {key: tuple(factor.shape) for key, factor in self.named_factors()}

    @torch.no_grad()
    def set_adapter(self, state: AdapterState | None, *, weight: float = 1.0) -> None:
        """Copy an adapter into the layers, or switch them off (None: the base model); `weight` multiplies the scaling.

        A smaller rank than the layers' is filled up with zeros, which training leaves zero: where both factors of a
        direction are zero, so are their gradients.
        """
        for layer in self.layers.values():
            layer.active, layer.stack = state is not None, None
            layer.scaling = self.spec.scaling * weight
        self._sizes = {}
        if state is None:
            return
        for key, factor in self.named_factors():
            rows, columns = self._sizes[key] = _check_fits(key, state[key], factor)
            factor.zero_()
            factor[:rows, :columns].copy_(state[key])

    @torch.no_grad()
    def set_background(self, state: AdapterState | None) -> None:
        """Add to the base what is not trained: per layer A and B by their PEFT keys, or `<layer>.delta.weight`.

        Its scaling is 1. It stays until the next call; None takes it away.
        """
        if state is self._background:
            return
        for name, layer in self.layers.items():
            keys = [f"{KEY_PREFIX}{name}.{part}.weight" for part in ("lora_A", "lora_B", "delta")]
            parts = [state[key].to(layer.a.device) for key in keys if key in state] if state else []
            layer.background = Background(*parts)
        self._background = state

    @torch.no_grad()
    def stack_adapters(self, states: Sequence[AdapterState | None], dtype: torch.dtype) -> None:
        """Hold several adapters at once, of any ranks, cast to the base's `dtype`; None is the base model.

        `choose_rows` comes next. Until `set_adapter` the model answers with these, and cannot be trained.
        """
        r = self._stacked_rank = max([1, *(_rank_of(state) for state in states if state is not None)])
        for name, layer in self.layers.items():
            a = torch.zeros(len(states) * r, layer.a.shape[1], dtype=dtype, device=layer.a.device)
            b = torch.zeros(layer.b.shape[0], len(states) * r, dtype=dtype, device=layer.b.device)
            for index, state in enumerate(states):
                if state is not None:
                    own_a, own_b = (state[f"{KEY_PREFIX}{name}.lora_{half}.weight"] for half in "AB")
                    # the rest of a smaller rank stays zero
                    own = slice(index * r, index * r + len(own_a))
                    a[own], b[:, own] = own_a, own_b
            layer.active, layer.stack = True, (a, b)

    def choose_rows(self, adapters: Tensor) -> None:
        """Row i of what comes next is answered by stacked adapter `adapters[i]`."""
        layer = next(iter(self.layers.values()))
        if layer.stack is None:
            raise ValueError("choose_rows needs stacked adapters")
        a = layer.stack[0]
        owners = torch.arange(len(a), device=a.device) // self._stacked_rank
        self._answerers.mask = (owners == adapters[:, None]).to(a.dtype)[:, None]

    def get_adapter(self) -> dict[str, Tensor]:
        """A float32 CPU copy of the factors (never live views), of the rank that was set."""
        found = {}
        for key, factor in self.named_factors():
            rows, columns = self._sizes.get(key, factor.shape)
            found[key] = factor.detach()[:rows, :columns].to("cpu", torch.float32, copy=True).contiguous()
        return found

    @contextmanager
    def train_mode(self, *, checkpointing: bool = False) -> Iterator[None]:
        """Dropout on inside, off outside; with `checkpointing` a layer keeps its input only and is computed again."""
        self.model.train()
        # transformers renames this; the new name is tried first
        kind = "activation" if hasattr(self.model, "activation_checkpointing_enable") else "gradient"
        if checkpointing:
            # the other kind of checkpoint wants inputs that need a gradient, which a frozen embedding does not give
            getattr(self.model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        try:
            yield
        finally:
            if checkpointing:
                getattr(self.model, f"{kind}_checkpointing_disable")()
            self.model.eval()


def _rank_of(state: AdapterState) -> int:
    """The highest rank of an adapter's layers."""
    return max(len(value) for key, value in state.items() if key.endswith(".lora_A.weight"))


def _check_fits(key: str, value: Tensor, factor: Tensor) -> tuple[int, int]:
    """The shape of `value`, which may be of a smaller rank than `factor`."""
    rank = 0 if key.endswith("lora_A.weight") else 1
    if value.dim() != 2 or value.shape[1 - rank] != factor.shape[1 - rank] or value.shape[rank] > factor.shape[rank]:
        raise ValueError(f"{key}: shape {tuple(value.shape)}, expected {tuple(factor.shape)} or of a smaller rank")
    return value.shape[0], value.shape[1]


def is_fan_in_fan_out(model: Any) -> bool:
    """Whether the adapted layers store their weight as (d_in, d_out), as GPT-2's Conv1D does."""
    return any(isinstance(module, LoraLinear) and is_conv1d(module.base) for module in model.modules())
