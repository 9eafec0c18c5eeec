"""Rows as JSON lines, and a folder of them as the library `datasets` saves one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc


def row(text: str) -> dict[str, str]:
    return {"instruction": text, "output": f"answer {text}"}


def lines(*texts: str) -> str:
    return "".join(json.dumps(row(text)) + "\n" for text in texts)


def save(folder: Path, *files: Sequence[Any], batch: int = 2, options: Any = None) -> Path:
    """A folder as `datasets` 5.2.0 saves it, with one file for each group of rows."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{len(files):05}.arrow" for number in range(len(files))]
    for name, rows in zip(names, files, strict=True):
        table = pyarrow.Table.from_pylist([row(one) if isinstance(one, str) else one for one in rows])
        with pyarrow.ipc.new_stream(folder / name, table.schema, options=options) as stream:
            stream.write_table(table, max_chunksize=batch)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder
