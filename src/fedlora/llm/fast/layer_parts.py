"""A decoder of Llama's kind taken apart: its layers as matrices, by structure and not by name of architecture.

The projections that read one input are laid side by side, so that they are one product; the model's own layers then
hold views of them, and nothing is there twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.llm.lora_layer import LoraLinear


@dataclass(frozen=True)
class Projections:
    """Linear layers that read one input, side by side: weight (sum of d_out, d_in), and where each one's rows end."""

    weight: Tensor
    bias: Tensor | None
    layers: tuple[nn.Module, ...]
    """Linear layers, or LoRA layers around them."""
    ends: tuple[int, ...]

    @property
    def adapted(self) -> list[tuple[LoraLinear, slice]]:
        """The LoRA layers and the columns of the output that are theirs."""
        starts = (0, *self.ends)
        return [
            (layer, slice(start, end))
            for layer, start, end in zip(self.layers, starts, self.ends, strict=False)
            if isinstance(layer, LoraLinear)
        ]


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer: x + o(attention(qkv(norm x))), then that plus down(silu(gate) * up) of its norm."""

    qkv: Projections
    out: Projections
    gate_up: Projections
    down: Projections
    norms: tuple[Tensor, Tensor]
    eps: float
    heads: int
    groups: int
    width: int
    """Entries of a head."""
    scaling: float


@dataclass(frozen=True)
class DecoderParts:
    """A decoder: embedding, rotary embedding, layers, last norm."""

    decoder: Any
    layers: tuple[LayerParts, ...]

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (n, width) in float32 at positions (n,)."""
        # asked for in float32: of bfloat16 they would be rounded
        cosines, sines = self.decoder.rotary_emb(torch.empty(1, device=positions.device), positions[None])
        return cosines[0].contiguous(), sines[0].contiguous()


def take_apart(decoder: Any) -> DecoderParts | None:
    """The parts of a decoder that has the names and shapes of Llama's; None of any other.

    That the parts compute what the decoder computes is not decided here: the self-check compares the two.
    """
    wanted = ("embed_tokens", "rotary_emb", "layers", "norm")
    if not all(hasattr(decoder, name) for name in wanted) or not len(decoder.layers):
        return None
    try:
        return DecoderParts(decoder, tuple(_layer_parts(layer) for layer in decoder.layers))
    except _OtherShapeError:
        return None


class _OtherShapeError(Exception):
    """The layer is not one of Llama's kind."""


_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def _layer_parts(layer: Any) -> LayerParts:
    names = [
        (layer, _LAYER),
        (getattr(layer, "self_attn", None), _ATTENTION),
        (getattr(layer, "mlp", None), _MLP),
    ]
    if not all(part is not None and {name for name, _ in part.named_children()} == wanted for part, wanted in names):
        raise _OtherShapeError
    attention, mlp = layer.self_attn, layer.mlp
    qkv = _side_by_side(attention.q_proj, attention.k_proj, attention.v_proj)
    width, heads = attention.head_dim, qkv.ends[0] // attention.head_dim
    groups = (qkv.ends[1] - qkv.ends[0]) // width
    before, after = layer.input_layernorm, layer.post_attention_layernorm
    eps = getattr(before, "variance_epsilon", None)
    if eps is None or width % 2 or qkv.ends[2] != (heads + 2 * groups) * width:
        raise _OtherShapeError
    return LayerParts(
        qkv=qkv,
        out=_side_by_side(attention.o_proj),
        gate_up=_side_by_side(mlp.gate_proj, mlp.up_proj),
        down=_side_by_side(mlp.down_proj),
        norms=(before.weight, after.weight),
        eps=eps,
        heads=heads,
        groups=groups,
        width=width,
        scaling=attention.scaling,
    )


def _side_by_side(*layers: nn.Module) -> Projections:
    """The layers as one, whose weight they then share."""
    found = [layer.base if isinstance(layer, LoraLinear) else layer for layer in layers]
    own = [layer for layer in found if type(layer) is nn.Linear]
    if len(own) != len(found):
        raise _OtherShapeError
    ends = tuple(torch.tensor([layer.out_features for layer in own]).cumsum(0).tolist())
    if len(own) == 1:
        return Projections(own[0].weight, own[0].bias, layers, ends)
    if any((layer.bias is None) != (own[0].bias is None) for layer in own):
        raise _OtherShapeError
    return Projections(
        _joined([layer.weight for layer in own]),
        None if own[0].bias is None else _joined([layer.bias for layer in own]),
        layers,
        ends,
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The parameters one below the other in one tensor, of which they become views; found so already, it is that."""
    first = parts[0]
    offset = first.storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or part.storage_offset() != offset:
            break
        offset += part.numel()
    else:
        shape = (sum(len(part) for part in parts), *first.shape[1:])
        return first.data.as_strided(shape, first.stride(), first.storage_offset())
    whole = torch.cat([part.data for part in parts])
    for part, piece in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = piece
    return whole
