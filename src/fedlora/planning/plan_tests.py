"""The test rows that a plan looks at: one file for all, the clients' own files, or the share that the run holds out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedlora.config.plan import PlanConfig
from fedlora.config.train import TrainConfig
from fedlora.data.client_files import check_no_client, find_silos, is_silo_folder
from fedlora.data.doctor import Silo
from fedlora.data.held_out import Share, drawn_test_rows, no_test_rows, own_test_files
from fedlora.data.records import read_rows
from fedlora.errors import UsageError
from fedlora.rows import Row


def find_tests(
    config: PlanConfig, train: TrainConfig, files: Sequence[Path], silos: Sequence[Silo]
) -> tuple[list[Silo], list[Row]]:
    """The files of test rows, and all test rows there are; rows that a share holds out stand in the clients' files.

    Those of `test_file_path` where it is given, else those of the clients' folder. UsageError where it is given and
    holds none.
    """
    given, rules = config.test_file_path, train.read_rules
    if given is not None and not is_silo_folder(given):
        check_no_client(given, files, "test_file_path")
        tests = [Silo(None, given, read_rows(given, rules=rules))]
    else:
        own = own_test_files(files if given is None else find_silos(given)[0])
        called = {file: f"the test rows of {name}" for name, file in own.items()}
        tests = [Silo(None, file, read_rows(file, rules=rules), name) for file, name in called.items()]
    rows = [row for test in tests for row in test.rows]
    if not rows and train.test_share:
        share = Share(train.test_share, train.seed)
        rows = [row for silo in silos for row in drawn_test_rows(silo.rows, share)]
    if not rows and given is not None:
        raise no_test_rows(given)
    if not rows and config.judge_fields:
        raise UsageError(
            f"{', '.join(config.judge_fields)}: the judge is planned for test rows, and there are none",
            hint="give test_file_path, or test_share",
        )
    return tests, rows
