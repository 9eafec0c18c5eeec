"""Configuration files that people really write, and some they should not."""

import pytest

from fedlora.config.data import AllocateConfig
from fedlora.config.evaluate import EvaluateLlmConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.paths import RunPaths
from fedlora.runs.run_folder import read_run


def test_hyphens_and_text_numbers_are_what_they_look_like(tmp_path):
    (tmp_path / "c.yaml").write_text("lora-r: 8\nlocal_learning_rate: 3e-4\n")
    found = TrainConfig.make({"seed": "7"}, file=tmp_path / "c.yaml")
    assert (found.lora_r, found.local_learning_rate, found.seed) == (8, 3e-4, 7)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\0", "c.yaml"),
        (b"seed: 0x\xc3", "c.yaml"),
        (b"val_data_path: 2026-13-45", "c.yaml"),
        (b"? [a]\n: 1", "c.yaml"),
        (b"seed: " + b"9" * 5000, "c.yaml"),
        (b"a: " + b"[" * 5000, "c.yaml"),
        (b"lora-r: 8\nlora_r: 4", "given twice"),
        (b"num_clients: true", "num_clients=True"),
        (b"trust-remote-code: true", "trust_remote_code"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_clear_error(tmp_path, content, words):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        TrainConfig.make({}, file=tmp_path / "c.yaml")


def test_a_boolean_is_no_number_of_clients(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: true\n")
    with pytest.raises(UsageError, match="seed=True"):
        AllocateConfig.make({}, file=tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "url", ["https://", "http://127.0.0.1:99999", "http://127.0.0.1:abc", "http://127.0.0.1:9/\x01"]
)
def test_an_address_that_is_none_is_refused_before_any_call(url):
    with pytest.raises(UsageError, match="base_url"):
        EvaluateLlmConfig.of(base_url=url)


@pytest.mark.parametrize("content", ["{}", "[]", '{"base_model": 1, "config": {}}'])
def test_a_damaged_run_record_is_named(tmp_path, content):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "run.json").write_text(content)
    with pytest.raises(UsageError, match=r"run\.json: not the record of a run"):
        read_run(RunPaths(tmp_path, "e"))
