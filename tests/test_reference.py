"""The reference of files and of metrics.jsonl names everything that runs leave."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedlora import cli
from fedlora.config.train import TrainConfig
from fedlora.stages import train

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
PRIVATE = {"dp_noise_multiplier": 0.1, "dp_clip": 1.0}


@pytest.fixture
def leave(tiny_model, make_clients, tmp_path, monkeypatch):
    """What a run of one round leaves: the fields of its metrics, and the names of its files."""
    monkeypatch.setenv("FEDLORA_SECRETS", str(tmp_path / "secrets"))
    data = make_clients([3, 4])

    def run(method: str, **options: Any) -> tuple[set[str], set[str]]:
        config = TrainConfig.of(
            exp_name=method,
            federation_mode=method,
            base_model=str(tiny_model),
            data_path=data,
            model_dir=tmp_path / "models",
            num_clients=2,
            client_selection_frac=1.0,
            num_communication_rounds=1,
            local_num_epochs=1,
            local_batch_size=2,
            **options,
        )
        root = train.run(config).root
        rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
        files = {path.name for path in root.rglob("*") if path.is_file() and path.name != ".lock"}
        return {name for row in rows for name in row}, files

    return run


def check_named(left: tuple[set[str], set[str]]) -> None:
    fields, files = left
    metrics = set(re.findall(r"`(\w+)`", (REFERENCE / "metrics.md").read_text(encoding="utf-8")))
    tree = set((REFERENCE / "files.md").read_text(encoding="utf-8").replace("/", " ").split())
    assert fields - metrics == set()
    assert files - tree == set()


def test_the_reference_names_what_a_personal_method_leaves(leave):
    check_named(leave("ditto", local_val_set_size=1))


@pytest.mark.thorough
def test_the_reference_names_what_other_kinds_of_methods_leave(leave):
    check_named(leave("scaffold"))
    check_named(leave("fedex", residual_rank=1))
    check_named(leave("feddpa"))
    check_named(leave("hetlora"))
    check_named(leave("flexlora"))
    check_named(leave("none", local_val_set_size=1, optimizer_state="keep"))
    check_named(leave("pooled"))
    check_named(leave("homo", **PRIVATE))


def documented(command: str) -> set[str]:
    """The fields that the page of JSON output has for a command."""
    page = (REFERENCE / "json.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## `fedlora {command}`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return {name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(.+?)`", row)}


def test_the_schema_of_json_output_names_what_commands_print(tiny_model, make_clients, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = make_clients([3, 4])
    rows = [{"instruction": f"say {number}", "output": "red", "category": f"c{number}"} for number in range(2)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"--data": str(data), "--model": str(tiny_model), "--num_clients": "2", "--client_fraction": "1"}
    run = [word for pair in flags.items() for word in pair] + ["--rounds", "1", "--epochs", "1", "--name", "run"]
    commands = {
        "plan": run,
        "train": run,
        "generate": ["run", "--test", "test.jsonl", "--max_new_tokens", "2"],
        "score": ["run", "--test", "test.jsonl"],
        "loss": ["run", "--test", "test.jsonl"],
        "report": ["run", "--round", "1"],
        "watch": ["run"],
        "runs": [],
        "verify": ["run"],
        "reaggregate": ["run", "--leave_out", "1"],
        "methods": [],
        "methods check": ["homo"],
        "data skills": ["--rows_per_category", "4"],
        "allocate": ["--input_file", "data/skills.json", "--train_per_cat", "2", "--test_per_cat", "1"],
    }
    for command, words in commands.items():
        capsys.readouterr()
        assert cli.main([*command.split(), *words, "--json"]) == 0, command
        printed = json.loads(capsys.readouterr().out)
        known = documented(command)
        lists = {name.partition("[]")[0] for name in known if "[]" in name}
        inside = {f"{name}[].{field}" for name in lists for entry in printed[name] for field in entry}
        assert printed.keys() | inside <= known, command
