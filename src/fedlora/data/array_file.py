"""A file of rows as one JSON array, in Dolly's own schema (instruction, context, response, category)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedlora.errors import UsageError
from fedlora.files import write_text


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """UsageError when the file exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise UsageError(f"{path} already exists", hint="give --overwrite to replace it, or another --output_file")


def array_text(rows: Iterable[Mapping[str, str]]) -> str:
    """Rows as the text of a JSON array; the same rows give the same bytes."""
    return json.dumps(list(rows), indent=2, ensure_ascii=False) + "\n"


def write_array(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write rows as one JSON array."""
    write_text(path, array_text(rows))
