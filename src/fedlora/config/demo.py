"""Configuration of the demo."""

from __future__ import annotations

from pathlib import Path

from fedlora.config.schema import Config, flag


class DemoConfig(Config):
    """Run the whole pipeline on the embedded model and the skills data, with homo, seq, none and pooled.

    All files lie under output_dir; an earlier demo there is replaced.
    """

    output_dir: Path = flag(Path("./demo"), "folder for data, models, predictions and report")
    rounds: int = flag(3, "communication rounds of every method", ge=1)
    train_per_cat: int = flag(64, "training rows of each of the eight clients", ge=1)
    test_per_cat: int = flag(10, "test rows of each of the eight categories", ge=1)
    seed: int = flag(42, "seed of data and training", ge=0)
    device: str = flag("auto", "auto, cpu, cuda or cuda:<n>")
