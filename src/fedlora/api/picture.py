"""A figure that a notebook shows, and that can be saved: the report's drawing code made it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fedlora.api.entrance import PathLike
from fedlora.files import write_bytes


@dataclass(frozen=True)
class Picture:
    """A PNG; `png` holds its bytes."""

    name: str
    png: bytes = field(repr=False)

    def _repr_png_(self) -> bytes:
        return self.png

    def save(self, path: PathLike) -> Path:
        """Write the picture to a file, and return its path. Raises StorageError."""
        file = Path(path)
        write_bytes(file, self.png)
        return file
