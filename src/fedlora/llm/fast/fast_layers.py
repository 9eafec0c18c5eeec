"""Passes of training and validation through the fast path: a decoder of Llama's kind on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fedlora.llm.base_model import BaseModel
from fedlora.llm.examples import Example
from fedlora.llm.fast.decoder_layer import DecoderLayer, factor_inputs
from fedlora.llm.fast.kernels import cross_entropy_
from fedlora.llm.fast.layer_parts import DecoderParts, take_apart
from fedlora.llm.fast.packed_rows import Pack, pack_rows
from fedlora.llm.loss import BYTES_PER_LOGIT, LOGIT_BYTES


@dataclass(frozen=True)
class FastLayers:
    """A base whose passes go through packed rows, one function a layer, and one pass over each intermediate result."""

    base: BaseModel
    parts: DecoderParts

    @classmethod
    def of(cls, base: BaseModel) -> FastLayers | None:
        """The fast path of a base on a CPU, LoRA layers included; None where the base has another structure."""
        head = base.model.get_output_embeddings()
        if base.device.type != "cpu" or base.can.head != "linear" or type(head) is not nn.Linear:
            return None
        parts = take_apart(base.decoder)
        return cls(base, parts) if parts is not None else None

    def backward_loss(self, rows: Sequence[Example], *, scale: float, share: bool) -> Tensor:
        """Accumulate the gradient of `scale * sum(cross-entropy)` over labels; returns the unscaled sum ()."""
        pack = pack_rows(rows, share=share)
        hidden = self._states(pack)
        gradient, weight = torch.zeros_like(hidden), self._head.weight
        total = torch.zeros(())
        with torch.no_grad():
            # several rows may predict from one state, as after a beginning they share
            states, given = (hidden, gradient) if _is_identity(pack) else (hidden[pack.by], None)
            for part in self._chunks(len(states)):
                logits = self._head(states[part])
                total += cross_entropy_(logits, pack.targets[part], scale).sum()
                if given is None:
                    gradient.index_add_(0, pack.by[part], logits @ weight)
                else:
                    torch.mm(logits, weight, out=given[part])
        hidden.backward(gradient)
        return total

    @torch.no_grad()
    def label_losses(self, rows: Sequence[Example]) -> Tensor:
        """The cross-entropy (labels,) at each label, row by row, in float32, without gradients."""
        pack = pack_rows(rows, share=True)
        states = self._states(pack)[pack.by]
        parts = [
            F.cross_entropy(self._head(states[part]).float(), pack.targets[part], reduction="none")
            for part in self._chunks(len(states))
        ]
        return torch.cat(parts)

    def label_logits(self, rows: Sequence[Example]) -> Tensor:
        """The logits (labels, vocabulary) that predict the labels of these rows."""
        pack = pack_rows(rows, share=True)
        return self._head(self._states(pack)[pack.by])

    @property
    def _head(self) -> nn.Linear:
        return cast(nn.Linear, self.base.model.get_output_embeddings())

    def _states(self, pack: Pack) -> Tensor:
        """The final hidden states (m, d) at a pack's places."""
        decoder = self.parts.decoder
        x = decoder.embed_tokens(pack.ids[None])[0]
        cosines, sines = self.parts.angles(pack.positions)
        last = len(self.parts.layers) - 1
        for number, layer in enumerate(self.parts.layers):
            angles = ((cosines * layer.scaling, sines * layer.scaling), (cosines, sines))
            x = DecoderLayer.apply(
                x, layer, pack, angles, pack.places if number == last else None, *factor_inputs(layer)
            )
        return decoder.norm(x)

    def _chunks(self, count: int) -> Iterator[slice]:
        """Slices of so many labels whose logits fit into memory together."""
        size = max(1, LOGIT_BYTES["cpu"] // (BYTES_PER_LOGIT * self.base.vocabulary))
        for start in range(0, count, size):
            yield slice(start, start + size)


def _is_identity(pack: Pack) -> bool:
    """Whether label i is predicted from place i."""
    return len(pack.by) == len(pack.places) and bool((pack.by == torch.arange(len(pack.by))).all())
