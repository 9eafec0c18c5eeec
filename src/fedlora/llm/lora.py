"""A model with LoRA layers (`lora_layer.py`) swapped in place, and its adapters under PEFT's names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.federated.adapters import Shapes
from fedlora.llm.background import Background
from fedlora.llm.dropout import DropoutNoise
from fedlora.llm.lora_layer import Answerers, LoraLinear, LoraSpec
from fedlora.llm.targets import find_targets
from fedlora.llm.trainable_layers import is_conv1d
from fedlora.types import AdapterState

KEY_PREFIX = "base_model.model."


class LoraModel:
    """A causal language model with LoRA layers in it, whose adapter is loaded and read as PEFT-keyed tensors.

    `peft_names` are the names by which PEFT finds the layers; `notes` say which layers have none though a target means
    them, and which PEFT may not find.
    """

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
        self.peft_names, self.notes = targets.peft_names, targets.notes
        self.noise = DropoutNoise(spec.dropout, len(targets.layers))
        for number, found in enumerate(targets.layers):
            layer = LoraLinear(found.layer, found.d_in, found.d_out, spec, self._answerers, self.noise, number)
            model.set_submodule(found.name, layer)
            self.layers[found.name] = layer
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

    @property
    def has_no_background(self) -> bool:
        """Whether nothing is added to the base besides the adapter."""
        return self._background is None

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
