"""Make or fetch the rows that allocation splits: the `skills` generator and Dolly from the hub.

Both write a JSON array in Dolly's own schema (instruction, context, response, category).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedlora.config.data import DollyConfig, SkillsConfig
from fedlora.console import say
from fedlora.data.records import read_rows
from fedlora.data.skills import SKILLS, make_skill_rows
from fedlora.errors import UsageError
from fedlora.files import write_text

_REPOSITORY, _FILE = "databricks/databricks-dolly-15k", "databricks-dolly-15k.jsonl"


def run_skills(config: SkillsConfig) -> Path:
    """Write the `skills` rows; the same seed and count give the same bytes. Raises UsageError."""
    text = _array_text(make_skill_rows(config.rows_per_category, seed=config.seed))
    if config.output_file.is_file() and config.output_file.read_bytes() == text.encode():
        say(f"{config.output_file} already holds exactly these rows; nothing written")
        return config.output_file
    _refuse_existing(config.output_file, overwrite=config.overwrite)
    write_text(config.output_file, text)
    num_rows = config.rows_per_category * len(SKILLS)
    print(f"{config.output_file}: {num_rows} rows, {config.rows_per_category} of each of {len(SKILLS)} skills")
    return config.output_file


def run_dolly(config: DollyConfig) -> Path:
    """Fetch databricks-dolly-15k (CC BY-SA 3.0) and write it as an array. Raises UsageError, DataError."""
    _refuse_existing(config.output_file, overwrite=config.overwrite)
    rows = read_rows(_download(config.output_file), require_category=True)
    records = (
        {"instruction": row.instruction, "context": row.input, "response": row.output, "category": row.category}
        for row in rows
    )
    write_text(config.output_file, _array_text(records))
    print(f"{config.output_file}: {len(rows)} rows of {_REPOSITORY} (CC BY-SA 3.0)")
    return config.output_file


def _download(output_file: Path) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(_REPOSITORY, _FILE, repo_type="dataset"))
    except Exception as error:  # a cut download raises the transport library's own errors, and that library changes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"cannot fetch {_REPOSITORY} from the hub: {reason}",
            hint=f"without a network use `fedlora data skills`, or put {_FILE} at {output_file} by hand",
        ) from error


def _refuse_existing(path: Path, *, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise UsageError(f"{path} already exists", hint="give --overwrite to replace it, or another --output_file")


def _array_text(rows: Iterable[Mapping[str, str]]) -> str:
    return json.dumps(list(rows), indent=2, ensure_ascii=False) + "\n"
