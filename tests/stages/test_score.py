"""The table of scores: every measure with its interval, row by row, and the differences between models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora import cli
from fedlora.config.evaluate import EvaluateRougeConfig
from fedlora.config.score import ScoreConfig
from fedlora.errors import DataError, UsageError
from fedlora.stages import evaluate_rouge, score

CATEGORIES = ("capitals", "capitals", "sums")
TARGETS = ("Paris", "Rome", "the sum is 5")
SAID = {
    "base": ("paris.", "Milan", "no idea"),
    "global": ("Paris", "Rome", "the sum is 6"),
    "client_1": ("Paris", "Milan", "the sum is 5"),
}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(texts: tuple[str, ...], key: str) -> list[dict[str, Any]]:
    return [
        {"instruction": f"q{number}", "input": "", key: text, "category": category}
        for number, (text, category) in enumerate(zip(texts, CATEGORIES, strict=True))
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_lines(tmp_path / "test.jsonl", rows_of(TARGETS, "output"))
    for name, texts in SAID.items():
        write_lines(tmp_path / "predictions" / "run" / "3" / f"{name}_output.jsonl", rows_of(texts, "answer")[::-1])
    return tmp_path


def make_config(root: Path, kind: Any = ScoreConfig, **fields: Any) -> Any:
    places = {"prediction_dir": root / "predictions", "evaluation_dir": root / "scores", "model_dir": root / "models"}
    return kind.of(**{"exp_name": "run", "target_file": root / "test.jsonl", "of": "all", **places, **fields})


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_every_row_has_every_measure_in_the_order_of_the_test_file(root: Path) -> None:
    scores = score.run(make_config(root))
    first, _, third = lines_of(scores["base"].rows_file)
    assert scores["base"].rows_file == root / "scores" / "run" / "3" / "base_scores.jsonl"
    assert (first["row"], first["category"], first["exact"], first["normalised"], first["f1"]) == (
        1,
        "capitals",
        0,
        1,
        1,
    )
    assert (third["row"], third["category"], third["f1"], third["rouge1"]) == (3, "sums", 0, 0)
    (*_, close) = lines_of(scores["global"].rows_file)
    assert (close["f1"], close["rouge2"]) == (0.75, pytest.approx(2 / 3))
    assert 0.7 < close["chrf"] < 0.95


def test_totals_are_means_over_categories_with_their_intervals(root: Path) -> None:
    totals = json.loads(score.run(make_config(root))["global"].totals_file.read_text())
    assert totals["overall"]["exact"]["mean"] == 0.5
    assert totals["overall"]["f1"]["mean"] == (1 + 0.75) / 2
    low, high = totals["overall"]["exact"]["interval"]
    assert 0 < low < 0.5 < high < 1
    assert totals["groups"]["sums"]["f1"] == {"mean": 0.75, "interval": [0.75, 0.75]}
    assert totals["num_samples"] == {"capitals": 2, "sums": 1}
    assert totals["grouped_by"] == "category"


def test_everyone_is_compared_with_the_base_and_with_others_where_asked(root: Path) -> None:
    scores = score.run(make_config(root))
    assert [[other.name for other in one.differences] for one in scores.scores] == [[], ["base"], ["base"]]
    (found,) = scores["global"].differences.values()
    assert found["exact"].estimate.mean == 0.5
    assert (found["exact"].higher, found["exact"].lower, found["exact"].p) == (2, 0, 0.5)
    every = score.run(make_config(root, against="all"))
    pairs = [{one.name, other.name} for one in every.scores for other in one.differences]
    assert pairs == [{"base", "global"}, {"base", "client 1"}, {"global", "client 1"}]
    one = score.run(make_config(root, of="1", against="global"))
    assert [(each.name, [other.name for other in each.differences]) for each in one.scores] == [
        ("client 1", ["global"])
    ]


def test_a_base_that_was_not_asked_for_is_compared_and_leaves_no_file(root: Path) -> None:
    (only,) = score.run(make_config(root, of="global")).scores
    assert [other.name for other in only.differences] == ["base"]
    assert sorted(path.name for path in (root / "scores" / "run" / "3").iterdir()) == [
        "global_output_rouge.json",
        "global_scores.json",
        "global_scores.jsonl",
    ]


def test_a_base_that_answered_other_rows_is_named_and_left_out(root: Path, capsys) -> None:
    write_lines(root / "predictions" / "run" / "3" / "base_output.jsonl", rows_of(SAID["base"], "answer")[:2])
    (only,) = score.run(make_config(root, of="global")).scores
    assert only.differences == {}
    assert "note: not compared with the base: " in capsys.readouterr().err
    with pytest.raises(DataError, match=r"base_output\.jsonl does not match"):
        score.run(make_config(root, of="global", against="base"))


def test_the_reference_projects_files_are_those_of_evaluate_rouge(root: Path) -> None:
    scored = score.run(make_config(root))
    alone = evaluate_rouge.run(make_config(root, EvaluateRougeConfig, evaluation_dir=root / "rouge"))
    for one, other in zip(scored.scores, alone.scores, strict=True):
        assert one.file.name == other.file.name
        assert one.file.read_bytes() == other.file.read_bytes()


def test_the_same_answers_give_the_same_bytes_again(root: Path) -> None:
    first = [one.totals_file.read_bytes() for one in score.run(make_config(root)).scores]
    assert [one.totals_file.read_bytes() for one in score.run(make_config(root)).scores] == first


def test_models_of_several_runs_stand_in_one_table(root: Path, monkeypatch, capsys) -> None:
    write_lines(root / "predictions" / "other" / "1" / "global_output.jsonl", rows_of(SAID["client_1"], "answer"))
    monkeypatch.chdir(root)
    words = ["score", "run", "--test", "test.jsonl", "--of", "base,global,other/1/global"]
    assert cli.main([*words, "--evaluation_dir", "scores"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["of", "rows", "exact", "normalised", "f1", "rougeL", "chrf"]
    assert [line.split()[0] for line in out[2:5]] == ["run/3/base", "run/3/global", "other/1/global"]
    assert out[5].split()[:3] == ["difference", "of", "less"]
    assert [line.split()[:2] for line in out[7:9]] == [["run/3/global", "run/3/base"], ["other/1/global", "run/3/base"]]
    assert cli.main([*words, "--evaluation_dir", "scores", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["scores"]
    assert printed[2]["differences"][0]["against"] == "run/3/base"
    assert printed[1]["overall"]["f1"]["mean"] == 0.875


def test_of_one_model_the_table_is_by_category(root: Path) -> None:
    out = score.run(make_config(root, of="global")).text().splitlines()
    assert out[0].split() == ["category", "rows", "exact", "normalised", "f1", "rougeL", "chrf"]
    assert out[2].split()[:4] == ["capitals", "2", "1.000", "0.342-1.000"]
    assert out[5].split()[:3] == ["overall", "3", "0.500"]


def test_the_tokenizer_of_rouge_reaches_every_file(root: Path) -> None:
    cyrillic = "\u041f\u0430\u0440\u0438\u0436"
    write_lines(root / "test.jsonl", rows_of((cyrillic, *TARGETS[1:]), "output"))
    write_lines(root / "predictions" / "run" / "3" / "global_output.jsonl", rows_of((cyrillic, "a", "b"), "answer"))
    for tokenizer, value in (("ascii", 0.0), ("unicode", 1.0)):
        (only,) = score.run(make_config(root, of="global", against="1", rouge_tokenizer=tokenizer)).scores
        assert lines_of(only.rows_file)[0]["rougeL"] == value
        assert lines_of(only.rows_file)[0]["f1"] == 1.0
    totals = json.loads(only.totals_file.read_text())
    assert totals["rouge_tokenizer"] == "unicode"
    assert "hidden_from_rouge" not in totals


def test_an_unknown_name_is_a_usage_error(root: Path) -> None:
    with pytest.raises(UsageError, match="no scores of 'globl'"):
        score.run(make_config(root))["globl"]
    with pytest.raises(UsageError, match=r"client_7_output\.jsonl|client 7"):
        score.run(make_config(root, of="global", against="7"))
