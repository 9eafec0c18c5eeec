"""Every stage names the command to type next: complete, in short names, and it runs as it stands."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedlora import cli
from fedlora.config.command_line import command_line, repeated
from fedlora.config.compare import CompareConfig
from fedlora.config.evaluate import ReportConfig
from fedlora.config.generate import GenerateConfig
from fedlora.config.plan import PlanConfig
from fedlora.config.train import TrainConfig
from fedlora.data.client_files import known_test_rows
from fedlora.paths import OutputName, RunPaths
from fedlora.reporting.what_ifs import Reaggregated
from fedlora.runs.subjects import Subject, report_command
from fedlora.stages.generate import Predictions, SubjectAnswers
from fedlora.stages.train import TrainedRun


@pytest.fixture
def follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command in a folder of its own; returns the next one."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, *more: str, code: int = 0) -> str:
        assert shlex.split(command)[0] == "fedlora"
        assert cli.main([*shlex.split(command)[1:], *more]) == code
        said = capsys.readouterr()
        assert "next:" not in said.out
        named = [line.removeprefix("next: ") for line in said.err.splitlines() if line.startswith("next: ")]
        return named[-1] if named else ""

    return run


def test_the_commands_lead_from_rows_to_a_report(follow, tiny_model) -> None:
    command = follow("fedlora data skills --rows_per_category 5 --output_file 'my rows.json'")
    assert command == "fedlora allocate --input_file 'my rows.json' --test_share 0.2"
    command = follow(command)
    rows = "data/dataset1/test_rows.jsonl"
    assert command == f"fedlora plan --data data/dataset1 --model smollm2-135m --client_fraction 1 --test {rows}"
    small = ["--probe", "false", "--epochs", "1", "--rounds", "2", "--name", "first", "--model_dir", "runs"]
    command = follow(command.replace("smollm2-135m", str(tiny_model)), *small)
    assert command.startswith("fedlora train --")
    assert set(command.split(" --")[1:]) == {
        *("data data/dataset1", f"model {tiny_model}", "client_fraction 1"),
        *("epochs 1", "rounds 2", "name first", "model_dir runs"),
    }
    command = follow(command)
    assert command == f"fedlora generate first --test {rows} --model_dir runs"
    command = follow(command, "--of", "base,global", "--prediction_dir", "said", "--max_new_tokens", "2")
    assert command == f"fedlora score first --of base,global --test {rows} --prediction_dir said --model_dir runs"
    command = follow(command, "--json")
    assert command == "fedlora report first --model_dir runs --prediction_dir said"
    assert follow(command) == ""
    Path("evaluations_rouge/first/2/base_output_rouge.json").unlink()
    command = follow(command)
    assert command == (f"fedlora score first --of base --round 2 --prediction_dir said --model_dir runs --test {rows}")
    follow(command)
    assert Path("evaluations_rouge/first/2/base_output_rouge.json").is_file()
    # an earlier round than the last that has answers is named
    earlier = f"--round 1 --test {rows} --prediction_dir said --model_dir runs"
    command = follow(f"fedlora generate first {earlier} --max_new_tokens 2")
    assert command == f"fedlora score first {earlier}"


def test_a_plan_from_a_file_is_followed_by_training_from_it(follow, tiny_model, make_clients) -> None:
    data = make_clients([3, 3])
    Path("run.yaml").write_text(
        f"data: {data}\nmodel: {tiny_model}\nnum_clients: 2\nmethod: fedprox\nproximal_mu: 0.1\n"
    )
    assert follow("fedlora plan run.yaml --probe false --rounds 2") == "fedlora train run.yaml --rounds 2"
    Path("run.yaml").write_text(Path("run.yaml").read_text() + "probe: false\n")
    flags = shlex.split(follow("fedlora plan run.yaml --rounds 2"))
    assert flags[:2] == ["fedlora", "train"]
    given = dict(zip(flags[2::2], flags[3::2], strict=True))
    assert given == {
        "--data": str(data),
        "--model": str(tiny_model),
        "--num_clients": "2",
        "--method": "fedprox",
        "--proximal_mu": "0.1",
        "--rounds": "2",
    }


@pytest.mark.parametrize(
    ("config", "values", "positional", "expected"),
    [
        (GenerateConfig, {"exp_name": "a", "model_dir": Path("./models")}, "exp_name", "fedlora x a"),
        (GenerateConfig, {"exp_name": "-a"}, "exp_name", "fedlora x --name=-a"),
        (GenerateConfig, {"exp_name": "a.yaml"}, "exp_name", "fedlora x --name a.yaml"),
        (GenerateConfig, {"exp_name": "fedavg-1B"}, "exp_name", "fedlora x fedavg-1B"),
        (GenerateConfig, {"of_subjects": ("base", "2")}, "", "fedlora x --of base,2"),
        (GenerateConfig, {"test_file_path": "it's $HOME"}, "", """fedlora x --test 'it'"'"'s $HOME'"""),
        (GenerateConfig, {"overwrite": True, "all": False, "top_p": None}, "", "fedlora x --overwrite true"),
        (ReportConfig, {"exp_names": ("a", "b")}, "exp_names", "fedlora x a b"),
    ],
)
def test_a_command_has_short_names_no_defaults_and_is_quoted(config, values, positional, expected) -> None:
    assert command_line("x", config, values, positional=positional) == expected


def test_a_repeated_command_keeps_what_was_typed() -> None:
    config = PlanConfig.of(data_path="d")
    typed = {"data_path": "d", "local_learning_rate": "3e-4", "exp_name": "-a", "plan_file": "p.json"}
    command = repeated("train", TrainConfig, config, typed, None)
    assert command == "fedlora train --data d --learning_rate 3e-4 --name=-a"
    own = repeated("train", TrainConfig, config, {"data_path": "d", "method_options": {"step": "0.3"}}, None)
    assert own == "fedlora train --data d --set step=0.3"
    planned = CompareConfig.of(budget_steps=2, plan=True)
    assert repeated("compare", CompareConfig, planned, {"plan": "true", "budget_steps": "2"}, None) == (
        "fedlora compare --budget_steps 2"
    )
    assert repeated("compare", CompareConfig, planned, {"budget_steps": "2"}, Path("s.yaml")) == (
        "fedlora compare s.yaml --budget_steps 2 --plan false"
    )


def test_test_rows_are_known_where_they_lie_with_the_data(make_clients, tmp_path) -> None:
    data = make_clients([2, 2])
    assert known_test_rows(data, 2, has_share=False) is None
    test = next(data.glob("**/2")).parent / "dolly_test_5.jsonl"
    test.touch()
    assert known_test_rows(data, 2, has_share=False) == test
    assert known_test_rows(data, 3, has_share=False) is None
    test.with_name("dolly_test_6.jsonl").touch()
    assert known_test_rows(data, 2, has_share=False) is None
    silos = tmp_path / "silos"
    silos.mkdir()
    (silos / "north.csv").touch()
    assert known_test_rows(silos, 8, has_share=False) is None
    assert known_test_rows(silos, 8, has_share=True) == silos
    (silos / "north.test.csv").touch()
    assert known_test_rows(silos, 8, has_share=False) == silos
    assert known_test_rows(tmp_path / "nowhere", 8, has_share=True) is None


def test_a_run_without_a_global_adapter_is_answered_by_all(tmp_path, monkeypatch) -> None:
    base = TrainConfig.of().base_model
    monkeypatch.setattr(
        "fedlora.stages.train.read_run", lambda paths: SimpleNamespace(has_global_model=False, base_model=base)
    )
    config = TrainConfig.of(method="none", name="alone", data=tmp_path, val_data_path="held.jsonl", model_dir="runs")
    trained = TrainedRun(RunPaths(config.model_dir, config.exp_name), config)
    assert trained.next_command == "fedlora generate alone --of all --test held.jsonl --model_dir runs"


def test_how_rows_are_read_is_part_of_the_next_command_and_questions_alone_have_no_score(tmp_path, monkeypatch) -> None:
    base = TrainConfig.of().base_model
    monkeypatch.setattr(
        "fedlora.stages.train.read_run", lambda paths: SimpleNamespace(has_global_model=True, base_model=base)
    )
    reading = {"columns": "prompt=question,response=answers.text.0", "skip_bad": 2}
    flags = "--columns prompt=question,response=answers.text.0 --skip_bad 2"
    config = TrainConfig.of(name="mapped", data=tmp_path, val_data_path="held.jsonl", **reading)
    trained = TrainedRun(RunPaths(config.model_dir, config.exp_name), config)
    assert shlex.split(trained.next_command)[:5] == ["fedlora", "generate", "mapped", "--test", "held.jsonl"]
    asked = GenerateConfig.of(exp_name="mapped", test_file_path="held.jsonl", **reading)
    answers = (SubjectAnswers(Subject("mapped", 1, OutputName("global"), "global"), tmp_path / "answers.jsonl"),)
    for command in (trained.next_command, Predictions(answers, asked).next_command):
        assert set(flags.split(" --")[1:]) <= set(command.split(" --")[1:])
        assert "--columns prompt=question,response=answers.text.0" in command
    assert Predictions(answers, asked, has_replies=False).next_command == ""


def test_what_ifs_lead_to_their_answers() -> None:
    found = Reaggregated(RunPaths(Path("models"), "prox-what-if"), {}, (), {})
    assert found.next_command == "fedlora generate prox-what-if --test FILE"


def test_scores_without_a_run_lead_to_no_report(tmp_path) -> None:
    subject = Subject("nobody", 20, OutputName("base"), "base")
    assert report_command([subject], tmp_path, model_dir=tmp_path / "models") == ""
