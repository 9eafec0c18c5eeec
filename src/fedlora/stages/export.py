"""The `export` stage: an adapter of a run as files for other programs.

Everything is found and checked before a byte is written, and the folder appears when it is complete.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.export import ExportConfig
from fedlora.console import say
from fedlora.exporting.exported import Exported, find_exported
from fedlora.exporting.formats import Written, estimate_bytes, write_format
from fedlora.exporting.hub_push import check_pushable, push_folder
from fedlora.exporting.load_commands import loading_commands
from fedlora.exporting.model_card import Card
from fedlora.files import new_folder, write_json, write_text
from fedlora.plain_text import size_text
from fedlora.results import Result

CARD, RECORD = "README.md", "export.json"
"""The model card, and what the folder was made from."""


@dataclass(frozen=True, repr=False)
class Export(Result):
    """A folder for other programs."""

    folder: Path
    record: Mapping[str, Any]
    """What it was made from; of a merged model also what rounding lost of every layer."""
    commands: Mapping[str, str]
    """Program -> how it loads the folder."""
    num_bytes: int
    seconds: float
    url: str = ""
    """Where it was pushed to."""

    def text(self) -> str:
        """What was lost, how to load it, and the folder."""
        loading = [f"{name}:\n{_indented(text)}" for name, text in self.commands.items()]
        size = f"{size_text(self.num_bytes)} in {self.seconds:.1f} s"
        return "\n".join([*self.record["notes"], *loading, size, *filter(None, [self.url]), str(self.folder)])

    def as_dict(self) -> dict[str, Any]:
        """The folder, its size and the time it took, what it was made from, and how to load it."""
        return {
            "folder": str(self.folder),
            "bytes": self.num_bytes,
            "seconds": self.seconds,
            "commands": dict(self.commands),
            "url": self.url,
            **self.record,
        }


def run(config: ExportConfig) -> Export:
    """Write the folder. Raises UsageError for what cannot be exported, StorageError; then there is no folder."""
    began = time.monotonic()
    exported = find_exported(config)
    if config.push:
        check_pushable(exported, config.format)
    with new_folder(config.to, needed=estimate_bytes(exported, config)) as folder:
        written = write_format(exported, config, folder)
        record = _describe(exported, config, written)
        write_text(folder / CARD, Card(config, exported, written.notes).text())
        write_json(folder / RECORD, record)
        num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    seconds = round(time.monotonic() - began, 3)
    if not exported.is_base_public and config.format in ("peft", "gguf-lora"):
        say(f"note: the base is the folder {exported.base_name}: on another machine name its place there")
    url = push_folder(config.to, config.push) if config.push else ""
    commands = loading_commands(exported, config.format, str(config.to.absolute()))
    return Export(config.to, record, commands, num_bytes, seconds, url)


def _describe(exported: Exported, config: ExportConfig, written: Written) -> dict[str, Any]:
    identity = exported.base.identity
    return {
        **exported.subject.record(),
        "format": config.format,
        "dtype": config.dtype,
        "rank": exported.rank,
        "relative_error": exported.relative_error,
        "base_model": exported.shown_base,
        "base_identity": identity.record() if identity else None,
        "notes": list(written.notes),
        **written.record(),
    }


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines())
