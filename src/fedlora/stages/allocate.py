"""Split one file of rows into client files and a global test set.

A prompt never stands in both: prompts are de-duplicated over the whole file before anything is split, and
a data set of the same name made from another split is refused rather than mixed with. All content is
prepared before the first file is written, and the manifest comes last.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.command_line import command_line
from fedlora.config.data import AllocateConfig, ModelConfig
from fedlora.config.plan import PlanConfig
from fedlora.config.prompting import CHAT
from fedlora.config.reading import READING_FIELDS
from fedlora.console import say
from fedlora.data.allocation_text import allocation_parts
from fedlora.data.client_files import is_silo_folder
from fedlora.data.records import read_rows
from fedlora.data.row_parts import refuse_splits, sha256_of_rows
from fedlora.errors import DataError, StorageError, UsageError
from fedlora.federated.allocation import Allocation, Cleaned, allocate_rows, clean_rows
from fedlora.files import json_lines, json_text, read_json, write_text
from fedlora.paths import DataPaths
from fedlora.plain_text import counted
from fedlora.results import Result
from fedlora.rows import Row


@dataclass(frozen=True, repr=False)
class AllocatedData(Result):
    """A data set that was split: its manifest, where it lies, and the size of its test set."""

    manifest: Mapping[str, Any]
    paths: DataPaths
    test_per_cat: int | None
    has_turns: bool = False
    """Whether a row has a system turn or several turns, which the default template has no place for."""

    @property
    def next_command(self) -> str:
        """What a run on the data takes, with the embedded model."""
        asked = {
            "data_path": self.paths.folder,
            "num_clients": len(self.manifest["clients"]),
            "base_model": ModelConfig.model_fields["name"].default,
            "client_selection_frac": 1,
            "prompt_template": CHAT if self.has_turns else None,
            "test_file_path": self.paths.test_file(self.test_per_cat),
        }
        return command_line("plan", PlanConfig, asked)

    def parts(self) -> Sequence[str]:
        """Who holds how much of what, what was left out, and the files."""
        return allocation_parts(self.manifest, self.paths, self.test_per_cat)

    def as_dict(self) -> dict[str, Any]:
        """The manifest, and where the data lies."""
        num_clients = len(self.manifest["clients"])
        folder = self.paths.client_file(num_clients, 0).parent
        return {
            "clients_folder": str(folder),
            "test_file": str(self.paths.test_file(self.test_per_cat)),
            "manifest": dict(self.manifest),
        }


def run(config: AllocateConfig) -> AllocatedData:
    """Write the data set. Same configuration and input, same bytes.

    Raises UsageError (input or flags), DataError (a row, a category that is too small), StorageError.
    """
    if is_silo_folder(config.input_file):
        refuse_splits(config.input_file)
        raise UsageError(
            f"{config.input_file}: a folder; allocate divides one file of rows among clients",
            hint=f"with one file per client nothing is divided: `fedlora train --data {config.input_file}`",
        )
    if not config.input_file.exists():
        raise UsageError(
            f"{config.input_file}: no such file",
            hint="make it with `fedlora data dolly` (needs a network) or `fedlora data skills` (does not)",
        )
    source = {"file": config.input_file.name, "sha256": sha256_of_rows(config.input_file)}
    rows, num_skipped = _read_input(config)
    cleaned = clean_rows(rows)
    allocation = allocate_rows(cleaned.rows, config)
    if alone := allocation.num_untested:
        say(f"{counted(alone, 'client')} with a single row, which trains; no test row is drawn from it")
    paths = DataPaths(config.output_root, config.dataset_name)
    num_clients = len(allocation.clients)
    test_per_cat = config.test_per_cat if config.test_share is None else None
    contents = _data_files(allocation, paths, test_per_cat)
    manifest = _manifest(config, source, cleaned, allocation, contents)
    if config.skip_bad:
        manifest["num_skipped"] = num_skipped
    contents[paths.manifest(num_clients)] = json_text(manifest)
    _write(contents, paths, manifest, overwrite=config.overwrite)
    return AllocatedData(manifest, paths, test_per_cat, has_turns=any(row.before for row in cleaned.rows))


def _read_input(config: AllocateConfig) -> tuple[list[Row], int]:
    """The rows, and how many bad ones were left out."""
    skipped: list[str] = []

    def note(message: str) -> None:
        skipped.append(message)
        say(message)

    by_category = config.partition not in ("iid", "column")
    try:
        rows = read_rows(config.input_file, require_category=by_category, rules=config.read_rules, on_skip=note)
    except DataError as error:
        if by_category and "category" in str(error):
            hint = "rows without a category can be divided with --partition iid --num_clients 3"
            raise DataError(str(error), hint=hint) from None
        raise
    return rows, len(skipped)


def _data_files(allocation: Allocation, paths: DataPaths, test_per_cat: int | None) -> dict[Path, str]:
    contents = {paths.test_file(test_per_cat): json_lines(row.as_dict() for row in allocation.test)}
    for client_id, rows in enumerate(allocation.clients):
        # keys stay in the contract's order, so not json_text, which sorts them
        text = json.dumps([row.as_dict() for row in rows], indent=2, ensure_ascii=False) + "\n"
        contents[paths.client_file(len(allocation.clients), client_id)] = text
    return contents


def _manifest(
    config: AllocateConfig,
    source: Mapping[str, Any],
    cleaned: Cleaned,
    allocation: Allocation,
    contents: Mapping[Path, str],
) -> dict[str, Any]:
    """No time, no path and no machine in it: the same data gives the same manifest anywhere."""
    fields = {"partition", "seed"}
    fields |= {"train_per_cat", "test_per_cat"} if config.test_share is None else {"test_share"}
    of_partition = {"dirichlet": {"alpha"}, "shards": {"shards_per_client"}, "column": {"by"}}
    fields |= of_partition.get(config.partition, set())
    # rules at their default leave no trace, so a data set is the same as before there were any
    fields |= config.read_rules.record().keys()
    tables = [_describe(path, text) for path, text in contents.items()]
    for table, rows in zip(tables, (allocation.test, *allocation.clients), strict=True):
        table |= {"num_examples": len(rows), "categories": dict(Counter(row.category for row in rows))}
    return {
        "format": 1,
        "config": config.model_dump(mode="json", include=fields) | {"num_clients": len(allocation.clients)},
        "seed": config.seed,
        "input": dict(source) | {"num_rows": len(cleaned.rows) + cleaned.num_duplicates + cleaned.num_empty},
        "num_empty": cleaned.num_empty,
        "duplicates": {"dropped": cleaned.num_duplicates, "under_another_category": cleaned.num_other_category},
        "label_skew": round(allocation.label_skew, 6),
        "test": tables[0],
        "clients": [
            {"client_id": client_id, **({"value": allocation.values[client_id]} if allocation.values else {}), **table}
            for client_id, table in enumerate(tables[1:])
        ],
    }


def _describe(path: Path, text: str) -> dict[str, Any]:
    return {"file": path.name, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _write(contents: Mapping[Path, str], paths: DataPaths, manifest: Mapping[str, Any], *, overwrite: bool) -> None:
    _refuse_other_split(paths, manifest)
    existing = [path for path in contents if path.exists()]
    changed = [path for path in existing if path.read_bytes() != contents[path].encode()]
    # a test set of another size would hold rows that are training rows now
    tests = [*paths.folder.glob("dolly_test_*.jsonl"), *paths.folder.glob("test_rows.jsonl")]
    stale = [path for path in sorted(tests) if path not in contents]
    if (changed or stale) and not overwrite:
        raise UsageError(
            f"{paths.folder} already holds another data set; {(changed + stale)[0]} does not fit this one",
            hint="choose another dataset_name, or give --overwrite to replace it",
        )
    if len(existing) == len(contents) and not changed + stale:
        say(f"{paths.folder} already holds exactly this data set; nothing written")
        return
    for path in stale:
        _remove(path)
    for path, text in contents.items():
        write_text(path, text)


def _refuse_other_split(paths: DataPaths, manifest: Mapping[str, Any]) -> None:
    """Allocations for other numbers of clients may stand beside this one when their test prompts are the same."""
    own = paths.manifest(len(manifest["clients"]))
    for path in sorted(paths.folder.glob("*/manifest.json")):
        if path != own and _split(read_json(path)) != _split(manifest):
            raise UsageError(
                f"{path.parent} was allocated with another input, seed, test_per_cat or other reading rules: "
                "training rows there could be test rows here",
                hint=f"choose another dataset_name, or delete {path.parent}",
            )


def _split(manifest: Any) -> tuple[Any, ...] | None:
    """What decides which prompts are test prompts; None for a manifest that is not ours."""
    try:
        config = manifest["config"]
        reading = [config.get(name) for name in sorted(READING_FIELDS)]
        return (
            manifest["input"]["sha256"],
            manifest["seed"],
            config.get("test_per_cat"),
            config.get("test_share"),
            config.get("by"),
            reading,
        )
    except (KeyError, TypeError):
        return None


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}", hint="fix its permissions, then run again") from error
