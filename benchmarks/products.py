"""The floating-point operations of training's matrix products, counted by hand from the shapes.

Two for every multiply-add. Counted, over real tokens only: every linear layer forward, and backward with respect to
its input; LoRA's two products forward and four backward; attention's two products forward and four backward, over
the pairs that a causal mask leaves; the output layer on labels only, forward and backward. Not counted, because
not needed: gradients of frozen weights, gradients below the first adapted layer, logits without a label, padding,
and what rows of a pass share at their beginning, after the first time. Not counted either: everything that is no
matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.llm.lora import LoraModel


@dataclass(frozen=True)
class Pass:
    """Rows of one pass: their lengths, tokens that all begin with (computed once), and labels."""

    lengths: tuple[int, ...]
    shared: int
    labels: int

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return sum(self.lengths) - (len(self.lengths) - 1) * self.shared

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        rows = sum((length - self.shared) * (length + self.shared + 1) // 2 for length in self.lengths)
        return rows + self.shared * (self.shared + 1) // 2


def count_operations(model: Any, lora: LoraModel, passes: Sequence[Pass]) -> dict[str, int]:
    """Operations of these passes by kind: `linear layers`, `LoRA`, `attention`, `output layer`."""
    from torch import nn

    config = model.config.get_text_config()
    tokens, pairs, labels = (sum(getattr(part, name) for part in passes) for name in ("tokens", "pairs", "labels"))
    adapted = {f"{name}.base" for name in lora.layers}
    head = model.get_output_embeddings()
    linear = low_rank = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or layer is head:
            continue
        products = 2 * tokens * layer.in_features * layer.out_features
        needs_input_gradient = not _reads_embeddings(name)
        linear += products * (1 + needs_input_gradient)
        if name in adapted:
            r = lora.spec.r
            into, out = 2 * tokens * layer.in_features * r, 2 * tokens * layer.out_features * r
            low_rank += into * (2 + needs_input_gradient) + out * 3
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * 6 * 2 * pairs * config.num_attention_heads * width
    if not any(".layers.0." in name and "k_proj" in name for name in adapted):
        attention -= 2 * pairs * config.num_attention_heads * width
    output = 2 * 2 * labels * head.in_features * head.out_features
    return {"linear layers": linear, "LoRA": low_rank, "attention": attention, "output layer": output}


def _reads_embeddings(name: str) -> bool:
    """Whether a layer's input needs no gradient: frozen embeddings, normalised."""
    return ".layers.0." in name and any(part in name for part in ("q_proj", "k_proj", "v_proj"))
