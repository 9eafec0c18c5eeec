"""LoRA dropout whose noise belongs to an example of a step, whatever the pass that the example lies in.

torch's generator hands out numbers in the order in which they are asked for, so its noise depends on how the examples
of a step are cut into passes, on padding and on the device. Here whether an entry is dropped is a function of the
example's seed, the layer, the token's position and the feature. It costs two passes over the entries
(benchmarks/dropout.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

GAMMA, MIX_1, MIX_2 = (word - 2**64 for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Constants of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), as signed 64-bit integers."""

MOST_WORDS = 1 << 26
"""Random words, of 4 bytes each, that are held at once."""


class DropoutNoise:
    """Which entries of its input each of `num_layers` layers drops, with probability `p` in [0, 1).

    A layer draws, for every example, two words a_f and b_f per feature and one t_i per token, and drops entry (i, f)
    where `(a_f * t_i + b_f) mod 2**32 < p * 2**32`: multiply-add hashing (Dietzfelbinger, STACS 1996), by which any two
    entries are independent.
    """

    def __init__(self, p: float, num_layers: int) -> None:
        dropped = min(round(p * 2**32), 2**32 - 1)
        self.acts = dropped > 0
        self.kept_share = 1 - dropped / 2**32
        self._threshold = dropped - 2**31
        self._num_layers = num_layers
        self._streams: Tensor | None = None

    def begin_pass(self, seeds: Sequence[int], device: torch.device) -> None:
        """The next pass holds the examples of these `seeds` (63 bits each), in this order."""
        rows = torch.tensor(seeds, dtype=torch.int64, device=device)
        self._streams = split_mix(rows, torch.arange(self._num_layers, device=device))

    def draw(self, layer: int, x: Tensor) -> Tensor:
        """True where an entry of the input x of layer number `layer` is kept, False where it is dropped; x's shape.

        x is (examples, length, d) or (examples * length, d). What comes in neither shape, as from a router that picks
        tokens or after the decoder (1, labels, d), is hashed by its place in the pass: there, and only there, the
        layout of a pass changes the noise. Raises ValueError when x has other examples than the pass.
        """
        if self._streams is None:
            raise ValueError("dropout needs the seeds of a pass's examples: call begin_pass first")
        streams, (tokens, d) = self._streams[:, layer], (x.shape[:-1].numel(), x.shape[-1])
        if x.dim() > 2 and len(x) not in (1, len(streams)):
            raise ValueError(f"a layer sees {tuple(x.shape)}, but the pass has {len(streams)} examples")
        if tokens % len(streams):
            streams = streams[:1]
        length = tokens // len(streams)
        # features come first: where a token's word is found must not depend on padding
        words = split_mix(streams, torch.arange(2 * d + length, device=x.device)) >> 32
        a, b, t = words.to(torch.int32).split((d, d, length), dim=1)
        kept = torch.empty((len(streams), length, d), dtype=torch.bool, device=x.device)
        size = max(1, MOST_WORDS // (length * d))
        for begin in range(0, len(streams), size):
            part = slice(begin, begin + size)
            hashed = torch.addcmul(b[part, None], a[part, None], t[part, :, None])
            torch.ge(hashed, self._threshold, out=kept[part])
        return kept.view(x.shape)

    def draw_packed(self, layer: int, lengths: Sequence[int], d: int) -> Tensor:
        """The same (sum of lengths, d) for the pass's examples one after another, without padding.

        Raises ValueError when these are other examples than the pass's.
        """
        if self._streams is None or len(self._streams) != len(lengths):
            raise ValueError("dropout needs the seeds of a pass's examples: call begin_pass first")
        streams = self._streams[:, layer]
        words = split_mix(streams, torch.arange(2 * d + max(lengths), device=streams.device)) >> 32
        a, b, t = words.to(torch.int32).split((d, d, max(lengths)), dim=1)
        kept = torch.empty((sum(lengths), d), dtype=torch.bool, device=streams.device)
        for row, part in enumerate(kept.split(list(lengths))):
            torch.ge(torch.addcmul(b[row], a[row], t[row, : len(part), None]), self._threshold, out=part)
        return kept


def drop(x: Tensor, kept: Tensor) -> Tensor:
    """x with zeros where `kept` is False; the caller divides by the share that is kept."""
    # as bytes the mask is cast several times faster than as booleans
    return x * kept.view(torch.uint8).to(x.dtype)


def split_mix(seeds: Tensor, numbers: Tensor) -> Tensor:
    """Outputs `numbers` (n,), from 0, of the SplitMix64 generators with `seeds` (...): (..., n), all int64."""
    z = seeds[..., None] + (numbers + 1) * GAMMA
    z = (z ^ _shift_right(z, 30)) * MIX_1
    z = (z ^ _shift_right(z, 27)) * MIX_2
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift without the sign, which torch's shift of signed integers would repeat."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def has_own_dropout(model: Any) -> bool:
    """Whether a model drops activations of its own in training: each row then draws noise on shared tokens too."""
    drops = any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
    return drops or bool(getattr(model.config, "attention_dropout", 0.0))
