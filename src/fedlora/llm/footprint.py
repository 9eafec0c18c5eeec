"""What training holds in memory at its peak: program, base, adapter and optimizer, one pass.

The pass is counted as for the layout of a run (`llm/memory.py`), but for the heaviest pass there will be, and not for
the longest row there could be.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
from torch import Tensor, nn

from fedlora.config.train_fields import Quantization
from fedlora.llm.base_model import BaseModel
from fedlora.llm.layout import Layout
from fedlora.llm.lora import LoraLinear, LoraModel
from fedlora.llm.loss import BYTES_PER_LOGIT, LOGIT_BYTES
from fedlora.llm.memory import TEMPORARIES, available_memory, count_kept_bytes, kept_with_checkpointing

OPTIMIZER_COPIES = 4
"""float32 copies of the adapter in training: factors, gradients, two moments of AdamW."""

FEDERATION_COPIES = 4
"""The same between trainings: where a client starts, what it sends, and the server's sum in float64."""

BITS = {"int8": 8.0, "nf4": 4.5}
"""Of a quantised weight, nf4 with the scale of its block."""


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak, and `available`, the bytes that the process may hold; all on the device that trains.

    On a GPU the program itself does not count. `background` is what the method will have added to the base.
    """

    program: int
    base: int
    optimizer: int
    one_pass: int
    available: int
    background: int = 0

    @property
    def total(self) -> int:
        return self.program + self.base + self.optimizer + self.one_pass + self.background


def read_program(base: BaseModel, *, outline: bool) -> int:
    """Bytes that this process holds beside the weights, to be asked for right after the base was loaded."""
    if base.device.type != "cpu":
        return 0
    held = psutil.Process().memory_info().rss
    return held if outline else max(0, held - count_weights(base, "none"))


def estimate_footprint(
    base: BaseModel,
    lora: LoraModel,
    layout: Layout,
    *,
    pass_tokens: int,
    pass_length: int,
    pass_labels: int,
    weights: int,
    program: int,
    available: int,
    background: int = 0,
) -> Footprint:
    """The peak of a run whose heaviest pass holds `pass_tokens` padded tokens in rows of `pass_length`, with so many
    numbers of `background` beside the base at its end."""
    kept = count_kept_bytes(base, lora, pass_length)
    if layout.gradient_checkpointing:
        kept = kept_with_checkpointing(base, kept)
    logits = min(LOGIT_BYTES[base.device.type], BYTES_PER_LOGIT * base.vocabulary * pass_labels)
    factors = sum(factor.numel() * factor.element_size() for _, factor in lora.named_factors())
    return Footprint(
        program=program,
        base=weights,
        optimizer=(OPTIMIZER_COPIES + FEDERATION_COPIES) * factors,
        one_pass=round(TEMPORARIES * kept * pass_tokens + logits),
        available=available,
        # float32, and cast for training and for validation where the base is of another type
        background=background * (4 + (0 if base.dtype.itemsize == 4 else 2 * base.dtype.itemsize)),
    )


def count_room(base: BaseModel, *, outline: bool) -> int:
    """Bytes that a process could hold on the device, those included that this one holds already."""
    free = available_memory(base.device)
    if base.device.type == "cpu":
        return free + psutil.Process().memory_info().rss
    return free if outline else free + count_weights(base, "none")


def count_weights(base: BaseModel, quantization: Quantization) -> int:
    """Bytes of the base's weights and buffers; for an outline, as they will be held under `quantization`."""
    tensors = {id(tensor): tensor for tensor in [*base.model.parameters(), *base.model.buffers()]}
    layers = [module for module in base.model.modules() if isinstance(module, LoraLinear)]
    factors = {id(factor) for layer in layers for factor in (layer.a, layer.b)}
    total = sum(_bytes(tensor) for key, tensor in tensors.items() if key not in factors)
    if quantization == "none":
        return total
    head = base.model.get_output_embeddings()
    linear = [module for module in base.model.modules() if isinstance(module, nn.Linear) and module is not head]
    dense = sum(_bytes(module.weight) for module in linear)
    return total - dense + round(sum(module.weight.numel() for module in linear) * BITS[quantization] / 8)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
