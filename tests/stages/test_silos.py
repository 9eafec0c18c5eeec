"""Own silos through every stage: test rows beside each client's file, or as a share; clients keep their names."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedlora.config.evaluate import EvaluateRougeConfig, ReportConfig
from fedlora.config.generate import GenerateConfig
from fedlora.config.score import ScoreConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import DataError, TrainingError, UsageError
from fedlora.stages import evaluate_rouge, generate, report, train
from fedlora.stages import score as stage_score

CLIENTS = ("north", "south", "west")


def write_rows(path: Path, prompts: list[str], **more: str) -> None:
    path.parent.mkdir(exist_ok=True)
    rows = [{"instruction": prompt, "response": f"{prompt[0]}{prompt[-1]}", **more} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def world(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Silos with test rows beside two of three clients, and without any; a run of `none` on the first, and a run of
    `homo` that held out a share on the second."""
    root = tmp_path_factory.mktemp("silos")
    for name in CLIENTS:
        for folder in ("silos", "plain"):
            write_rows(root / folder / f"{name}.jsonl", [f"{name} {number}" for number in range(8)], url="x")
    write_rows(root / "silos" / "north.test.jsonl", ["north 88", "north 89"])
    write_rows(root / "silos" / "west.test.jsonl", ["west 88"])
    for name, fields in {
        "alone": {"data_path": root / "silos", "federation_mode": "none"},
        "shared": {"data_path": root / "plain", "federation_mode": "homo", "test_share": 0.25},
    }.items():
        train.run(
            TrainConfig.of(
                exp_name=name,
                base_model=str(tiny_model),
                base_dtype="float32",
                device="cpu",
                model_dir=root / "models",
                client_selection_frac=1.0,
                num_communication_rounds=1,
                local_num_epochs=1,
                prompt_template="chat",
                **fields,
            )
        )
    return root


def answer(world: Path, name: str, data: str | Path, **more: Any) -> generate.Predictions:
    given = {"exp_name": name, "model_dir": world / "models", "prediction_dir": world / "predictions"}
    how = {"max_new_tokens": 4, "device": "cpu", "base_dtype": "float32"}
    return generate.run(GenerateConfig.of(**{**given, **how, "test_file_path": world / data, **more}))


def score(world: Path, name: str, data: str | Path, **more: Any) -> evaluate_rouge.RougeScores:
    given = {"exp_name": name, "model_dir": world / "models", "prediction_dir": world / "predictions"}
    where = {"evaluation_dir": world / "rouge", "target_file": world / data}
    return evaluate_rouge.run(EvaluateRougeConfig.of(**{**given, **where, **more}))


def lines_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_client_s_test_rows_are_answered_once_and_scored_by_client(world):
    answers = answer(world, "alone", "silos", of="all")
    assert [one.name for one in answers.answers] == ["base", *CLIENTS]
    for file in answers.files:
        assert [(line["instruction"], line["client"]) for line in lines_of(file)] == [
            *(("north 88", "north"), ("north 89", "north"), ("west 88", "west"))
        ]
    scores = score(world, "alone", "silos", of="all")
    found = scores.scores[1].record
    assert list(found) == ["north", "west", "overall", "fedlora"]
    assert found["fedlora"]["num_samples"] == {"north": 2, "west": 1}
    assert found["fedlora"]["clients"]["west"].keys() == {
        *("num_samples", "exact_match", "rouge1", "rouge2", "rougeL", "rougeLsum")
    }
    assert "rougeL on the rows of" in scores.text()
    (one,) = score(world, "alone", "silos", of="west").scores
    assert one.record == scores.scores[3].record
    text = score(world, "alone", "silos", of="west").text()
    assert text.splitlines()[0].split() == ["client", "rows", "exact", "rouge1", "rouge2", "rougeL", "rougeLsum"]


def test_a_second_call_answers_nothing_and_other_rows_are_refused(world, capsys):
    answer(world, "alone", "silos", of="base")
    answer(world, "alone", "silos", of="base")
    assert "already answered" in capsys.readouterr().err
    with pytest.raises(UsageError, match="holds no test rows"):
        answer(world, "alone", "plain", of="base")


def test_the_rows_that_a_run_held_out_are_found_by_its_record_and_were_not_trained_on(world, tmp_path):
    run = json.loads((world / "models" / "shared" / "run.json").read_text())
    assert run["config"]["test_share"] == 0.25
    assert [(one["file"], one["num_examples"], one["num_test"]) for one in run["clients"]] == [
        (f"{name}.jsonl", 6, 2) for name in CLIENTS
    ]
    (file,) = answer(world, "shared", "plain").files
    assert [line["client"] for line in lines_of(file)] == [name for name in CLIENTS for _ in range(2)]
    (scores,) = score(world, "shared", "plain").scores
    assert scores.num_rows == 6
    with pytest.raises(UsageError, match=r"did not hold out the same test rows: shared 0.25 by seed 42, alone none"):
        answer(world, "shared", "plain", of="global,alone/1/north")
    shutil.copytree(world / "plain", tmp_path / "changed")
    write_rows(tmp_path / "changed" / "south.jsonl", ["south 1"])
    with pytest.raises(DataError, match=r"south.jsonl: not the file that the run was trained on"):
        score(world, "shared", tmp_path / "changed")
    assert "test_share" not in json.loads((world / "models" / "alone" / "run.json").read_text())["config"]


