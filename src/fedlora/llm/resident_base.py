"""One base for several runs of a process: loaded once, handed out without the LoRA layers of the run before.

Only the last base is kept: two would fill the memory that a run plans with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedlora.llm.base_identity import find_identity
from fedlora.llm.base_model import BaseModel, load_base_model
from fedlora.llm.lora import LoraLinear


class ResidentBase:
    """Takes the place of `load_base_model`."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[Any, ...], BaseModel] | None = None

    def load(self, name: str, **options: Any) -> BaseModel:
        """The base of this name and these options of `load_base_model`. Earlier users must not use it again."""
        # the same base under another path is not loaded again, and another one under the same path is
        key = (find_identity(name) or name, *sorted(options.items()))
        if self._kept is None or self._kept[0] != key:
            self._kept = None
            base = load_base_model(name, **options)
            self._kept = ((base.identity or name, *sorted(options.items())), base)
        base = self._kept[1]
        remove_lora(base.model)
        return replace(base, name=name)


def remove_lora(model: Any) -> None:
    """Put the base's own layers back where LoRA layers stand."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base)
    model.eval()
