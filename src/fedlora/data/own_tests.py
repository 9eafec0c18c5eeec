"""A client's own test rows: those of `<client>.test.<format>` beside its file, else the share that a run holds out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedlora.config.train import TrainConfig
from fedlora.data.client_facts import ClientFile
from fedlora.data.client_files import find_test_files
from fedlora.data.held_out import Share, draw_rows, drawn_test_rows, prompt_key
from fedlora.data.records import read_rows
from fedlora.errors import UsageError
from fedlora.rows import Row
from fedlora.types import ClientId


def read_own_tests(file: Path, config: TrainConfig) -> list[Row]:
    """The test rows of the client whose rows lie in `file`, without those that have no response; no row without any.

    Of more than `private_metrics_rows` so many are drawn, by seed and prompt. Raises what `read_rows` raises.
    """
    rows = [row for row in _read(file, config) if row.output.strip()]
    if len(rows) > config.private_metrics_rows:
        prompts = [prompt_key(row) for row in rows]
        drawn = draw_rows(prompts, config.private_metrics_rows, config.seed, "private_metrics")
        rows = [rows[place] for place in sorted(drawn)]
    return rows


def check_own_tests(clients: Mapping[ClientId, ClientFile], config: TrainConfig) -> None:
    """Read the test rows of all clients once. Raises UsageError where none has any."""
    if not config.private_metrics:
        return
    # all of them, so that a bad row is found before a model is loaded
    counts = [len(read_own_tests(one.path, config)) for one in clients.values()]
    if not any(counts):
        raise UsageError(
            "private_metrics: no client has test rows",
            hint="write a file <client>.test.<format> beside each client's file, or hold a share out with --test_share",
        )


def _read(file: Path, config: TrainConfig) -> list[Row]:
    tests = find_test_files([file]).get(0)
    if tests is not None:
        return read_rows(tests, rules=config.read_rules)
    if not config.test_share:
        return []
    rows = read_rows(file, may_be_empty=True, rules=config.read_rules)
    return drawn_test_rows(rows, Share(config.test_share, config.seed))
