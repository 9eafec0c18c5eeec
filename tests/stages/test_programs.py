"""The five programs and the four scripts, end to end on the tiny model: they leave exactly the documented files."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from judge_server import prefers_a, serve

ROOT = Path(__file__).parents[2]
MODEL_FILES = {"adapter_model.bin", "adapter_config.json", "update.json"}
GLOBAL_FILES = {"global_adapter_model.bin", "adapter_model.safetensors", "adapter_config.json", "manifest.json"}


def call(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "api_key": "sk-CANARY-programs", **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def succeed(command: list[str], **variables: str) -> str:
    done = call(command, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def call_here(program: str, arguments: list[str]) -> int:
    """The program as its own process would run it, without the seconds that a process takes to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / program), run_name="__main__")
    return ended.value.code


def dolly_rows() -> str:
    """Rows as Dolly has them: three categories, ten rows each, one prompt twice."""
    rows = [
        {"instruction": f"{name} {n}", "context": "some text" * (n % 2), "response": f"{name}!", "category": name}
        for name in ("zeta", "alpha", "mid")
        for n in range(10)
    ]
    return "".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "response": "again"}])


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory):
    """Everything the programs leave in one folder, run once for the tests below."""
    world = tmp_path_factory.mktemp("world")
    (world / "dolly.jsonl").write_text(dolly_rows())
    allocation = ["--input_file", f"{world}/dolly.jsonl", "--output-root", f"{world}/data"]
    allocation += ["--train_per_cat=4", "--test_per_cat", "3"]
    assert call_here("client_data_allocation.py", allocation) == 0
    shared = {"exp_name": "homo-1B", "communication_rounds": "2", "base_model": str(tiny_model), "device": "cpu"}
    shared |= {"model_dir": str(world / "models"), "prediction_dir": str(world / "predictions")}
    test_file = str(world / "data/dataset1/dolly_test_3.jsonl")
    training = {"data_path": str(world / "data"), "num_communication_rounds": "2", "num_clients": "3"}
    training |= {"local_num_epochs": "1", "local_batch_size": "2"}
    succeed(["bash", "script/train.sh"], **shared, **training)
    generation = {**shared, "test_file_path": test_file, "max_new_tokens": "4"}
    succeed(["bash", "script/generate.sh"], **generation)
    words = [word for name, value in generation.items() if name != "data_path" for word in (f"--{name}", value)]
    assert call_here("generate.py", [*words, "--is_base_model"]) == 0
    rouge = {"target_file": test_file, "evaluation_dir": str(world / "rouge")}
    succeed(["bash", "script/evaluate_rouge.sh"], **shared, **rouge)
    with serve(prefers_a) as server:
        succeed(
            ["bash", "script/evaluate_llm.sh"],
            **shared,
            is_base_model="true",
            evaluation_dir=str(world / "llm"),
            base_url=server.url,
            proposed_file="homo-1B/2/global_output.jsonl",
            target_file=test_file,
        )
    return world


def test_allocation_makes_the_contracts_split(world):
    assert tree(world / "data") == {
        "dataset1/3/local_training_0.json",
        "dataset1/3/local_training_1.json",
        "dataset1/3/local_training_2.json",
        "dataset1/3/manifest.json",
        "dataset1/dolly_test_3.jsonl",
    }
    first = json.loads((world / "data/dataset1/3/local_training_0.json").read_text())
    assert [row["category"] for row in first] == ["alpha"] * 4
    assert list(first[0]) == ["instruction", "input", "output", "category"]


def test_training_leaves_exactly_the_documented_tree(world):
    expected = {"run.json", "metrics.jsonl", "steps.jsonl", ".lock"}
    for number in ("1", "2"):
        expected |= {f"{number}/{name}" for name in GLOBAL_FILES}
        expected |= {f"{number}/client_{client}/{name}" for client in range(3) for name in MODEL_FILES}
    assert tree(world / "models/homo-1B") == expected


def test_generation_leaves_predictions_of_global_and_base_side_by_side(world):
    names = {"global_output.jsonl", "global_output.meta.json", "base_output.jsonl", "base_output.meta.json"}
    assert tree(world / "predictions") == {f"homo-1B/2/{name}" for name in names}
    rows = [json.loads(line) for line in (world / "predictions/homo-1B/2/global_output.jsonl").read_text().splitlines()]
    assert [row["category"] for row in rows] == ["alpha"] * 3 + ["mid"] * 3 + ["zeta"] * 3


def test_rouge_leaves_the_contracts_file(world):
    assert tree(world / "rouge") == {"homo-1B/2/global_output_rouge.json"}
    result = json.loads((world / "rouge/homo-1B/2/global_output_rouge.json").read_text())
    assert result.keys() == {"alpha", "mid", "zeta", "overall", "fedlora"}
    assert result["alpha"].keys() == {"rouge1", "rouge2", "rougeL", "rougeLsum"}
    assert result["overall"].keys() == {"avg_rouge1", "avg_rouge2", "avg_rougeL", "avg_rougeLsum"}


