"""Personal models in reports and comparisons: rows of their own, beside the global adapter's where there is one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import make_client_files

from fedlora.cli import main
from fedlora.comparing.client_tables import client_table, models_of
from fedlora.config.evaluate import ReportConfig
from fedlora.config.train import TrainConfig
from fedlora.reporting.experiments import STAYS_ON_NODE
from fedlora.reporting.findings import Findings
from fedlora.stages import train
from fedlora.stages.report import run as report

HALF = {"client_selection_strategy": "round_robin", "client_selection_frac": 0.5}
MEAN = "ditto (personal) mean of 2 (costs: total)"


@pytest.fixture
def findings_of(
    tiny_model: Path, tmp_path: Path, test_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Findings]:
    """Train ditto on two clients where it is not there yet, and report it."""
    monkeypatch.setattr("fedlora.stages.report.draw_rounds", lambda findings: b"")
    monkeypatch.setattr("fedlora.stages.report.draw_categories", lambda findings: b"")
    monkeypatch.chdir(tmp_path)
    data = make_client_files(tmp_path / "data", [3, 2])

    def run(**changes: Any) -> Findings:
        options = {
            **{"exp_name": "ditto", "federation_mode": "ditto", "model_dir": tmp_path / "models", "device": "cpu"},
            **{"base_model": str(tiny_model), "base_dtype": "float32", "data_path": data, "num_clients": 2},
            **{"num_communication_rounds": 2, "local_batch_size": 2, "local_num_epochs": 1, "prompt_template": "chat"},
            **{"val_data_path": str(test_file), "client_selection_frac": 1.0, **changes},
        }
        if not (tmp_path / "models/ditto").exists():
            train.run(TrainConfig.of(**options))
        asked = ReportConfig.of(
            exp_names=("ditto",), communication_rounds=options["num_communication_rounds"],
            **{name: tmp_path / name for name in ("prediction_dir", "rouge_dir", "llm_dir", "report_dir")},
            model_dir=tmp_path / "models",
        )  # fmt: skip
        return report(asked).findings

    return run


def metrics(tmp_path: Path) -> list[dict[str, Any]]:
    lines = (tmp_path / "models/ditto/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_personal_models_have_rows_after_the_global_one_and_the_named_commands_fill_them(
    findings_of: Callable[..., Findings], tmp_path: Path, test_file: Path
) -> None:
    before = findings_of()
    labels = [row.label for row in before.rows]
    clients = ["ditto (personal) client 0 (c0)", "ditto (personal) client 1 (c1)"]
    assert labels == ["base", "ditto (global)", *clients, MEAN]
    losses = [row["val_loss_personal"] for row in metrics(tmp_path) if row["kind"] == "client"][-2:]
    assert [row.held_out_loss for row in before.rows[2:4]] == losses
    assert before.rows[4].held_out_loss == pytest.approx(sum(losses) / 2)
    assert before.rows[1].held_out_loss not in losses
    assert before.rows[4].costs == before.rows[1].costs
    assert [number for number, _ in before.curves["ditto"]["held_out_personal"]] == [1, 2]

    (gap,) = before.gaps
    assert gap.text == f"{', '.join(labels[:4])}: no predictions"
    generate, score = gap.commands
    assert main([*shlex.split(generate)[1:], "--test", str(test_file), "--max_new_tokens", "2"]) == 0
    assert main([*shlex.split(score)[1:], "--test", str(test_file)]) == 0
    after = findings_of()
    assert after.gaps == []
    assert all(row.all is not None for row in after.rows)
    assert after.rows[2].own_categories == ("c0",)


def test_a_client_that_was_never_trained_has_a_row_and_no_command_promises_it_an_adapter(
    findings_of: Callable[..., Findings],
) -> None:
    findings = findings_of(num_communication_rounds=1, local_val_set_size=1, **HALF)
    assert not [note for note in findings.notes if "held-back rows alone" in note]
    gaps = {gap.text: gap.commands for gap in findings.gaps}
    never = "ditto (personal) client 1 (c1): no adapter: not trained in any round up to this one"
    assert gaps[never] == ()
    assert len(gaps) == 2
    assert "--of base,global,0 " in next(commands for text, commands in gaps.items() if text != never)[0]


def test_an_adapter_that_stays_on_its_node_is_named_as_such(
    findings_of: Callable[..., Findings], tmp_path: Path
) -> None:
    findings_of()
    update = tmp_path / "models/ditto/2/client_1/update.json"
    update.write_text(json.dumps({**json.loads(update.read_text()), "adapter_stays": True}))
    texts = {gap.text: gap.commands for gap in findings_of().gaps}
    assert texts[f"ditto (personal) client 1 (c1): {STAYS_ON_NODE}"] == ()


def cell(method: str, whole: dict[str, float] | None, clients: dict[str, dict[str, float]]) -> dict[str, Any]:
    shares = {"0": {"a": 1.0}, "1": {"b": 1.0}}
    run = {"state": "trained", "seed": 1, "shares": shares, "test": {"global": whole, "clients": clients}}
    base = {"seed": 1, "test": {"global": {"a": 5.0, "b": 5.0}, "clients": {}}}
    return {"setting": "", "method": method, "mode": method, "runs": [run], "base": [base]}


def test_who_gains_has_a_column_for_the_global_adapter_and_one_for_personal_models() -> None:
    personal = {"0": {"a": 1.0, "b": 4.0}, "1": {"a": 4.0, "b": 1.5}}
    ditto = cell("ditto", {"a": 3.0, "b": 3.0}, personal)
    none = cell("none", None, {"0": {"a": 2.0, "b": 4.0}, "1": {"a": 4.0, "b": 2.0}})
    assert list(models_of(ditto)) == ["ditto (global)", "ditto (personal)"]
    table = client_table("", [ditto, none])
    assert table is not None
    assert list(table["methods"]) == ["base", "ditto (global)", "ditto (personal)", "none"]
    assert table["methods"]["ditto (global)"]["gain"] == {"0": -1.0, "1": -1.0}
    assert table["methods"]["ditto (personal)"]["gain"] == {"0": 1.0, "1": 0.5}
