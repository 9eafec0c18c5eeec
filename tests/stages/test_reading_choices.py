"""The reading rules through the stages: what they change is recorded, and a row left out is said once."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fedlora.cli import main
from fedlora.config.data import AllocateConfig
from fedlora.config.evaluate import EvaluateRougeConfig
from fedlora.config.generate import GenerateConfig
from fedlora.config.train import TrainConfig
from fedlora.data.records import read_rows
from fedlora.errors import DataError, UsageError
from fedlora.stages import allocate, evaluate_rouge, generate, train

BROKEN = '{"instruction": 7}\n'


def rows(number: int, category: str = "c") -> list[dict[str, str]]:
    return [
        {"instruction": f"{category} {row}", "input": "", "output": f"answer {row}", "category": category}
        for row in range(number)
    ]


def lines(*objects: dict[str, Any]) -> str:
    return "".join(json.dumps(value) + "\n" for value in objects)


def allocate_from(file: Path, folder: Path, **values: Any) -> dict[str, Any]:
    fields = {"input_file": file, "output_root": folder, "train_per_cat": 3, "test_per_cat": 2}
    return dict(allocate.run(AllocateConfig.of(**{**fields, **values})).manifest)


def test_allocation_counts_and_records_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(lines(*rows(5)) + BROKEN + lines(*rows(5, "d")))
    with pytest.raises(DataError, match=r"in\.jsonl:6:1: the field 'instruction' must be text, got a number"):
        allocate_from(file, tmp_path / "data")
    capsys.readouterr()
    fields = {"output_root": tmp_path / "data", "train_per_cat": 3, "test_per_cat": 2, "skip_bad": 2}
    made = allocate.run(AllocateConfig.of(input_file=file, **fields))
    manifest = made.manifest
    assert manifest["num_skipped"] == 1
    assert manifest["config"]["skip_bad"] == 2
    assert "bad rows left out: 1" in made.text()
    assert capsys.readouterr().err.count("in.jsonl:6:1") == 1
    assert "numbers_as_text" not in manifest["config"]


def test_another_rule_never_mixes_with_a_data_set_that_is_there(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(lines(*rows(6)) + '{"instruction": 7, "output": "o", "category": "c"}\n')
    allocate_from(file, tmp_path / "data", skip_bad=1)
    with pytest.raises(UsageError, match="other reading rules"):
        allocate_from(file, tmp_path / "data", numbers_as_text=True, num_clients=2, partition="iid")


def test_every_format_gives_the_same_allocation(tmp_path: Path) -> None:
    whole = rows(5) + rows(5, "d")
    (tmp_path / "in.jsonl").write_text(lines(*whole))
    with (tmp_path / "in.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(whole[0]))
        writer.writeheader()
        writer.writerows(whole)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(whole), tmp_path / "in.parquet")
    splits = []
    for name in ("in.jsonl", "in.csv", "in.parquet"):
        folder = tmp_path / name.replace(".", "_")
        allocate_from(tmp_path / name, folder)
        files = sorted(folder.rglob("local_training_*.json")) + sorted(folder.rglob("*.jsonl"))
        splits.append([path.read_bytes() for path in files])
    assert len(splits[0]) == 3
    assert splits[0] == splits[1] == splits[2]


@pytest.fixture
def silos(tmp_path: Path) -> Path:
    """Two clients, one of them with a bad row and a number."""
    folder = tmp_path / "silos"
    folder.mkdir()
    (folder / "a.csv").write_text("instruction,output\nsay 1,one\nsay 2,two\n")
    (folder / "b.jsonl").write_text(lines(*rows(2)) + BROKEN + '{"instruction": "i", "output": 1.50}\n')
    return folder


def train_on(silos: Path, model: Path, **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "exp_name": "run",
        "base_model": str(model),
        "base_dtype": "float32",
        "data_path": silos,
        "model_dir": silos.parent / "models",
        "num_communication_rounds": 1,
        "local_num_epochs": 1,
        "client_selection_frac": 1.0,
        "prompt_template": "chat",
        "device": "cpu",
    }
    root = train.run(TrainConfig.of(**{**fields, **changes})).root
    return json.loads((root / "run.json").read_text())


@pytest.mark.parametrize("token_cache", [True, False])
def test_training_says_once_what_it_leaves_out_and_records_the_rules(
    silos: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], token_cache: bool
) -> None:
    with pytest.raises(DataError, match=r"b\.jsonl:3:1"):
        train_on(silos, tiny_model, token_cache=token_cache)
    capsys.readouterr()
    record = train_on(silos, tiny_model, skip_bad=2, token_cache=token_cache)
    shown = "".join(capsys.readouterr())
    assert shown.count("b.jsonl:3:1") == shown.count("b.jsonl:4:1") == 1
    assert [client["num_examples"] for client in record["clients"]] == [2, 2]
    assert [client["num_skipped"] for client in record["clients"]] == [0, 2]
    assert record["config"]["skip_bad"] == 2
    with pytest.raises(UsageError, match=r"numbers_as_text: False -> True"):
        train_on(silos, tiny_model, skip_bad=2, numbers_as_text=True, token_cache=token_cache)
    other = train_on(silos, tiny_model, skip_bad=1, numbers_as_text=True, exp_name="other", token_cache=token_cache)
    assert [client["num_examples"] for client in other["clients"]] == [2, 3]


def test_tests_and_targets_are_read_by_the_same_rules(tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text(lines(*rows(2)) + BROKEN + '{"instruction": "i", "output": 5, "category": "c"}\n')
    chosen = {"skip_bad": 1, "numbers_as_text": True}
    fields = {"exp_name": "run", "prediction_dir": tmp_path / "predictions", "is_base_model": True}
    asked = {"base_model": str(tiny_model), "base_dtype": "float32", "device": "cpu", "max_new_tokens": 2}
    asked |= {"test_file_path": file, "model_dir": tmp_path / "models"}
    with pytest.raises(DataError, match=r"test\.jsonl:3:1"):
        generate.run(GenerateConfig.of(**fields, **asked))
    (written,) = generate.run(GenerateConfig.of(**fields, **asked, **chosen)).files
    assert len(read_rows(written, output_key="answer")) == 3
    sidecar = json.loads(written.with_name("base_output.meta.json").read_text())
    assert sidecar["reading"] == chosen
    scored = {"target_file": file, "evaluation_dir": tmp_path / "rouge"}
    with pytest.raises(DataError, match=r"test\.jsonl:3:1"):
        evaluate_rouge.run(EvaluateRougeConfig.of(**fields, **scored))
    result = evaluate_rouge.run(EvaluateRougeConfig.of(**fields, **scored, **chosen)).scores[0].record
    assert sum(result["fedlora"]["num_samples"].values()) == 3


@pytest.mark.parametrize("command", ["allocate", "train", "generate", "evaluate_rouge", "evaluate_llm"])
def test_the_help_of_all_flags_has_those_of_reading(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help", "all"]) in (0, None)
    shown = capsys.readouterr().out
    places = [shown.index(f"--{name} ") for name in ("skip_bad", "max_record_bytes", "numbers_as_text", "surrogates")]
    assert places == sorted(places)
