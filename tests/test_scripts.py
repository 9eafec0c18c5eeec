"""The scripts and the Makefile: variables under the names of the flags, nothing else on a command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedlora.config.evaluate import EvaluateLlmConfig, EvaluateRougeConfig
from fedlora.config.generate import GenerateConfig
from fedlora.config.train import TrainConfig

ROOT = Path(__file__).parent.parent
CONFIGS = {
    "train": TrainConfig,
    "generate": GenerateConfig,
    "evaluate_rouge": EvaluateRougeConfig,
    "evaluate_llm": EvaluateLlmConfig,
}
LOOP_ONLY = {"num_clients", "api_key"}
"""Variables of the evaluation scripts that are no flags: how far to count, and what must not be an argument."""

CONTRACT = {
    "train": """exp_name base_model data_path model_dir client_selection_strategy client_selection_frac
        num_communication_rounds num_clients federation_mode local_batch_size local_micro_batch_size local_num_epochs
        local_learning_rate local_val_set_size val_data_path cutoff_len lora_r lora_alpha lora_dropout
        lora_target_modules train_on_inputs group_by_length seed lr_schedule optimizer_state""",
    "generate": """exp_name base_model model_dir is_global_model client_id communication_rounds test_file_path
        prediction_dir batch_size is_base_model""",
    "evaluate_rouge": """exp_name is_global_model client_id is_base_model communication_rounds target_file target_key
        prediction_dir prediction_key evaluation_dir""",
    "evaluate_llm": """exp_name is_global_model client_id is_base_model communication_rounds proposed_file
        prediction_dir evaluation_dir gpt_model base_url batch_size target_file api_key""",
}
UNLIKE_DEFAULTS = {
    "train": {
        "exp_name": "homo-1B",
        "data_path": Path("data/dataset1"),
        "client_selection_frac": 1.0,
        "local_micro_batch_size": 8,
    },
    "generate": {"exp_name": "homo-1B", "communication_rounds": 20},
    "evaluate_rouge": {"exp_name": "homo-1B", "communication_rounds": 20},
    "evaluate_llm": {"exp_name": "homo-1B", "communication_rounds": 20, "is_base_model": True},
}


@pytest.fixture
def calls(tmp_path):
    """Runs a script with a fake Python; returns what each call of it received, and CUDA_VISIBLE_DEVICES."""
    log = tmp_path / "calls"
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"line = [os.getcwd(), os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ.get('api_key'), sys.argv[1:]]\n"
        f"print(json.dumps(line), file=open({str(log)!r}, 'a'))\n"
    )
    python.chmod(0o755)

    def run(name: str, *arguments: str, script: Path | None = None, **variables: str):
        log.unlink(missing_ok=True)
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), **variables}
        command = ["bash", str(script or ROOT / "script" / f"{name}.sh"), *arguments]
        subprocess.run(command, check=True, cwd=tmp_path, env=environment)
        return [json.loads(line) for line in log.read_text().splitlines()]

    return run


def flags_of(call) -> dict[str, str]:
    words = call[3][1:]
    return dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))


@pytest.mark.parametrize("path", [*sorted((ROOT / "script").glob("*.sh")), ROOT / ".ci" / "run"], ids=lambda p: p.name)
def test_scripts_are_valid_bash_and_stop_at_the_first_failure(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_variables_on_top_are_the_fields_that_are_passed(name, calls):
    text = (ROOT / "script" / f"{name}.sh").read_text(encoding="utf-8")
    variables = re.findall(r"^(\w+)=", text.split('\ncd "')[0], re.MULTILINE)
    assert len(variables) == len(set(variables))
    assert set(CONTRACT[name].split()) <= set(variables)
    passed = set(flags_of(calls(name)[0]))
    not_passed = LOOP_ONLY if name.startswith("evaluate") else set()
    assert passed == set(variables) - not_passed
    assert passed <= set(CONFIGS[name].flat_fields())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_values_on_top_are_the_defaults_but_for_those_of_the_contract(name, calls):
    config = CONFIGS[name].make(flags_of(calls(name)[0]))
    assert config == CONFIGS[name](**UNLIKE_DEFAULTS[name])


def test_train_and_generate_meet_in_the_same_folder_and_round(calls):
    train, generate = flags_of(calls("train")[0]), flags_of(calls("generate")[0])
    assert train["model_dir"] == generate["model_dir"]
    assert train["exp_name"] == generate["exp_name"]
    assert train["num_communication_rounds"] == generate["communication_rounds"]
    assert generate["test_file_path"].startswith(train["data_path"] + "/")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_script_calls_its_program_from_the_root_of_the_project(name, calls):
    (call,) = calls(name)
    assert Path(call[0]) == ROOT
    assert call[3][0] == f"{name}.py"
    assert (ROOT / f"{name}.py").is_file()


@pytest.mark.parametrize("name", ["train", "generate"])
def test_the_first_argument_names_cuda_devices(name, calls):
    assert calls(name, "0,1")[0][1] == "0,1"
    assert calls(name)[0][1] is None


def test_values_can_be_set_for_one_call_and_edited_in_a_copy(calls, tmp_path):
    given = flags_of(calls("train", exp_name="seq 1", local_micro_batch_size="")[0])
    assert given["exp_name"] == "seq 1"
    assert given["local_micro_batch_size"] == ""
    copy = tmp_path / "script" / "train.sh"
    copy.parent.mkdir()
    text = (ROOT / "script" / "train.sh").read_text(encoding="utf-8")
    copy.write_text(re.sub(r"(?m)^lora_r=.*$", "lora_r=16", text), encoding="utf-8")
    assert flags_of(calls("train", script=copy)[0])["lora_r"] == "16"


@pytest.mark.parametrize("name", ["evaluate_rouge", "evaluate_llm"])
@pytest.mark.parametrize(
    ("variables", "clients"),
    [
        ({"is_base_model": "false"}, ["0"]),
        ({"is_base_model": "false", "is_global_model": "false", "num_clients": "3"}, ["0", "1", "2"]),
        ({"is_base_model": "False", "is_global_model": "False"}, [str(client) for client in range(8)]),
        ({"is_base_model": "false", "is_global_model": "false", "client_id": "5"}, ["5"]),
        ({"is_base_model": "true", "is_global_model": "false"}, ["0"]),
    ],
)
def test_without_a_client_id_the_evaluations_go_through_all_clients(name, variables, clients, calls):
    given = [flags_of(call) for call in calls(name, **variables)]
    assert [flags["client_id"] for flags in given] == clients
    assert {flags["is_global_model"] for flags in given} == {variables.get("is_global_model", "true")}


def test_the_key_travels_in_the_environment_alone(calls, tmp_path):
    copy = tmp_path / "script" / "evaluate_llm.sh"
    copy.parent.mkdir()
    text = (ROOT / "script" / "evaluate_llm.sh").read_text(encoding="utf-8")
    copy.write_text(re.sub(r"(?m)^api_key=.*$", "api_key=sk-CANARY", text), encoding="utf-8")
    (call,) = calls("evaluate_llm", script=copy)
    assert call[2] == "sk-CANARY"
    assert "CANARY" not in str(call[3])
    (call,) = calls("evaluate_llm")
    assert call[2] is None


def test_a_failing_client_stops_the_loop(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho call >> "$LOG"\nexit 3\n')
    python.chmod(0o755)
    variables = {"PYTHON": str(python), "LOG": str(tmp_path / "log"), "is_global_model": "false"}
    script = ROOT / "script" / "evaluate_rouge.sh"
    result = subprocess.run(["bash", str(script)], check=False, env={"PATH": os.environ["PATH"], **variables})
    assert result.returncode == 3
    assert (tmp_path / "log").read_text() == "call\n"


def test_make_refuses_a_python_that_is_too_old_before_it_makes_anything(tmp_path):
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "old-python"
    old.write_text('#!/bin/bash\n[[ $1 == --version ]] && echo "Python 3.9.1"\nexit 1\n')
    old.chmod(0o755)
    result = subprocess.run(
        ["make", "demo", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13" in result.stderr
    assert "Python 3.9.1" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_ci_runs_the_default_and_the_thorough_tests():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[-2:] == ["make test", "exec make test-thorough"]


def test_requirements_pin_exact_versions_of_all_that_pyproject_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [*project["optional-dependencies"]["dev"], *project["optional-dependencies"]["docs"]]
    extras.remove("fedlora[docs]")
    for file, wanted in (("requirements.txt", project["dependencies"]), ("requirements-dev.txt", extras)):
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        pins = [line for line in lines if line and not line.startswith(("#", "-r"))]
        assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9.]*", pin) for pin in pins)
        names = {pin.split("==")[0] for pin in pins}
        assert {re.split(r"[<>=!~\[ ]", line)[0].lower() for line in wanted} <= names
    assert (ROOT / "requirements.txt").read_text(encoding="utf-8").count("\ntorch==2.13.0\n") == 1
