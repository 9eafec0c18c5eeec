"""Configuration files that people really write, and some they should not."""

import pytest

from fedlora.config.compare import CompareConfig
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


def refusal(config, file, content, values=None):
    file.write_text(content)
    with pytest.raises(UsageError) as caught:
        config.make(values or {}, file=file)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("seed: 1\nlora_rr: 4\n", 2, "unknown field 'lora_rr'"),
        ("seed: 1\n\n# a note\nbatch-size: many\n", 4, "local_batch_size='many'"),
        ("rank: 0\n", 1, "lora_r=0"),
        ("seed: 1\nnum_clients: true\n", 2, "num_clients=True"),
        ("method: fedprox\nproximal_mu: much\n", 2, "proximal_mu='much'"),
        ("seed: 3\nmethod: fedproxx\n", 2, "'fedproxx' is not a method"),
        ("seed: 3\nmethod: homo\nproximal_mu: 0.1\n", 2, "homo has no proximal_mu"),
        ("rank: 4\nseed: 1\nlora_r: 8\n", 1, "same field"),
        ("lora-r: 4\nlora_r: 8\n", 1, "given twice"),
        ("seed: 1\ntrust_remote_code: true\n", 2, "cannot be set in a file"),
        ("seed: 1\nmethod: own.py:mine\n", 2, "names code"),
        ("lora_target_modules: {q: 1}\n", 1, "lora_target_modules: "),
    ],
)
def test_an_error_in_a_file_names_file_and_line(tmp_path, content, line, words):
    file = tmp_path / "run.yaml"
    told = refusal(TrainConfig, file, content)
    assert told.startswith(f"{file}:{line}: ")
    assert words in told


def test_every_error_of_a_file_has_its_line_and_those_of_flags_have_none(tmp_path):
    file = tmp_path / "run.yaml"
    told = refusal(TrainConfig, file, "rank: 0\nseed: x\n")
    assert f"{file}:1: lora_r=0" in told
    assert f"{file}:2: seed='x'" in told
    assert str(file) not in refusal(TrainConfig, file, "rank: 4\n", {"lora_r": "0"})
    assert str(file) not in refusal(TrainConfig, file, "rank: 4\n", {"federation_mode": "fedproxx"})


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("train:\n  rank: 4\n  batch_sizes: 8\n", 3, "unknown field 'batch_sizes'"),
        ("train:\n  rank: 4\n  batch_size: many\n", 3, "local_batch_size='many'"),
        ("train: {rank: 4,\n  proximal_mu: -1}\n", 2, "proximal_mu=-1"),
        ("train:\n  seed: 4\n", 2, "compare decides it"),
        ("data:\n  alphas: 1\n", 2, "unknown field 'alphas'"),
        ("data:\n  partition: every\n", 2, "partition='every'"),
        ("axes:\n  rank: [4, 16]\n  alpha: [0.1, much]\n", 3, "alpha='much'"),
        ("methods:\n  - homo\n  - fedproxx\n", 3, "'fedproxx' is not a method"),
        ("methods:\n  - homo\n  - method: fedprox\n    proximal_mus: 1\n", 4, "unknown field 'proximal_mus'"),
        ("methods:\n  - homo\n  - method: fedprox\n    proximal_mu: -1\n", 4, "proximal_mu=-1"),
        ("seeds: [1, 1]\n", 1, "different numbers"),
        ("seeds: [1]\nsweep_seeds: 2\nbudget_steps: 3\n", 2, "sweep_seeds=2"),
    ],
)
def test_an_error_in_a_comparison_s_file_names_the_nested_line(tmp_path, content, line, words):
    file = tmp_path / "compare.yaml"
    told = refusal(CompareConfig, file, content)
    assert words in told
    assert f"{file}:{line}: " in told
