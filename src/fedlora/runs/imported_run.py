"""The folder of a run that was imported: rounds that everything can use that answers, and that nothing trains on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedlora.errors import UsageError
from fedlora.federated.ranks import rank_of_adapter
from fedlora.files import write_bytes, write_text
from fedlora.llm.adapter_config import config_at_rank
from fedlora.llm.adapter_files import BIN_NAME, CONFIG_NAME, to_bin
from fedlora.paths import OutputName, RunPaths
from fedlora.runs.run_folder import check_free, clear_run, read_run
from fedlora.runs.run_records import RunRecord
from fedlora.runs.writer import RunWriter
from fedlora.types import AdapterState

MODE = "imported"
"""What run.json has as the method of such a run."""
NO_FACTS: Mapping[str, Any] = {"cohort": [], "limited": [], "quarantined": []}


def make_room(paths: RunPaths, *, overwrite: bool) -> None:
    """Clear the folder; UsageError where it holds a run, or an import that may not be replaced."""
    check_free(paths)
    if not paths.run_file.exists():
        return
    recorded = read_run(paths)
    if recorded.imported_from is None or not overwrite:
        what = "a run" if recorded.imported_from is None else "an earlier import"
        hint = "choose another --exp_name" + ("" if recorded.imported_from is None else ", or give --overwrite")
        raise UsageError(f"{paths.root}: {what} of this name exists", hint=hint)
    clear_run(paths)


def write_rounds(
    writer: RunWriter, record: RunRecord, rounds: Iterator[tuple[int, Mapping[OutputName, AdapterState]]]
) -> None:
    """Commit every round, then say in run.json that the run is finished."""
    for number, adapters in rounds:
        writer.begin_round(number)
        for name, state in adapters.items():
            if name.kind == "client":
                folder = writer.paths.partial_folder(number) / str(name)
                write_bytes(folder / BIN_NAME, to_bin(state))
                write_text(folder / CONFIG_NAME, config_at_rank(writer.peft_config, rank_of_adapter(state)))
        whole = adapters.get(OutputName("global"))
        facts = dict(NO_FACTS)
        if whole is None:
            write_text(writer.paths.partial_folder(number) / CONFIG_NAME, writer.peft_config)
        writer.commit_round(number, whole, None, facts)
    writer.write_run(record)
