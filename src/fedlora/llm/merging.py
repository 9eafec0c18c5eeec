"""An adapter added to the weights of its base: in float32, rounded once to the type that is wanted.

Rounding loses a small update: where it is below half a step of the type, the weight does not change at all. How much is
lost is measured layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.config.train_fields import Quantization
from fedlora.errors import UsageError
from fedlora.federated.adapters import layer_pairs
from fedlora.llm.base_source import open_source
from fedlora.llm.library_log import quiet_transformers
from fedlora.llm.lora import KEY_PREFIX
from fedlora.llm.quantization import FrozenLinear, loading_options, replace_layers
from fedlora.llm.trainable_layers import is_conv1d
from fedlora.types import AdapterState


@dataclass(frozen=True)
class Rounding:
    """What rounding to a type lost of a layer's update."""

    layer: str
    entries: int
    unchanged: int
    """Entries that the update did not move."""
    update_square: float
    lost_square: float
    """Squared norms of the update, and of its part that rounding lost."""

    @property
    def unchanged_share(self) -> float:
        return self.unchanged / self.entries

    @property
    def lost_share(self) -> float:
        """Norm of what was lost over that of the update; above 1 where the base itself is rounded by more."""
        return math.sqrt(self.lost_square / self.update_square) if self.update_square else 0.0

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {"layer": self.layer, "unchanged_share": self.unchanged_share, "lost_share": self.lost_share}


def total_rounding(layers: list[Rounding]) -> Rounding:
    """All layers as one."""
    names = ("entries", "unchanged", "update_square", "lost_square")
    return Rounding("all", *(sum(asdict(one)[name] for one in layers) for name in names))


def load_exact_base(place: str, quantization: Quantization, *, trust_remote_code: bool) -> Any:
    """The base in float32 on the CPU. Weights of a quantised run are those that it multiplied by.

    Raises UsageError as `load_base_model` does.
    """
    source = open_source(place, trust_remote_code)
    config = source.load_config(quantization)
    model = source.load_model(config, dtype=torch.float32)
    options = loading_options(quantization, torch.device("cpu"), torch.float32)
    if options:
        held = source.load_model(source.load_config(quantization), dtype=torch.float32, **options)
        replace_layers(held, place, quantization)
        for name, layer in held.named_modules():
            if isinstance(layer, FrozenLinear):
                model.get_submodule(name).weight.data.copy_(layer.dequantise(torch.float32))
    return model.requires_grad_(False).eval()


@torch.no_grad()
def merge_adapter(model: Any, adapter: AdapterState, scaling: float, dtype: torch.dtype) -> list[Rounding]:
    """Add `scaling * B @ A` to the float32 weights of `model`, then give all of it the type `dtype`.

    A weight that another part of the model shares gets its own copy first: only the layer is adapted, not the embedding
    that it is tied to. Raises UsageError where the model has no such layer or its shape is another.
    """
    found = []
    for name, (a_key, b_key) in layers_of(adapter).items():
        weight = _own_weight(model, name)
        delta = scaling * (adapter[b_key].to(torch.float64) @ adapter[a_key].to(torch.float64))
        if is_conv1d(model.get_submodule(name)):
            delta = delta.T
        if delta.shape != weight.shape:
            raise UsageError(
                f"{name}: the adapter's update is {tuple(delta.shape)}, the weight of the base {tuple(weight.shape)}",
                hint="give the base that the run was trained on: --base_model",
            )
        merged = (weight.to(torch.float64) + delta).to(torch.float32)
        found.append(_measure(name, weight, merged, delta, dtype))
        weight.copy_(merged)
    model.to(dtype)
    return found


def merged_weights(model: Any) -> dict[str, Tensor]:
    """Name -> weight, each tensor once: what is tied is left out."""
    return {name: value.detach() for name, value in model.named_parameters()}


def _measure(layer: str, weight: Tensor, merged: Tensor, delta: Tensor, dtype: torch.dtype) -> Rounding:
    before, after = weight.to(dtype), merged.to(dtype)
    lost = after.to(torch.float64) - before.to(torch.float64) - delta
    unchanged = int((before == after).sum())
    return Rounding(layer, weight.numel(), unchanged, float(delta.square().sum()), float(lost.square().sum()))


def _own_weight(model: Any, name: str) -> Tensor:
    """The weight of a layer, taken apart from those that share it."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise UsageError(
            f"the base has no layer {name}, which the adapter adapts", hint="give the base that the run was trained on"
        ) from None
    weight = layer.weight
    sharing = [other for other, value in model.named_parameters(remove_duplicate=False) if value is weight]
    if len(sharing) > 1:
        layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    return layer.weight


def save_merged(model: Any, folder: Any, *, stop_ids: tuple[int, ...]) -> None:
    """The model as transformers saves it; its generation ends at `stop_ids`."""
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = list(stop_ids)
    with quiet_transformers():
        model.save_pretrained(folder)


def layers_of(adapter: AdapterState) -> Mapping[str, tuple[str, str]]:
    """Name of a layer in the model -> the keys of its A and B."""
    return {name.removeprefix(KEY_PREFIX): pair for name, pair in layer_pairs(adapter).items()}