def test_a_judge_that_always_prefers_the_first_answer_gives_ties_only(world):
    result = json.loads((world / "llm/homo-1B/2/base_results.json").read_text())
    assert (result["win"], result["tie"], result["loss"], result["num_samples"]) == (0, 9, 0, 9)
    assert result["position_flip_rate"] == 1.0


def test_the_key_is_in_no_file(world):
    for path in world.rglob("*"):
        if path.is_file():
            assert b"sk-CANARY-programs" not in path.read_bytes(), path


def test_predictions_have_fields_in_the_contracts_order(world):
    line = (world / "predictions/homo-1B/2/base_output.jsonl").read_text().splitlines()[0]
    assert list(json.loads(line)) == ["instruction", "input", "answer", "category"]


@pytest.mark.parametrize(
    ("program", "arguments", "code", "words"),
    [
        ("train.py", ["--federation_mode", "fedfoo"], 2, ["federation_mode", "fedfoo", "is not a method"]),
        ("train.py", ["--local_learning_rte", "1"], 2, ["local_learning_rte", "local_learning_rate"]),
        ("train.py", ["--data_path", "{world}/nowhere"], 2, ["nowhere", "fedlora data skills"]),
        ("train.py", ["--client_selection_frac", "0"], 2, ["client_selection_frac"]),
        ("train.py", ["--exp_name", "../up"], 2, ["exp_name", "folder name"]),
        ("train.py", ["--data_path", "{world}/broken", "--num_clients=1"], 3, ["a.jsonl:2:", "instruction"]),
        ("train.py", ["--data_path", "{world}/cut", "--num_clients=1"], 3, ["a.jsonl:1:"]),
        ("client_data_allocation.py", ["--train_per_cat", "90"], 3, ["alpha", "10"]),
        ("client_data_allocation.py", ["--input_file", "{world}/none.json"], 2, ["none.json", "fedlora data dolly"]),
        ("generate.py", ["--communication_rounds", "9"], 2, ["rounds 1-2 have one"]),
        ("generate.py", ["--is_global_model", "false", "--client_id", "7"], 2, ["no client 7", "its clients"]),
        ("evaluate_rouge.py", ["--target_file", "{world}/other.jsonl"], 3, ["other.jsonl"]),
        ("evaluate_rouge.py", ["--communication_rounds", "1"], 2, ["global_output.jsonl", "fedlora generate"]),
        ("evaluate_llm.py", ["--base_url", "http://example.com/v1"], 2, ["base_url", "https"]),
    ],
)
def test_wrong_input_gives_one_clear_message_and_the_documented_code(world, program, arguments, code, words, capsys):
    for name, content in {"broken": '{"instruction": "a", "output": "b"}\n{"output": "c"}\n', "cut": ""}.items():
        (world / name).mkdir(exist_ok=True)
        (world / name / "a.jsonl").write_text(content)
    (world / "other.jsonl").write_text('{"instruction": "x", "output": "y", "category": "alpha"}\n')
    models = ["--model_dir", f"{world}/models"]
    places = {
        "train.py": ["--exp_name", "wrong", *models],
        "client_data_allocation.py": [
            *("--input_file", f"{world}/dolly.jsonl", "--output_root", f"{world}/data", "--dataset_name", "wrong")
        ],
        "generate.py": [
            "--exp_name",
            "homo-1B",
            "--model_dir",
            f"{world}/models",
            "--prediction_dir",
            f"{world}/wrong",
        ],
        "evaluate_rouge.py": ["--exp_name", "homo-1B", "--prediction_dir", f"{world}/predictions"],
        "evaluate_llm.py": [],
    }[program]
    if program == "generate.py":
        places += ["--test_file_path", f"{world}/data/dataset1/dolly_test_3.jsonl"]
    if program == "evaluate_rouge.py" and "--communication_rounds" not in arguments:
        places += ["--communication_rounds", "2"]
    if program == "evaluate_rouge.py" and "--target_file" not in arguments:
        places += ["--target_file", f"{world}/data/dataset1/dolly_test_3.jsonl"]
    before = {name: (world / name).stat().st_mtime_ns for name in tree(world)}
    found = call_here(program, [*places, *(argument.format(world=world) for argument in arguments)])
    told = capsys.readouterr().err
    assert found == code, told
    assert "Traceback" not in told
    assert told.count("error:") == 1
    for word in words:
        assert word in told
    left = tree(world) - {"other.jsonl", "broken/a.jsonl", "cut/a.jsonl"} - {"models/wrong/.lock"}
    assert left == before.keys() - {"other.jsonl", "broken/a.jsonl", "cut/a.jsonl"}
