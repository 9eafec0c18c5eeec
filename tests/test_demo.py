"""The demo, with its stages recorded instead of run: which modes, and that every one can be asked for."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedlora import demo
from fedlora.config.demo import DemoConfig
from fedlora.plain_text import counted

MODES = ["homo", "seq", "none", "pooled"]


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_demo_runs_the_four_modes_that_the_readme_shows(tmp_path, monkeypatch, capsys, rounds):
    asked: list[tuple[str, object]] = []

    def record(stage: str, config: object) -> SimpleNamespace:
        asked.append((stage, config))
        return SimpleNamespace(
            parts=lambda: [f"text of {stage}"], folder=Path("/models/smollm2"), page=Path("/reports/report.html")
        )

    stages = {
        "data_skills": "run",
        "model": "run",
        **dict.fromkeys(("allocate", "train", "generate", "score", "report"), "run"),
    }
    for stage, name in stages.items():
        monkeypatch.setattr(f"fedlora.stages.{stage}.{name}", partial(record, stage))
    shown = demo.run(DemoConfig.of(output_dir=tmp_path, rounds=rounds)).text()
    assert shown.startswith("text of report\n")
    assert "AutoModelForCausalLM.from_pretrained('/models/smollm2')" in shown
    assert f"/models/homo/{rounds}')" in shown
    assert shown.endswith("\n/reports/report.html")
    said = capsys.readouterr()
    assert said.out == "", "the command line prints the result"
    assert said.err.splitlines() == [
        "1. model and data: eight clients, one skill each",
        f"2. training: homo, seq, none, pooled, {counted(rounds, 'round')} each",
        "3. answers to the test rows",
        "4. scores and report",
    ]
    trained = [config for stage, config in asked if stage == "train"]
    assert [config.federation_mode for config in trained] == MODES
    assert {config.num_communication_rounds for config in trained} == {rounds}
    everyone = tuple(f"{mode}/{rounds}/{'all' if mode == 'none' else 'global'}" for mode in MODES)
    assert [config.words for stage, config in asked if stage in ("generate", "score")] == [everyone] * 2
    (reported,) = [config for stage, config in asked if stage == "report"]
    assert list(reported.exp_names) == MODES
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert "(`homo`, `seq`, `none`, `pooled`)" in readme
