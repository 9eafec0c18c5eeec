"""Norm, rotation, SwiGLU, softmax and cross-entropy with their gradients: in one pass each, or by torch.

The passes are an extension module (`_kernels.c`) that is built where a compiler is, for bfloat16 on processors with
AVX-512. Everywhere else torch computes the same in several passes. Tensors are contiguous.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor


@functools.cache
def compiled() -> ModuleType | None:
    """The extension module, where it was built and this processor can run it."""
    try:
        from fedlora.llm.fast import _kernels  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        return None
    if not _kernels.available():
        return None
    for name in ("GOMP_parallel", "omp_get_thread_num"):
        if not _openmp_function(name):
            return _kernels
    _kernels.use_openmp(_openmp_function("GOMP_parallel"), _openmp_function("omp_get_thread_num"))
    return _kernels


def _openmp_function(name: str) -> int:
    """The address of a function of the OpenMP runtime that torch has loaded; 0 where there is none."""
    for file in Path("/proc/self/maps").read_text().split():
        if "libgomp" in file:
            return ctypes.cast(getattr(ctypes.CDLL(file), name), ctypes.c_void_p).value or 0
    return 0


def _module(x: Tensor) -> ModuleType | None:
    return compiled() if x.dtype == torch.bfloat16 and x.device.type == "cpu" else None


def _run(module: ModuleType, name: str, rows: int, number: float, *arguments: Tensor | int) -> None:
    values = [one.data_ptr() if isinstance(one, Tensor) else one for one in arguments]
    module.call(module.names.index(name), torch.get_num_threads(), rows, number, *values)


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of x (n, d), and the inverse root mean squares (n,) in float32."""
    if module := _module(x):
        out, roots = torch.empty_like(x), torch.empty(len(x), dtype=torch.float32)
        _run(module, "norm", len(x), eps, x, weight, out, roots, x.shape[1])
        return out, roots
    wide = x.float()
    roots = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    return weight * (wide * roots[:, None]).to(x.dtype), roots


def norm_back(gradient: Tensor, x: Tensor, weight: Tensor, roots: Tensor, addend: Tensor) -> Tensor:
    """`addend` (n, d) plus the gradient of the norm's input."""
    if module := _module(x):
        out = torch.empty_like(x)
        _run(module, "norm_back", len(x), 0.0, gradient, x, weight, roots, addend, out, x.shape[1])
        return out
    g, wide, root = (gradient * weight).float(), x.float(), roots[:, None]
    return addend + (g * root - wide * (root.pow(3) * (g * wide).mean(-1, keepdim=True))).to(x.dtype)


