"""The identity of a base model: what it depends on, what it does not, and what it costs."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from changed_bases import add_one, change_outside_the_sample, change_weights, put_into_hub_cache
from safetensors.torch import load_file, save_file

from fedlora.errors import StorageError
from fedlora.llm import base_identity, embedded_model, resident_base
from fedlora.llm.base_identity import BaseIdentity, find_folder, find_identity, identify
from fedlora.llm.resident_base import ResidentBase


@pytest.fixture
def copy(tiny_model, tmp_path) -> Path:
    """The tiny model at another place."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}, indent=4))


def test_what_does_not_decide_the_model_is_not_part_of_it(copy, tiny_model):
    (copy / "README.md").write_text("# another text")
    (copy / ".git").mkdir()
    (copy / ".git" / "config").write_text("x")
    (copy / "original").mkdir()
    (copy / "original" / "consolidated.pth").write_bytes(b"x")
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "LICENSE", ".gitattributes"):
        (copy / name).write_bytes(b"x")
    edit_json(copy / "config.json", _name_or_path="/somewhere/else", transformers_version="4.0.0")
    assert identify(copy) == identify(tiny_model)


@pytest.mark.parametrize(
    ("file", "changes", "part"),
    [
        ("config.json", {"rope_theta": 5.0}, "configuration"),
        ("generation_config.json", {"eos_token_id": 7}, "configuration"),
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}, "tokenizer"),
        ("tokenizer.json", {"truncation": {"max_length": 3}}, "tokenizer"),
    ],
)
def test_configuration_and_tokenizer_are_part_of_it(copy, tiny_model, file, changes, part):
    edit_json(copy / file, **changes)
    assert identify(tiny_model).differences(identify(copy)) == [part]


def test_a_chat_template_beside_the_model_is_part_of_it(copy, tiny_model):
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert identify(tiny_model).differences(identify(copy)) == ["tokenizer"]


def test_code_beside_the_model_is_compared_where_both_have_it(copy, tiny_model):
    """The hub's cache has it only where it was run."""
    (copy / "modeling_own.py").write_text("x = 1")
    known = identify(copy)
    assert known.differences(identify(tiny_model)) == identify(tiny_model).differences(known) == []
    (copy / "modeling_own.py").write_text("x = 2")
    assert known.differences(identify(copy)) == ["code"]
    assert str(known) != str(identify(copy))


def test_two_fine_tunes_of_one_architecture_differ_in_every_layer_that_was_trained(copy, tiny_model):
    known = identify(tiny_model)
    for name in load_file(tiny_model / "model.safetensors"):
        shutil.copy(tiny_model / "model.safetensors", copy)
        change_weights(copy, name, lambda tensor: tensor + 1e-3)
        assert known.differences(identify(copy)) == ["weights"], name
        assert str(known) != str(identify(copy))


def test_type_and_shape_of_a_tensor_count(copy, tiny_model):
    change_weights(copy, "model.norm.weight", lambda tensor: tensor.view(torch.int32))
    assert identify(tiny_model).differences(identify(copy)) == ["weights"]
    change_weights(copy, "model.norm.weight", lambda tensor: tensor.view(torch.float32).reshape(2, -1))
    assert identify(tiny_model).differences(identify(copy)) == ["weights"]


def test_the_same_weights_in_another_cut_into_files_are_the_same(copy, tiny_model):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    places = {name: f"model-{index % 2 + 1}-of-2.safetensors" for index, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name, place in places.items() if place == file}, copy / file)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert identify(copy) == identify(tiny_model)
    (copy / min(places.values())).unlink()
    assert identify(copy).differences(identify(tiny_model)) == ["weights"]


def test_weights_as_pickles_are_known_by_pieces_of_the_file(copy, tiny_model):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    first = identify(copy)
    tensors["model.norm.weight"] += 1
    torch.save(tensors, copy / "pytorch_model.bin")
    assert first.differences(identify(copy)) == ["weights"]
    # where both are there, transformers loads the safetensors
    shutil.copy(tiny_model / "model.safetensors", copy)
    assert identify(copy) == identify(tiny_model)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"version https://git-lfs", (2).to_bytes(8, "little") + b"[]"])
