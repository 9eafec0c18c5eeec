"""The stage from files to file: the contract's places and shape, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from fedlora import cli
from fedlora.config.evaluate import EvaluateRougeConfig
from fedlora.errors import DataError, UsageError
from fedlora.stages import evaluate_rouge

TARGETS = [
    {"instruction": "capital of France", "input": "", "output": "Paris", "category": "capitals"},
    {"instruction": "capital of Italy", "input": "", "output": "Rome", "category": "capitals"},
    {"instruction": "add", "input": "2 3", "output": "the sum is 5", "category": "sums"},
]
ANSWERS = ["Paris ", "Milan", "the sum is 6"]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def predictions(key: str = "answer") -> list[dict[str, Any]]:
    rows = [
        {"instruction": row["instruction"], "input": row["input"], key: answer, "category": row["category"]}
        for row, answer in zip(TARGETS, ANSWERS, strict=True)
    ]
    return rows[::-1]


def make_config(root: Path, **fields: Any) -> EvaluateRougeConfig:
    return EvaluateRougeConfig.of(
        exp_name="homo-1B",
        communication_rounds=3,
        target_file=root / "test.jsonl",
        prediction_dir=root / "predictions",
        evaluation_dir=root / "rouge",
        **fields,
    )


def run(config: EvaluateRougeConfig) -> dict[str, Any]:
    return dict(evaluate_rouge.run(config).scores[0].record)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_lines(tmp_path / "test.jsonl", TARGETS)
    write_lines(tmp_path / "predictions" / "homo-1B" / "3" / "global_output.jsonl", predictions())
    return tmp_path


def test_the_file_has_the_contracts_shape_and_our_figures_beside(root: Path) -> None:
    result = run(make_config(root))
    stored = json.loads((root / "rouge" / "homo-1B" / "3" / "global_output_rouge.json").read_text("utf-8"))
    assert stored == result
    assert set(stored) == {"capitals", "sums", "overall", "fedlora"}
    # "the sum is 5" against "the sum is 6": 3 of 4 words, 2 of 3 word pairs
    assert stored["sums"] == pytest.approx({"rouge1": 0.75, "rouge2": 2 / 3, "rougeL": 0.75, "rougeLsum": 0.75})
    # one word has no word pairs, so that even the right answer scores 0 there
    assert stored["capitals"] == {"rouge1": 0.5, "rouge2": 0.0, "rougeL": 0.5, "rougeLsum": 0.5}
    averages = {"avg_rouge1": 0.625, "avg_rouge2": 1 / 3, "avg_rougeL": 0.625, "avg_rougeLsum": 0.625}
    assert stored["overall"] == pytest.approx(averages)
    ours = stored["fedlora"]
    assert ours["exact_match"] == {"categories": {"capitals": 0.5, "sums": 0.0}, "macro": 0.25, "micro": 1 / 3}
    assert ours["micro"] == pytest.approx(
        {"rouge1": 1.75 / 3, "rouge2": 2 / 9, "rougeL": 1.75 / 3, "rougeLsum": 1.75 / 3}
    )
    assert ours["num_samples"] == {"capitals": 2, "sums": 1}
    assert ours["targets_sha256"] == hashlib.sha256((root / "test.jsonl").read_bytes()).hexdigest()
    source = root / "predictions" / "homo-1B" / "3" / "global_output.jsonl"
    assert ours["predictions_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"is_global_model": False, "client_id": 5}, "client_5"),
        ({"is_base_model": True}, "base"),
        ({"is_base_model": True, "is_global_model": False, "client_id": 5}, "base"),
    ],
)
def test_the_three_flags_choose_the_file(root: Path, flags: dict[str, Any], name: str) -> None:
    write_lines(root / "predictions" / "homo-1B" / "3" / f"{name}_output.jsonl", predictions())
    run(make_config(root, **flags))
    assert [path.name for path in (root / "rouge" / "homo-1B" / "3").iterdir()] == [f"{name}_output_rouge.json"]


def test_keys_of_answer_and_target_can_be_chosen(root: Path) -> None:
    write_lines(root / "predictions" / "homo-1B" / "3" / "global_output.jsonl", predictions("said"))
    write_lines(root / "test.jsonl", [{**row, "right": row["output"], "output": "?"} for row in TARGETS])
    assert run(make_config(root, prediction_key="said", target_key="right"))["sums"]["rouge1"] == 0.75


def test_the_result_as_text_is_a_table_and_the_path(root: Path) -> None:
    out = evaluate_rouge.run(make_config(root)).text().splitlines()
    assert out[0].split() == ["category", "rows", "exact", "rouge1", "rouge2", "rougeL", "rougeLsum"]
    assert out[1].split() == ["capitals", "2", "0.500", "0.5000", "0.0000", "0.5000", "0.5000"]
    assert set(out[3]) == {"-", " "}
    assert out[4].split()[:3] == ["overall", "3", "0.250"]
    assert out[5] == str(root / "rouge" / "homo-1B" / "3" / "global_output_rouge.json")
    assert len(out) == 6


def test_several_are_scored_in_one_call_as_alone_and_shown_in_one_table(root: Path) -> None:
    folder = root / "predictions" / "homo-1B" / "3"
    for name in ("base", "client_2", "client_10"):
        write_lines(folder / f"{name}_output.jsonl", predictions()[:3])
    write_lines(root / "predictions" / "other" / "1" / "base_output.jsonl", predictions())
    scored = evaluate_rouge.run(make_config(root, of="all"))
    assert [one.name for one in scored.scores] == ["base", "global", "client 2", "client 10"]
    table = scored.text().splitlines()
    assert table[0].split() == ["of", "rows", "exact", "rouge1", "rouge2", "rougeL", "rougeLsum"]
    assert [line[:9].rstrip() for line in table[2:6]] == ["base", "global", "client 2", "client 10"]
    assert table[6:] == [str(root / "rouge" / "homo-1B" / "3")]
    for one in scored.scores:
        stored = one.file.read_bytes()
        assert json.loads(stored) == one.record
        evaluate_rouge.run(make_config(root, of=one.subject.word))
        assert one.file.read_bytes() == stored
    both = evaluate_rouge.run(make_config(root, of="global,other/last/base")).text().splitlines()
    assert [line.split()[0] for line in both[2:4]] == ["homo-1B/3/global", "other/1/base"]
    assert both[4:] == [str(root / "rouge" / "homo-1B" / "3"), str(root / "rouge" / "other" / "1")]


def test_a_name_and_a_file_stand_without_flags(root: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(root)
    write_lines(root / "predictions" / "homo-1B" / "3" / "base_output.jsonl", predictions())
    (root / "score.yaml").write_text("of: all\ntest: test.jsonl\nname: other\n")
    for words in (["homo-1B", "score.yaml"], ["score.yaml", "homo-1B", "--round", "last"]):
        assert cli.main(["score", *words]) == 0
        table = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in table[2:4]] == ["base", "global"]
        assert table[-1] == "evaluations_rouge/homo-1B/3"


def test_nothing_is_written_where_one_of_several_does_not_fit(root: Path) -> None:
    write_lines(root / "predictions" / "homo-1B" / "3" / "client_1_output.jsonl", predictions()[1:])
    with pytest.raises(DataError, match=r"client_1_output\.jsonl does not match"):
        evaluate_rouge.run(make_config(root, of="all"))
    assert not (root / "rouge").exists()


def test_references_and_answers_that_rouge_cannot_see_are_counted_and_named(root: Path, capsys) -> None:
    foreign = [{"instruction": f"q{number}", "input": "", "category": "x"} for number in range(2)]
    texts = ["\u041c\u043e\u0441\u043a\u0432\u0430", "Rome"]
    write_lines(root / "test.jsonl", [{**row, "output": text} for row, text in zip(foreign, texts, strict=True)])
    path = root / "predictions" / "homo-1B" / "3" / "global_output.jsonl"
    write_lines(path, [{**row, "answer": text} for row, text in zip(foreign, texts, strict=True)])
    result = run(make_config(root))
    assert '1 of 2 references (to "q0") and of answers (1 of global); --rouge_tokenizer' in capsys.readouterr().err
    assert result["fedlora"]["exact_match"]["micro"] == 1.0
    assert result["overall"]["avg_rouge1"] == 0.5
    assert result["fedlora"]["hidden_from_rouge"] == {"references": 1, "answers": 1}
    result = run(make_config(root, rouge_tokenizer="unicode"))
    assert "ROUGE" not in capsys.readouterr().err
    assert result["overall"]["avg_rouge1"] == 1.0
    assert result["fedlora"]["rouge_tokenizer"] == "unicode"
    assert "hidden_from_rouge" not in result["fedlora"]


@pytest.mark.parametrize("change", ["missing", "surplus", "category", "reserved"])
def test_a_test_file_that_does_not_fit_is_refused_and_nothing_is_written(root: Path, change: str) -> None:
    rows = [dict(row) for row in TARGETS]
    if change == "missing":
        rows.append({**rows[0], "instruction": "capital of Spain"})
    elif change == "surplus":
        rows.pop()
    else:
        rows[0]["category"] = "overall" if change == "reserved" else "sums"
    write_lines(root / "test.jsonl", rows)
    with pytest.raises(DataError, match=r"test\.jsonl"):
        run(make_config(root))
    assert not (root / "rouge").exists()


def test_missing_files_are_usage_errors_that_name_them(root: Path) -> None:
    with pytest.raises(UsageError, match=r"client_0_output\.jsonl"):
        run(make_config(root, is_global_model=False))
    (root / "test.jsonl").unlink()
    with pytest.raises(UsageError, match=r"test\.jsonl"):
        run(make_config(root))


def test_the_reference_of_a_conversation_is_its_last_turn(tmp_path: Path) -> None:
    asked = [
        [
            {"role": "user", "content": f"who {n}?"},
            {"role": "assistant", "content": "Ada"},
            {"role": "user", "content": "when?"},
        ]
        for n in range(2)
    ]
    replies = [{"role": "assistant", "content": year} for year in ("1815", "1912")]
    targets = [{"messages": [*turns, reply], "category": "x"} for turns, reply in zip(asked, replies, strict=True)]
    answers = [{"messages": turns, "answer": "1815", "category": "x"} for turns in reversed(asked)]
    write_lines(tmp_path / "test.jsonl", targets)
    write_lines(tmp_path / "predictions" / "homo-1B" / "3" / "global_output.jsonl", answers)
    assert run(make_config(tmp_path))["fedlora"]["exact_match"]["macro"] == 0.5
