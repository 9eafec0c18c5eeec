"""A run's folder that somebody changed: generate uses nothing that its manifest does not vouch for."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora import cli
from fedlora.config.generate import GenerateConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.files import json_text
from fedlora.llm.base_model import load_base_model
from fedlora.runs.checking import find_round_fault, read_manifest, seal
from fedlora.stages import generate, train


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    (root / "data" / "1").mkdir(parents=True)
    rows = [{"instruction": f"q{n}", "input": "", "output": "yes", "category": "c"} for n in range(2)]
    (root / "data" / "1" / "local_training_0.json").write_text(json.dumps(rows))
    (root / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    train.run(
        TrainConfig.of(
            exp_name="e",
            base_model=str(tiny_model),
            base_dtype="float32",
            device="cpu",
            data_path=root / "data",
            model_dir=root / "models",
            num_clients=1,
            num_communication_rounds=1,
            local_num_epochs=1,
        )
    )
    return root


@pytest.fixture
def answer(finished, tmp_path) -> Callable[..., list[Path]]:
    """Generate from a copy of the run, which the test may change first."""
    shutil.copytree(finished / "models", tmp_path / "models")

    def run(**options: Any) -> tuple[Path, ...]:
        values = {
            "exp_name": "e",
            "communication_rounds": 1,
            "max_new_tokens": 2,
            "device": "cpu",
            "base_dtype": "float32",
            "model_dir": tmp_path / "models",
            "prediction_dir": tmp_path / "predictions",
            "test_file_path": finished / "test.jsonl",
            **options,
        }
        return generate.run(GenerateConfig.of(**values)).files

    return run


def test_the_run_itself_answers(answer):
    assert len(answer(all=True)) == 3


def test_what_a_run_leaves_is_as_open_as_the_umask_says_and_its_tokens_are_not(tiny_model, finished, tmp_path):
    before = os.umask(0o022)
    try:
        values = {"exp_name": "m", "base_model": str(tiny_model), "device": "cpu", "data_path": finished / "data"}
        rounds = {"num_clients": 1, "num_communication_rounds": 1, "local_num_epochs": 1, "cutoff_len": 511}
        train.run(TrainConfig.of(**values, **rounds, model_dir=tmp_path / "models"))
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "models").rglob("*") if path.is_file() and path.suffix in (".bin", ".json")]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in files}
    assert {"adapter_model.bin", "global_adapter_model.bin", "adapter_config.json", "run.json"} <= modes.keys()
    assert set(modes.values()) == {0o644}
    tokens = list(Path(os.environ["FEDLORA_CACHE"]).rglob("*.tokens"))
    assert tokens
    assert {stat.S_IMODE(path.stat().st_mode) for path in tokens} == {0o600}


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("adapter_model.safetensors", {}),
        ("adapter_config.json", {}),
        ("client_0/adapter_model.bin", {"is_global_model": False}),
        ("client_0/adapter_config.json", {"is_global_model": False}),
    ],
)
def test_a_changed_file_is_not_used(answer, tmp_path, file, options):
    path = tmp_path / "models" / "e" / "1" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    for changed in (bytes(content), bytes(content[:-1]), b""):
        path.write_bytes(changed)
        with pytest.raises(UsageError, match="does not match its hash") as caught:
            answer(**options)
        assert file in str(caught.value)
    assert not (tmp_path / "predictions").exists()


def test_a_file_that_no_manifest_names_is_not_used(answer, tmp_path):
    folder = tmp_path / "models" / "e" / "1"
    shutil.copytree(folder / "client_0", folder / "client_7")
    with pytest.raises(UsageError, match="run e has no client 7"):
        answer(is_global_model=False, client_id=7)
    (folder / "manifest.json").unlink()
    with pytest.raises(UsageError, match=r"manifest\.json is missing or damaged"):
        answer()


def test_the_name_of_another_base_in_the_configuration_leads_nowhere(answer, tmp_path, capsys):
    folder = tmp_path / "models" / "e" / "1"
    path = folder / "adapter_config.json"
    value = json.loads(path.read_text())
    path.write_text(json_text({**value, "base_model_name_or_path": "http://evil.example/model"}))
    manifest = json.loads((folder / "manifest.json").read_text())
    facts = manifest["files"]["adapter_config.json"]
    facts["bytes"], facts["sha256"] = path.stat().st_size, generate.sha256_of(path)
    (folder / "manifest.json").write_text(json_text(seal(manifest)))
    assert len(answer()) == 1
    assert '"http://evil.example/model"; ' in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_template": "../../x"},
        {"prompt_template": ["alpaca"]},
        {"prompt_template": None},
        {"quantization": "evil"},
        {"cutoff_len": "512"},
        {"cutoff_len": True},
    ],
)
def test_a_run_record_with_values_no_run_has_is_named(answer, tmp_path, change):
    path = tmp_path / "models" / "e" / "run.json"
    value = json.loads(path.read_text())
    value.pop("sha256", None)
    path.write_text(json_text({**value, "config": {**value["config"], **change}}))
    with pytest.raises(UsageError, match=r"run\.json: damaged"):
        answer()


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b'{"base_model": NaN}', b"null"])
def test_a_run_record_that_is_none_is_named(answer, tmp_path, content):
    (tmp_path / "models" / "e" / "run.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"run\.json"):
        answer()


HOSTILE_NAMES = [
    "../secret",
    "../../secret",
    "client_0/../../secret",
    "/etc/hostname",
    "./adapter_config.json",
    "a//b",
    "",
    ".",
    "..",
    "x\0y",
    "x\ny",
    "x" * 300,
    "client_0/" + "y" * 5000,
]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_a_manifest_cannot_name_files_elsewhere(answer, finished, tmp_path, name):
    folder = tmp_path / "models" / "e" / "1"
    (tmp_path / "models" / "e" / "secret").write_text("mine")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 4, "sha256": generate.sha256_of(tmp_path / "models" / "e" / "secret")}
    (folder / "manifest.json").write_text(json_text(seal(manifest)))
    fault = find_round_fault(folder, 1)
    assert fault is not None
    assert "is damaged" in fault
    assert len(fault) < 300 + len(str(folder))


@pytest.mark.parametrize("facts", [None, [], "x", {}, {"bytes": "4"}, {"bytes": 4, "sha256": None}])
def test_a_manifest_with_other_facts_than_size_and_hash_vouches_for_nothing(answer, tmp_path, facts):
    folder = tmp_path / "models" / "e" / "1"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["adapter_config.json"] = facts
    (folder / "manifest.json").write_text(json_text(seal(manifest)))
    assert find_round_fault(folder, 1)
    with pytest.raises(UsageError, match="adapter_config"):
        answer()


def test_a_link_in_the_place_of_a_file_is_not_followed(answer, tmp_path):
    path = tmp_path / "models" / "e" / "1" / "adapter_model.safetensors"
    shutil.move(path, tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match="is missing"):
        answer()


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{}", b"null", b"\xff", b'{"round": 1, "files": []}'])
def test_a_manifest_that_is_none_is_none(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("with_model", [True, False])
def test_a_base_that_is_an_adapter_is_refused_and_its_own_base_not_sought(tiny_model, tmp_path, with_model):
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder) if with_model else folder.mkdir()
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "http://evil.example/m"}'
    )
    with pytest.raises(UsageError, match=r"holds an adapter \(adapter_config\.json\)"):
        load_base_model(str(folder), device="cpu")


def test_code_in_a_model_folder_runs_only_with_its_flag(tiny_model, tmp_path):
    """And not in this process at all: what was imported once stays."""
    folder, canary = tmp_path / "base", tmp_path / "canary"
    shutil.copytree(tiny_model, folder)
    value = json.loads((folder / "config.json").read_text())
    value |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(value))
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    (tmp_path / "test.jsonl").write_text('{"instruction": "a", "input": "", "output": "b", "category": "c"}\n')
    arguments = ["generate", "--is_base_model", "--exp_name", "x", "--base_model", str(folder), "--device", "cpu"]
    arguments += ["--test_file_path", f"{tmp_path}/test.jsonl", "--prediction_dir", f"{tmp_path}/p"]
    arguments += ["--model_dir", f"{tmp_path}/m"]
    assert cli.main(arguments) == 2
    assert not canary.exists()
    command = [sys.executable, "-m", "fedlora", *arguments, "--trust_remote_code"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    # the code is nothing but the canary: it runs, and no model comes of it
    assert done.returncode != 0
    assert canary.exists()
