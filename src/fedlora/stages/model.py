"""Make the embedded model ready, or try a base model: which faster ways give its own results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.data import ModelCheckConfig, ModelConfig
from fedlora.llm import embedded_model
from fedlora.llm.abilities import ALWAYS, Abilities
from fedlora.llm.base_model import load_base_model
from fedlora.llm.fast.proof import with_fast_layers
from fedlora.llm.gradient_check import with_right_gradients
from fedlora.llm.lora import LoraModel, LoraSpec
from fedlora.plain_text import NOTHING, one_line, table_text
from fedlora.results import Result

_HEADS = {"linear": "output layer", "own": "model's own code", "model": "whole forward pass"}
_WAYS = {
    "padding": "rows of several lengths in a training pass",
    "shared_prefix": "shared first tokens in training",
    "own_cache": "our cache and decoding",
    "padded_prompts": "prompts of several lengths in a batch",
    "shared_prompts": "shared first tokens of prompts",
    "fast_layers": "fast path of training",
    "longest": "longest row",
}


@dataclass(frozen=True, repr=False)
class InstalledModel(Result):
    """The folder of the converted model, which transformers and PEFT load like any other."""

    folder: Path

    @property
    def next_command(self) -> str:
        """Rows to train it on."""
        return "fedlora data skills"

    def text(self) -> str:
        """The folder."""
        return str(self.folder)

    def as_dict(self) -> dict[str, Any]:
        return {"folder": str(self.folder)}


@dataclass(frozen=True, repr=False)
class CheckedModel(Result):
    """A base model that gives its own results, and the ways by which it does so."""

    name: str
    dtype: str
    device: str
    layers: int
    """Adapted ones."""
    notes: tuple[str, ...]
    can: Abilities

    def parts(self) -> Sequence[str]:
        """A table of the ways, then the layers that are left out."""
        why = self.can.reasons
        rows = [
            ("logits from", _HEADS[self.can.head], why.get("head", NOTHING)),
            ("attention", "ours" if self.can.own_attention else "the model's", why.get("own_attention", NOTHING)),
            ("several rows in a training pass", *_cells(self.can, "equal_rows")),
            *((label, *_cells(self.can, field)) for field, label in _WAYS.items()),
            ("several prompts in a batch", *_cells(self.can, "equal_prompts")),
        ]
        head = f"{one_line(self.name)} in {self.dtype} on {self.device}: right, with {self.layers} adapted layers"
        shown = [(label, value, one_line(reason)) for label, value, reason in rows]
        return (head, table_text(("", "used", "why not"), shown, left=(0, 1, 2)), *self.notes)

    def as_dict(self) -> dict[str, Any]:
        return {
            "base_model": self.name,
            "dtype": self.dtype,
            "device": self.device,
            "adapted_layers": self.layers,
            "notes": list(self.notes),
            "abilities": self.can.record(),
        }


def run(config: ModelConfig) -> InstalledModel:
    """Install and convert the model where that is not done yet."""
    embedded_model.install()
    return InstalledModel(embedded_model.folder())


def check(config: ModelCheckConfig) -> CheckedModel:
    """Try a base model on a few tokens; UsageError, with the reason, for one that nothing of ours is right for."""
    base = load_base_model(
        config.base_model,
        device=config.device,
        dtype=config.base_dtype,
        quantization=config.quantization,
        trust_remote_code=config.trust_remote_code,
        again=True,
    )
    lora = LoraModel(base.model, LoraSpec(8, 16, 2.0, 0.0, config.lora_target_modules))
    base = with_fast_layers(with_right_gradients(base, lora, config.quantization, again=True), lora, again=True)
    return CheckedModel(
        config.base_model, base.dtype_name, str(base.device), len(lora.layers), tuple(lora.notes), base.can
    )


def _cells(can: Abilities, field: str) -> tuple[str, str]:
    """Whether, or up to which length, a way is used; and why not beyond."""
    value = getattr(can, field)
    used = "any" if field == "longest" else "yes"
    if value not in (True, ALWAYS):
        used = f"up to {value:,} tokens" if value else "no"
    return used, can.reasons.get(field, NOTHING)
