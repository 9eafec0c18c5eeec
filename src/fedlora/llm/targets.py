"""Which layers of a model are adapted: linear ones, GPT-2's Conv1D among them, by name or all but the output layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from fedlora.errors import UsageError


def find_targets(model: Any, names: tuple[str, ...]) -> list[tuple[str, nn.Module, int, int]]:
    """(name, layer, d_in, d_out) of every layer to adapt; UsageError when a name fits no linear layer."""
    head = model.get_output_embeddings()
    linear = {
        name: (module, *size)
        for name, module in model.named_modules()
        if module is not head and (size := _linear_size(module)) is not None
    }
    if names == ("all-linear",):
        return [(name, *found) for name, found in linear.items()]
    unmatched = [target for target in names if not any(_is_named(name, target) for name in linear)]
    if unmatched:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise UsageError(
            f"lora_target_modules: no linear layer is named {', '.join(unmatched)}",
            hint=f"this model has {known}; or use all-linear",
        )
    return [(name, *found) for name, found in linear.items() if any(_is_named(name, target) for target in names)]


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a layer stores its weight as (d_in, d_out)."""
    from transformers.pytorch_utils import Conv1D

    # a quantised layer is no Conv1D any more, the layer that its adapter will be loaded onto may be one
    return isinstance(module, Conv1D) or getattr(module, "source_cls", None) is Conv1D


def _linear_size(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer, None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_conv1d(module):
        return module.weight.shape[0], module.weight.shape[1]  # type: ignore[union-attr]
    return None