def rotate(x: Tensor, heads: int, cosines: Tensor, sines: Tensor, *, back: bool = False) -> None:
    """Rotate the first `heads` heads in every row of x (n, more) in place by cosines and sines (n, width) in float32;
    `back`: by the transposed rotation."""
    width = cosines.shape[1]
    sign = -1.0 if back else 1.0
    if module := _module(x):
        _run(module, "rotate", len(x), sign, x, cosines, sines, heads, width, x.stride(0))
        return
    view = x[:, : heads * width].view(len(x), heads, width)
    low, high = view.chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1) * (sines * sign).to(x.dtype)[:, None]
    view.copy_(view * cosines.to(x.dtype)[:, None] + turned)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the two side by side (n, 2 f): (n, f)."""
    width = gate_up.shape[1] // 2
    if module := _module(gate_up):
        out = gate_up.new_empty(len(gate_up), width)
        _run(module, "swiglu", len(out), 0.0, gate_up, out, width)
        return out
    return torch.nn.functional.silu(gate_up[:, :width]) * gate_up[:, width:]


def swiglu_back(gradient: Tensor, gate_up: Tensor) -> Tensor:
    """The gradients of gate and up side by side (n, 2 f)."""
    width = gradient.shape[1]
    out = torch.empty_like(gate_up)
    if module := _module(gate_up):
        _run(module, "swiglu_back", len(out), 0.0, gradient, gate_up, out, width)
        return out
    gate, up = gate_up.split(width, dim=1)
    share = torch.sigmoid(gate)
    silu = gate * share
    torch.mul(gradient, silu, out=out[:, width:])
    torch.mul(gradient * up, share + silu * (1 - share), out=out[:, :width])
    return out


def gather(x: Tensor, places: Tensor, heads: int, width: int) -> Tensor:
    """The first `heads` heads of rows of x (n, ...) at places (pieces, length): (pieces, heads, length, width); zeros
    where a place is negative."""
    pieces, length = places.shape
    if module := _module(x):
        out = x.new_empty(pieces, heads, length, width)
        _run(module, "gather", pieces, 0.0, x, places, out, length, heads, width, x.stride(0))
        return out
    found = x[:, : heads * width].index_select(0, places.clamp(min=0).flatten())
    found.masked_fill_((places < 0).flatten()[:, None], 0.0)
    return found.view(pieces, length, heads, width).transpose(1, 2).contiguous()


def scatter(x: Tensor, places: Tensor, values: Tensor, skip: Tensor | None = None) -> None:
    """Write values (pieces, heads, length, width) to the rows of x they were gathered from, but for each piece's first
    `skip` (pieces,) int32."""
    pieces, heads, length, width = values.shape
    if skip is None:
        skip = torch.zeros(pieces, dtype=torch.int32, device=x.device)
    if module := _module(x):
        _run(module, "scatter", pieces, 0.0, x, places, values, skip, length, heads, width, x.stride(0))
        return
    kept = (places >= 0) & (torch.arange(length, device=x.device) >= skip[:, None])
    x[places[kept], : heads * width] = values.transpose(1, 2)[kept].flatten(1)


def softmax_(scores: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Softmax in place of scores (pieces, heads, queries, keys) over what a query sees.

    Query i of piece p sees its first `starts[p] + i + 1` keys, and none where these are more than `ends[p]` (int32,
    (pieces,) both): there the query is padding. The weights of what is not seen are zero.
    """
    pieces, heads, queries, keys = scores.shape
    if module := _module(scores):
        rows = pieces * heads * queries
        _run(module, "softmax", rows, 0.0, scores, starts, ends, queries, keys, heads)
        return scores
    seen = starts[:, None] + torch.arange(1, queries + 1, device=scores.device)
    seen = torch.where(seen <= ends[:, None], seen, 0)
    hidden = torch.arange(keys, device=scores.device) >= seen[:, None, :, None]
    weights = torch.softmax(scores.masked_fill_(hidden, float("-inf")), dim=-1)
    # where nothing is seen they are not numbers
    return scores.copy_(weights.masked_fill_(hidden, 0.0))


def softmax_back_(gradient: Tensor, weights: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """The gradient of the scores, in the place of the gradient of the weights."""
    pieces, heads, queries, keys = weights.shape
    if module := _module(weights):
        rows = pieces * heads * queries
        _run(module, "softmax_back", rows, 0.0, gradient, starts, ends, weights, queries, keys, heads)
        return gradient
    return gradient.copy_(torch.ops.aten._softmax_backward_data(gradient, weights, -1, weights.dtype))


def cross_entropy_(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """The losses (n,) in float32; logits (n, vocabulary) become `scale` times the gradient of their sum."""
    if module := _module(logits):
        losses = torch.empty(len(logits), dtype=torch.float32)
        _run(module, "cross_entropy", len(logits), scale, logits, targets, losses, logits.shape[1])
        return losses
    shares = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    at_targets = targets[:, None]
    losses = -shares.gather(1, at_targets)[:, 0]
    shares.exp_().scatter_add_(1, at_targets, shares.new_full(at_targets.shape, -1.0))
    logits.copy_(shares.mul_(scale))
    return losses