def test_rows_with_categories_are_scored_by_category_and_by_client(world, tmp_path):
    for name in CLIENTS:
        write_rows(tmp_path / "silos" / f"{name}.test.jsonl", [f"{name} 90", f"{name} 91"], category=name[0])
        write_rows(tmp_path / "silos" / f"{name}.jsonl", [f"{name} 1"])
    answer(world, "alone", tmp_path / "silos", of="base", prediction_dir=tmp_path / "p")
    scores = score(world, "alone", tmp_path / "silos", of="base", prediction_dir=tmp_path / "p")
    record = scores.scores[0].record["fedlora"]
    assert record["grouped_by"] == "category"
    assert list(record["num_samples"]) == ["n", "s", "w"]
    assert list(record["clients"]) == list(CLIENTS)
    assert re.search("rougeL on the rows of +north +south +west", scores.text())


def test_the_report_calls_clients_by_their_files_and_scores_each_on_its_rows(world):
    answer(world, "alone", "silos", of="all")
    score(world, "alone", "silos", of="all")
    result = report.run(
        ReportConfig.of(
            exp_names=["alone"],
            communication_rounds=1,
            model_dir=world / "models",
            prediction_dir=world / "predictions",
            rouge_dir=world / "rouge",
            llm_dir=world / "llm",
            report_dir=world / "reports",
        )
    )
    page = (world / "reports" / "report" / "report.md").read_text()
    assert "none north" in page
    assert "client 0" not in page
    assert "client 0" not in result.text()
    rows = {
        row["client_name"]: row
        for row in json.loads((world / "reports" / "report" / "report.json").read_text())["rows"]
    }
    assert rows["north"]["own_categories"] == ["north"]
    assert rows["north"]["own"] is not None
    # south has no test rows
    assert rows["south"]["own"] is None


def test_the_report_says_who_gains_by_joining_on_its_test_rows(world, tiny_model, tmp_path):
    train.run(
        TrainConfig.of(
            exp_name="joint",
            base_model=str(tiny_model),
            base_dtype="float32",
            device="cpu",
            model_dir=world / "models",
            client_selection_frac=1.0,
            num_communication_rounds=1,
            local_num_epochs=1,
            prompt_template="chat",
            data_path=world / "silos",
            federation_mode="homo",
        )
    )
    folders = {"model_dir": world / "models", "prediction_dir": world / "predictions"}
    for name in ("alone", "joint"):
        answer(world, name, "silos", of="all")
        words = ScoreConfig.of(
            exp_name=name, of="all", target_file=world / "silos", evaluation_dir=tmp_path / "scores", **folders
        )
        assert [line["client"] for line in lines_of(stage_score.run(words).scores[0].rows_file)] == ["north"] * 2 + [
            "west"
        ]
    written = report.run(
        ReportConfig.of(
            exp_names=["alone", "joint"],
            communication_rounds=1,
            rouge_dir=tmp_path / "scores",
            llm_dir=world / "llm",
            report_dir=tmp_path / "reports",
            **folders,
        )
    )
    page = written.file.read_text()
    assert "## Who gains by joining" in page
    # the personal models of a joint run stand beside its global one; south has no test rows
    assert "| client | rows | exact: base | exact: alone (none) | exact: homo | exact: homo, its own |" in page
    assert "- homo, exact: 0 of 2 gain, 0 lose" in page
    found = written.as_dict()["own_rows"]
    assert [(one["client"], one["num_rows"], one["reference"]) for one in found] == [
        *(("north", 2, "alone (none)"), ("west", 1, "alone (none)"))
    ]


def test_messages_of_training_call_clients_by_their_files(world, tiny_model, tmp_path, capsys):
    write_rows(tmp_path / "own" / "archive.jsonl", ["archive 1", "archive 2"])
    write_rows(tmp_path / "own" / "library.jsonl", ["library 1"])
    (tmp_path / "own" / "museum.jsonl").write_text('{"instruction": "x", "response": ""}\n')
    with (tmp_path / "own" / "library.jsonl").open("a") as file:
        file.write('{"instruction": "x", "response": ""}\n')
    given = {"base_model": str(tiny_model), "base_dtype": "float32", "device": "cpu", "local_num_epochs": 1}
    where = {"data_path": tmp_path / "own", "model_dir": tmp_path / "models", "num_communication_rounds": 1}
    limits = {"max_update_norm": 1e-9, "norm_action": "quarantine", "client_selection_frac": 1.0}
    config = TrainConfig.of(**given, **where, **limits)
    with pytest.raises(TrainingError, match=r"no client gave a usable update: archive: .*; library: "):
        train.run(config)
    said = capsys.readouterr().err
    assert "warning: museum (museum.jsonl) has no row to train on" in said
    assert "library: 1 row left out, with an empty response" in said
    assert not re.search(r"client \d", said)
    with pytest.raises(UsageError, match="no adapter of south"):
        answer(world, "shared", "plain", of="south", communication_rounds=7)