def test_a_damaged_file_of_weights_is_another_one_and_no_error(copy, tiny_model, content):
    (copy / "model.safetensors").write_bytes(content)
    assert identify(tiny_model).differences(identify(copy)) == ["weights"]
    (copy / "config.json").write_bytes(content)
    assert "configuration" in identify(tiny_model).differences(identify(copy))


def test_a_sample_misses_what_every_byte_finds(copy, tiny_model):
    known = identify(tiny_model, every_byte=True)
    change_outside_the_sample(copy)
    assert identify(copy) == identify(tiny_model)
    assert known.differences(identify(copy)) == []
    assert known.differences(identify(copy, every_byte=True)) == ["every byte"]


def test_of_ten_gigabytes_some_hundred_pieces_are_read(tmp_path, monkeypatch):
    size, names = 32 << 20, [f"layers.{number}.weight" for number in range(300)]
    entries = {
        name: {"dtype": "BF16", "shape": [4096, 4096], "data_offsets": [size * place, size * (place + 1)]}
        for place, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    with (tmp_path / "model.safetensors").open("wb") as handle:
        handle.write(len(header).to_bytes(8, "little") + header)
        handle.truncate(8 + len(header) + 300 * size)  # a file of holes
    hash_spans, read = base_identity._hash_spans, []
    monkeypatch.setattr(
        base_identity, "_hash_spans", lambda handle, spans: read.extend(spans) or hash_spans(handle, spans)
    )
    began = time.monotonic()
    assert identify(tmp_path).weights
    assert time.monotonic() - began < 1
    assert len(read) == 300
    assert sum(end - begin for begin, end in read) == 300 * base_identity.SAMPLE


def test_a_base_is_found_under_any_spelling(copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    monkeypatch.setenv("HOME", str(copy.parent))
    (copy.parent / "link").symlink_to(copy)
    known = identify(copy)
    for name in ("copy", "copy/", "./copy", "../" + copy.parent.name + "/copy", "~/copy", "~/copy/", "link", str(copy)):
        assert find_identity(name) == known, name
    for name in ("nowhere", "./nowhere", "../nowhere", "/nowhere", "~/nowhere", "a/b/c", "owner/name", "~"):
        assert find_folder(name) in (None, copy.parent), name


def test_a_model_of_the_hub_is_found_in_its_cache(copy, monkeypatch, tmp_path):
    put_into_hub_cache(copy, "owner/name", tmp_path / "hub", monkeypatch)
    assert find_identity("owner/name") == identify(copy)
    assert find_identity("owner/other") is None


def test_the_embedded_model_is_not_converted_to_be_looked_at(copy, monkeypatch, tmp_path):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded_model, "_convert", lambda *_: pytest.fail("it was converted"))
    assert find_folder(embedded_model.NAME) is None
    target = embedded_model._target()
    shutil.copytree(copy, target)
    assert find_identity(embedded_model.NAME) == find_identity(str(target)) == identify(copy)


def test_what_was_recorded_is_read_and_an_unknown_part_differs_from_nothing(tiny_model):
    known = identify(tiny_model)
    assert BaseIdentity.from_record(known.record()) == known
    assert set(known.record()) == {"configuration", "tokenizer", "weights"}
    assert BaseIdentity.from_record(None) is BaseIdentity.from_record({}) is BaseIdentity.from_record([1]) is None
    without_weights = BaseIdentity(known.configuration, known.tokenizer)
    assert known.differences(without_weights) == without_weights.differences(known) == []
    assert without_weights.completed_by(known) == known


def test_a_file_that_cannot_be_read_is_one_message(copy, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(copy / "config.json"))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(StorageError, match=r"config\.json: Permission denied"):
        identify(copy)


def test_a_resident_base_is_known_by_its_identity(copy, tiny_model, monkeypatch):
    load, loaded = resident_base.load_base_model, []
    monkeypatch.setattr(resident_base, "load_base_model", lambda name, **how: loaded.append(name) or load(name, **how))
    resident = ResidentBase()
    first = resident.load(str(tiny_model), device="cpu", dtype="float32")
    again = resident.load(f"{copy}/", device="cpu", dtype="float32")
    assert again.model is first.model
    assert (again.name, loaded) == (f"{copy}/", [str(tiny_model)])
    change_weights(copy, "model.norm.weight", add_one)
    assert resident.load(f"{copy}/", device="cpu", dtype="float32").model is not first.model
    assert loaded == [str(tiny_model), f"{copy}/"]
