"""One decoder layer as one function with its gradient written down.

Of a token are kept: the layer's input, queries, keys and values, the attention's weights, gate and up. Norms and SwiGLU
are computed again backwards, for they cost less than what would be kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedlora.llm.fast.factors import Factors, project, project_back
from fedlora.llm.fast.kernels import norm, norm_back, rotate, swiglu, swiglu_back
from fedlora.llm.fast.layer_parts import LayerParts
from fedlora.llm.fast.packed_attention import attend, attend_back
from fedlora.llm.fast.packed_rows import Pack

Angles = tuple[Tensor, Tensor]
"""Cosines and sines (n, width) in float32."""


class DecoderLayer(torch.autograd.Function):
    """A layer over the tokens of a pack (n, d); `angles` are those of queries and of keys.

    With `chosen` (m,), only these tokens pass through what follows the attention: (m, d). The rest are `factor_inputs`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        parts: LayerParts,
        pack: Pack,
        angles: tuple[Angles, Angles],
        chosen: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        qkv_factors = Factors.of(parts.qkv, pack)
        out_factors, gate_up_factors, down_factors = (
            Factors.of(one, pack, chosen) for one in (parts.out, parts.gate_up, parts.down)
        )
        seen, roots = norm(x, parts.norms[0], parts.eps)
        qkv, low_qkv = project(seen, parts.qkv, qkv_factors)
        rotate(qkv, parts.heads, *angles[0])
        rotate(qkv[:, parts.heads * parts.width :], parts.groups, *angles[1])
        answer, weights = attend(qkv, pack, parts)
        if chosen is not None:
            answer = answer[chosen]
        middle, low_out = project(answer, parts.out, out_factors)
        middle += x if chosen is None else x[chosen]
        seen, roots_after = norm(middle, parts.norms[1], parts.eps)
        gate_up, low_gate_up = project(seen, parts.gate_up, gate_up_factors)
        result, low_down = project(swiglu(gate_up), parts.down, down_factors)
        result += middle
        ctx.parts, ctx.pack, ctx.angles, ctx.chosen = parts, pack, angles, chosen
        ctx.factors = (qkv_factors, out_factors, gate_up_factors, down_factors)
        ctx.lows = (low_qkv, low_out, low_gate_up, low_down)
        ctx.save_for_backward(x, roots, qkv, answer if out_factors else None, middle, roots_after, gate_up, *weights)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        parts, pack, chosen = ctx.parts, ctx.pack, ctx.chosen
        qkv_factors, out_factors, gate_up_factors, down_factors = ctx.factors
        low_qkv, low_out, low_gate_up, low_down = ctx.lows
        x, roots, qkv, answer, middle, roots_after, gate_up, *weights = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        inner = swiglu(gate_up) if down_factors else None
        to_inner, of_down = project_back(gradient, inner, low_down, parts.down, down_factors)
        seen = norm(middle, parts.norms[1], parts.eps)[0] if gate_up_factors else None
        to_seen, of_gate_up = project_back(
            swiglu_back(to_inner, gate_up), seen, low_gate_up, parts.gate_up, gate_up_factors
        )
        to_middle = norm_back(to_seen, middle, parts.norms[1], roots_after, gradient)
        to_answer, of_out = project_back(to_middle, answer, low_out, parts.out, out_factors)
        if chosen is not None:
            to_answer, to_middle = _spread(to_answer, chosen, len(x)), _spread(to_middle, chosen, len(x))
        to_qkv = attend_back(to_answer, qkv, weights, pack, parts)
        rotate(to_qkv, parts.heads, *ctx.angles[0], back=True)
        rotate(to_qkv[:, parts.heads * parts.width :], parts.groups, *ctx.angles[1], back=True)
        seen = norm(x, parts.norms[0], parts.eps)[0] if qkv_factors else None
        to_seen, of_qkv = project_back(to_qkv, seen, low_qkv, parts.qkv, qkv_factors)
        to_x = norm_back(to_seen, x, parts.norms[0], roots, to_middle)
        return to_x, None, None, None, None, *of_qkv, *of_out, *of_gate_up, *of_down


def factor_inputs(parts: LayerParts) -> list[Tensor]:
    """A and B of the layer's adapted projections that are switched on, in the order of their gradients."""
    adapted = [pair[0] for one in (parts.qkv, parts.out, parts.gate_up, parts.down) for pair in one.adapted]
    return [factor for layer in adapted if layer.active for factor in (layer.a, layer.b)]


def _spread(values: Tensor, places: Tensor, length: int) -> Tensor:
    """Values (m, d) at their places in (length, d), zeros elsewhere."""
    return values.new_zeros(length, values.shape[1]).index_copy_(0, places, values)
