"""Every benchmark still runs: figures in the docs come from these scripts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.errors import UsageError
from fedlora.llm import embedded_model

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_parts_of_the_bench_run_at_their_least_size(tmp_path):
    try:
        embedded_model.folder()
    except UsageError as error:
        pytest.skip(f"{error}: fedlora model {embedded_model.NAME}")
    before = {path: path.stat().st_mtime_ns for path in (BENCHMARKS.parent / "docs").rglob("*")}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "bench.py"), "--quick"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "7 parts" in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (BENCHMARKS.parent / "docs").rglob("*")}
