"""Fetch databricks-dolly-15k from the hub, for allocation to split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.command_line import command_line
from fedlora.config.data import AllocateConfig, DollyConfig
from fedlora.data.array_file import refuse_existing, write_array
from fedlora.data.records import read_rows
from fedlora.errors import UsageError
from fedlora.plain_text import counted
from fedlora.results import Result

_REPOSITORY, _FILE = "databricks/databricks-dolly-15k", "databricks-dolly-15k.jsonl"


@dataclass(frozen=True, repr=False)
class DollyRows(Result):
    """The file of Dolly's rows, and how many it holds."""

    file: Path
    num_rows: int

    @property
    def next_command(self) -> str:
        """How to split the rows."""
        return command_line("allocate", AllocateConfig, {"input_file": self.file})

    def text(self) -> str:
        """One line."""
        return f"{self.file}: {counted(self.num_rows, 'row')} of {_REPOSITORY} (CC BY-SA 3.0)"

    def as_dict(self) -> dict[str, Any]:
        return {"file": str(self.file), "num_rows": self.num_rows}


def run(config: DollyConfig) -> DollyRows:
    """Fetch databricks-dolly-15k (CC BY-SA 3.0) and write it as an array. Raises UsageError, DataError."""
    refuse_existing(config.output_file, overwrite=config.overwrite)
    rows = read_rows(_download(config.output_file), require_category=True)
    records = (
        {"instruction": row.instruction, "context": row.input, "response": row.output, "category": row.category}
        for row in rows
    )
    write_array(config.output_file, records)
    return DollyRows(config.output_file, len(rows))


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
