"""Configuration of the `init` command."""

from __future__ import annotations

from pathlib import Path

from fedlora.config.reading import ReadingConfig
from fedlora.config.schema import flag


class InitRunConfig(ReadingConfig):
    """Write a commented run.yaml for the rows in a folder: one file per client, or what `allocate` wrote."""

    data_path: Path = flag(Path("./data"), "folder of the clients' files", everyday=True)
    config_file: Path = flag(Path("./run.yaml"), "file to write", everyday=True)
    base_model: str = flag(
        "smollm2-135m", "base model: smollm2-135m (embedded), a local folder, or a hub id", everyday=True
    )
    overwrite: bool = flag(False, "replace the file if it exists", everyday=True)
