"""Making and fetching rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from fedlora.config.data import DollyConfig, SkillsConfig
from fedlora.data.records import read_rows
from fedlora.errors import DataError, UsageError
from fedlora.stages.data_dolly import run as run_dolly
from fedlora.stages.data_skills import run as run_skills


def test_skills_are_written_in_dollys_schema(tmp_path: Path) -> None:
    path = run_skills(SkillsConfig.of(output_file=tmp_path / "data" / "skills.json", rows_per_category=5)).file
    rows = json.loads(path.read_text())
    assert [list(row) for row in rows] == [["instruction", "context", "response", "category"]] * 40
    assert len(read_rows(path, require_category=True)) == 40


def test_existing_skills_are_kept_unless_overwrite_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "skills.json"
    run_skills(SkillsConfig.of(output_file=path, rows_per_category=5))
    before = path.read_bytes()
    run_skills(SkillsConfig.of(output_file=path, rows_per_category=5))
    assert "already holds exactly these rows" in capsys.readouterr().err
    with pytest.raises(UsageError, match="already exists"):
        run_skills(SkillsConfig.of(output_file=path, rows_per_category=5, seed=1))
    assert path.read_bytes() == before
    run_skills(SkillsConfig.of(output_file=path, rows_per_category=5, seed=1, overwrite=True))
    assert path.read_bytes() != before


def test_dolly_is_checked_and_written_as_an_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = tmp_path / "fetched.jsonl"
    fetched.write_text('{"instruction": "i", "context": "", "response": "2001-01-01", "category": "open_qa"}\n' * 2)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(fetched))
    path = run_dolly(DollyConfig.of(output_file=tmp_path / "dolly.json")).file
    row = {"instruction": "i", "context": "", "response": "2001-01-01", "category": "open_qa"}
    assert json.loads(path.read_text()) == [row, row]
    with pytest.raises(UsageError, match="already exists"):
        run_dolly(DollyConfig.of(output_file=path))
    fetched.write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        run_dolly(DollyConfig.of(output_file=path, overwrite=True))
    assert json.loads(path.read_text()) == [row, row]


def test_without_a_network_dolly_names_the_ways_out(tmp_path: Path) -> None:
    code = (
        "from fedlora.config.data import DollyConfig; from fedlora.stages.data_dolly import run as run_dolly\n"
        "try: run_dolly(DollyConfig.of(output_file='dolly.json'))\n"
        "except Exception as error: print(type(error).__name__, error, error.hint)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("UsageError cannot fetch databricks/databricks-dolly-15k")
    assert "fedlora data skills" in result.stdout
    assert "databricks-dolly-15k.jsonl at dolly.json by hand" in result.stdout
    assert not (tmp_path / "dolly.json").exists()
