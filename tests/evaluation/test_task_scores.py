"""What tasks measured, and the library that measures them: read, kept and named without that library."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from fedlora import cli
from fedlora.config.tasks import TasksConfig
from fedlora.errors import UsageError
from fedlora.evaluation.tasks.installed import LIBRARY_VERSION, check_library
from fedlora.evaluation.tasks.task_scores import TaskScore, read_scores, stored_scores
from fedlora.files import write_json

RESULTS = {
    "results": {
        "own": {"alias": "own", "sample_len": 40, "acc,none": 0.5, "acc_stderr,none": 0.08, "ppl,none": 9.0},
        "both": {"alias": "both", "sample_len": 40, "acc,none": 0.5, "acc_stderr,none": "N/A", " ": " "},
    },
    "group_subtasks": {"both": ["own"]},
    "higher_is_better": {"own": {"acc": True, "ppl": False}},
    "n-shot": {"own": 2},
}


def test_scores_are_read_with_their_errors_and_intervals():
    accuracy, perplexity, of_group = read_scores(RESULTS)
    assert (accuracy.value, accuracy.stderr, accuracy.num_rows, accuracy.num_fewshot) == (0.5, 0.08, 40, 2)
    assert accuracy.interval == pytest.approx((0.5 - 1.959964 * 0.08, 0.5 + 1.959964 * 0.08))
    assert (perplexity.stderr, perplexity.interval, perplexity.higher_is_better) == (None, None, False)
    assert (of_group.is_group, accuracy.is_group, of_group.stderr) == (True, False, None)


def test_scores_are_kept_in_a_file_as_they_are(tmp_path):
    scores = tuple(read_scores(RESULTS))
    write_json(tmp_path / "own.json", {"scores": [one.record() for one in scores]})
    assert stored_scores(tmp_path / "own.json") == scores
    write_json(tmp_path / "own.json", {"scores": [{"task": "own"}]})
    with pytest.raises(UsageError, match=r"own\.json: not written by fedlora"):
        stored_scores(tmp_path / "own.json")


def test_a_filter_is_named_where_there_is_one():
    score = TaskScore("gsm8k", "exact_match", "strict-match", 0.1, 0.01, True, 100, 5)
    assert score.called == "exact_match (strict-match)"


def test_without_the_library_the_command_names_what_to_install(monkeypatch, capsys):
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert cli.main(["tasks", "run", "--tasks", "arc_easy"]) == 2
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "error: standard tasks need lm-evaluation-harness, which is not installed",
        "  hint: pip install 'fedlora[tasks]'",
    ]
    monkeypatch.setattr(metadata, "version", lambda name: "0.4.1")
    with pytest.raises(UsageError, match=r"lm-eval 0\.4\.1 is installed, and fedlora works with"):
        check_library()


def test_the_pinned_release_is_the_one_that_is_checked():
    made = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert made["project"]["optional-dependencies"]["tasks"] == [f"lm-eval=={LIBRARY_VERSION}"]


def test_a_limit_is_a_number_of_rows_or_a_share():
    assert TasksConfig.of(limit="0.25").limit == 0.25
    assert TasksConfig.of(limit=20).limit == 20
    with pytest.raises(UsageError, match="a number of rows, or a share below 1"):
        TasksConfig.of(limit=2.5)


def test_only_a_flag_lets_tasks_run_what_a_model_writes(tmp_path):
    (tmp_path / "tasks.yaml").write_text("run_model_code: true\n")
    with pytest.raises(UsageError, match="run_model_code cannot be set in a file"):
        TasksConfig.make({}, file=tmp_path / "tasks.yaml")
    assert TasksConfig.of(seed=3).seeds == (3, 3, 3)
    assert TasksConfig.of().seeds == (0, 1234, 1234)
