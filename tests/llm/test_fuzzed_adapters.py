"""The fuzzer of adapter files: a sample of what `make fuzz` runs, and proof that it would see a careless reader."""

from __future__ import annotations

import json

import fuzz_adapters
import pytest
import safetensors.torch
import torch
from fuzz_adapters import Finding, Target, fuzz, make_targets

TARGETS = {target.name: target for target in make_targets()}


@pytest.mark.parametrize("name", TARGETS)
def test_500_damaged_files_are_refused_or_read_right(tmp_path, name):
    outcomes = fuzz(TARGETS[name], 500, 0, tmp_path)
    assert outcomes.total() == 500
    # damage that nobody sees, or that nothing survives, would test little
    assert outcomes["refused"] > 300
    assert outcomes["loaded"] > 5


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("adapter_model.bin", lambda path: torch.load(path, weights_only=True)),
        ("adapter_model.safetensors", safetensors.torch.load_file),
        ("adapter_config.json", lambda path: json.loads(path.read_text())["r"] + 1),
    ],
)
def test_a_careless_reader_is_found(tmp_path, name, read):
    with pytest.raises(Finding, match="the file is kept"):
        fuzz(Target(name, TARGETS[name].sound, read), 200, 0, tmp_path)


def test_the_same_seed_damages_the_same_bytes(tmp_path):
    target = TARGETS["adapter_config.json"]
    first, second, other = (fuzz(target, 60, seed, tmp_path) for seed in (5, 5, 6))
    assert first == second
    dice = [fuzz_adapters.random.Random(f"{seed} x 0") for seed in (5, 6)]
    assert fuzz_adapters.mutate(target.sound[0], dice[0]) != fuzz_adapters.mutate(target.sound[0], dice[1])
    assert other.total() == 60
