"""Fetch one split of a data set from the hub, at a commit that is recorded beside the rows.

A branch or tag is resolved first and the rows are those of its commit, so that the same file can be made again. The
extra `datasets` reads the formats of the hub; columns that JSON cannot hold are left out and named.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fedlora.config.command_line import command_line
from fedlora.config.data import AllocateConfig, HubConfig
from fedlora.console import printable, say
from fedlora.data.array_file import refuse_existing
from fedlora.errors import DataError, UsageError
from fedlora.files import json_lines, json_text, write_text
from fedlora.plain_text import counted
from fedlora.results import Result

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NOT_JSON = object()


@dataclass(frozen=True, repr=False)
class HubRows(Result):
    """The file of rows that were fetched, and what its record beside it says."""

    file: Path
    record: Mapping[str, Any]

    @property
    def next_command(self) -> str:
        """How to split the rows, whether or not they have categories."""
        asked = {"input_file": self.file, "test_share": 0.2, "partition": "iid", "num_clients": 3}
        return command_line("allocate", AllocateConfig, asked)

    def text(self) -> str:
        """One line."""
        rows = counted(self.record["num_rows"], "row")
        where = f"{self.record['repository']} ({self.record['split']}) at commit {self.record['commit'][:12]}"
        return printable(f"{self.file}: {rows} of {where}")

    def as_dict(self) -> dict[str, Any]:
        return {"file": str(self.file), **self.record}


def check_datasets() -> None:
    """UsageError unless the library `datasets` is installed."""
    try:
        metadata.version("datasets")
    except metadata.PackageNotFoundError:
        raise UsageError(
            "a data set of the hub is read with the library datasets, which is not installed",
            hint="pip install 'fedlora[datasets]'",
        ) from None


def source_file(output_file: Path) -> Path:
    """Where it is recorded what a file of rows was made from; its name is that of no file of rows."""
    return output_file.with_name(f"{output_file.name}.source")


def run(config: HubConfig) -> HubRows:
    """Write the rows as JSON lines. Raises UsageError (no such data set, no network), DataError (no rows)."""
    refuse_existing(config.output_file, overwrite=config.overwrite)
    commit, data = _fetch(config)
    rows, left_out = _as_json(data, _label_names(data))
    if not rows:
        raise DataError(f"{config.repository}: the split {config.split} holds no rows", hint="choose another --split")
    if left_out:
        say(f"columns that JSON cannot hold, left out: {', '.join(map(printable, left_out))}")
    content = json_lines(rows)
    record = {
        "repository": config.repository,
        "revision": config.revision,
        "commit": commit,
        "split": config.split,
        **({"subset": config.subset} if config.subset else {}),
        **({"left_out": left_out} if left_out else {}),
        "num_rows": len(rows),
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
    }
    # the record first: rows are never without it
    write_text(source_file(config.output_file), json_text(record))
    write_text(config.output_file, content)
    return HubRows(config.output_file, record)


def _fetch(config: HubConfig) -> tuple[str, Any]:
    """The commit, and the rows of its split."""
    import datasets  # pyright: ignore[reportMissingImports]  (an extra)
    from huggingface_hub import HfApi

    if Path(config.repository).exists():
        # the library would read it in the place of the hub's, and the commit would be another data set's
        raise UsageError(f"{config.repository} is a file or folder here", hint="call fedlora in another folder")
    commit = config.revision
    try:
        if not _COMMIT.fullmatch(commit):
            commit = str(HfApi().dataset_info(config.repository, revision=config.revision).sha)
        data = datasets.load_dataset(config.repository, config.subset or None, split=config.split, revision=commit)
    except Exception as error:  # the errors of a cut download are those of its transport, and that changes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"cannot fetch {config.repository} at {config.revision} from the hub: {reason}",
            hint="check the name, --revision, --split and --subset; without a network, save the data set "
            "where there is one with save_to_disk, and copy that folder",
        ) from error
    return commit, data


def _label_names(data: Any) -> dict[str, Any]:
    """Columns of class numbers, and what gives the name of one."""
    features = getattr(data, "features", None) or {}
    return {name: feature.int2str for name, feature in features.items() if hasattr(feature, "int2str")}


def _as_json(rows: Iterable[Mapping[str, Any]], labels: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows without the columns of which JSON cannot hold a value, and the names of these."""
    left_out: dict[str, None] = {}
    found: list[dict[str, Any]] = []
    for row in rows:
        found.append({})
        for name, value in row.items():
            if name in labels and type(value) is int:
                value = labels[name](value) if value >= 0 else None
            if name not in left_out and (plain := _plain(value)) is not _NOT_JSON:
                found[-1][name] = plain
            else:
                left_out[name] = None
    return [{name: value for name, value in row.items() if name not in left_out} for row in found], list(left_out)


def _plain(value: Any) -> Any:
    """A value as JSON has it; _NOT_JSON for bytes, dates, images, and numbers that are none."""
    if isinstance(value, Mapping):
        items = {str(key): _plain(each) for key, each in value.items()}
        return _NOT_JSON if any(one is _NOT_JSON for one in items.values()) else items
    if isinstance(value, list | tuple):
        each = [_plain(one) for one in value]
        return _NOT_JSON if any(one is _NOT_JSON for one in each) else each
    if isinstance(value, float) and not math.isfinite(value):
        return _NOT_JSON
    return value if isinstance(value, str | int | float | None) else _NOT_JSON
