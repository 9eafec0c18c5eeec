"""adapter_config.json: PEFT's own is read, and nothing in it can import, fetch, match or point elsewhere."""

from __future__ import annotations

import builtins
import dataclasses
import json
import socket
from typing import Any

import pytest

from fedlora.errors import UsageError
from fedlora.llm import adapter_config
from fedlora.llm.adapter_config import NEUTRAL, AdapterConfig, config_at_rank, load_spec, make_peft_config
from fedlora.llm.lora import LoraSpec

PLAIN: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "v_proj"],
    "peft_type": "LORA",
}
REDOS = "(a+)+$" + "(.*a){20}"

HOSTILE: dict[str, tuple[Any, str]] = {
    "r of a billion": ({"r": 10**9}, "r=1000000000: "),
    "r of 5000 digits": (b'{"r": ' + b"9" * 5000 + b"}", "integer string"),
    "r zero": ({"r": 0}, "r=0: "),
    "r negative": ({"r": -4}, "r=-4: "),
    "r true": ({"r": True}, "r=true: "),
    "r as text": ({"r": "4"}, 'r="4": '),
    "r a fraction": ({"r": 4.5}, "r=4.5: "),
    "r missing": ({"r": ...}, "no field 'r'"),
    "alpha infinite": (b'{"r": 4, "peft_type": "LORA", "target_modules": ["q"], "lora_alpha": 1e999}', "lora_alpha="),
    "alpha NaN": (b'{"r": 4, "peft_type": "LORA", "target_modules": ["q"], "lora_alpha": NaN}', "NaN is not JSON"),
    "alpha zero": ({"lora_alpha": 0}, "lora_alpha=0: "),
    "alpha beyond floats": ({"lora_alpha": 10**400}, "lora_alpha="),
    "dropout one": ({"lora_dropout": 1.0}, "lora_dropout=1.0: "),
    "targets as a pattern": ({"target_modules": REDOS}, "target_modules="),
    "a pattern in the list": ({"target_modules": ["q_proj", REDOS]}, "target_modules="),
    "a path in the list": ({"target_modules": ["../../etc/passwd"]}, "patterns are not read"),
    "no targets": ({"target_modules": []}, "target_modules="),
    "targets null": ({"target_modules": None}, "target_modules="),
    "targets nested": ({"target_modules": [["q_proj"]]}, "target_modules="),
    "20,000 targets": ({"target_modules": [f"q{n}" for n in range(20_000)]}, "target_modules="),
    "bias": ({"bias": "all"}, 'bias="all": '),
    "auto_mapping": (
        {"auto_mapping": {"base_model_class": "os", "parent_library": "os"}},
        "auto_mapping={...} is not supported, only null",
    ),
    "megatron_core": ({"megatron_core": "evil_module"}, 'megatron_core="evil_module" is not supported'),
    "megatron_config": ({"megatron_config": {"a": 1}}, "megatron_config={...} is not supported"),
    "corda_config": ({"corda_config": {"cache_file": "/tmp/evil.pt"}}, "corda_config={...} is not supported"),
    "eva_config": ({"eva_config": {"rho": 2.0}}, "eva_config"),
    "loftq_config": ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
    "another initialisation": ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa"'),
    "initialisation as a number": ({"init_lora_weights": 1}, "init_lora_weights=1 is not supported"),
    "rank_pattern": ({"rank_pattern": {REDOS: 10**9}}, "rank_pattern"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "layer_replication": ({"layer_replication": [[0, 10**9]]}, "layer_replication"),
    "use_dora": ({"use_dora": True}, "use_dora=true"),
    "revision": ({"revision": "refs/pr/1"}, "revision"),
    "another method": ({"peft_type": "PROMPT_TUNING"}, 'peft_type="PROMPT_TUNING"'),
    "another task": ({"task_type": "SEQ_CLS"}, 'task_type="SEQ_CLS"'),
    "an unknown field": ({"post_load_hook": "evil.run"}, "unknown field 'post_load_hook'"),
    "a field of a later PEFT": ({"use_future_lora": False}, "unknown field 'use_future_lora'"),
    "a field twice": (b'{"r": 4, "r": 1000000000}', "'r' is given twice"),
    "a long base": ({"base_model_name_or_path": "x" * 5000}, "base_model_name_or_path"),
    "deep nesting": (b"[" * 100_000, "recursion"),
    "deep nesting in a field": (b'{"corda_config": ' + b'{"a":' * 900 + b"1" + b"}" * 901, "corda_config"),
    "a list": (b"[]", "not an object"),
    "nothing": (b"", "Expecting value"),
    "no UTF-8": (b"\xff\xfe", "utf-8"),
    "two megabytes": (b" " * (2 << 20), "larger than"),
}


def written(folder, change: Any):
    path = folder / "adapter_config.json"
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        value = {name: item for name, item in {**PLAIN, **change}.items() if item is not ...}
        path.write_text(json.dumps(value), encoding="utf-8")
    return path


@pytest.fixture
def nothing_reaches_out(monkeypatch):
    """Neither an import nor a connection while a configuration is read; returns what was tried."""
    tried: list[str] = []
    really_import = builtins.__import__

    def importing(name, *arguments, **options):
        tried.append(name)
        return really_import(name, *arguments, **options)

    def connecting(*arguments, **options):
        raise AssertionError(f"connects to {arguments}")

    monkeypatch.setattr(builtins, "__import__", importing)
    monkeypatch.setattr(socket, "create_connection", connecting)
    monkeypatch.setattr(socket.socket, "connect", connecting)
    return tried


def test_a_hostile_configuration_is_refused_by_file_and_field(tmp_path, nothing_reaches_out, subtests):
    for name, (change, message) in HOSTILE.items():
        with subtests.test(name):
            path = written(tmp_path, change)
            nothing_reaches_out.clear()
            with pytest.raises(UsageError) as caught:
                load_spec(path)
            tried = {name.split(".")[0] for name in nothing_reaches_out}
            assert str(caught.value).startswith(f"{path}: not a LoRA configuration (")
            assert message in str(caught.value)
            assert len(str(caught.value)) < 400 + len(str(path))
            assert "target_modules" in caught.value.hint
            assert not tried & {"evil_module", "evil", "peft", "megatron"}


@pytest.mark.parametrize(
    "base", ["http://evil.example/model", "../../etc", "evil/model", "\x1b[2J", "x" * 4000, "smollm2-135m"]
)
def test_another_base_model_is_said_and_never_followed(tmp_path, capsys, base, nothing_reaches_out):
    path = written(tmp_path, {"base_model_name_or_path": base})
    spec = load_spec(path, base_model="smollm2-135m")
    shown = capsys.readouterr().err
    assert (spec.r, spec.scaling) == (4, 4.0)
    if base == "smollm2-135m":
        assert shown == ""
    else:
        assert "smollm2-135m is used" in shown
        assert "\x1b" not in shown
        assert len(shown) < 300 + len(str(path))


def test_what_is_written_is_what_is_read(tmp_path):
    for spec in (
        LoraSpec(4, 16.0, 4.0, 0.05, ("q_proj", "v_proj")),
        LoraSpec(4096, 0.5, 0.5 / 64, 0.0, ("model.layers.0.mlp.up_proj",), use_rslora=True),
    ):
        text = make_peft_config(spec, "base", fan_in_fan_out=True, targets=spec.target_modules)
        assert load_spec(written(tmp_path, text.encode())) == spec


@pytest.mark.parametrize("is_rslora", [False, True])
def test_an_adapter_of_another_rank_keeps_its_scaling(tmp_path, is_rslora):
    spec = LoraSpec(3, 16, 16 / (3**0.5 if is_rslora else 3), 0.0, ("q_proj",), is_rslora)
    text = make_peft_config(spec, "base", fan_in_fan_out=False, targets=spec.target_modules)
    assert config_at_rank(text, 3) == text
    for rank in (1, 6, 250):
        (tmp_path / "adapter_config.json").write_text(config_at_rank(text, rank))
        found = load_spec(tmp_path / "adapter_config.json")
        assert found.r == rank
        assert found.scaling == pytest.approx(spec.scaling, rel=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
        {"r": 8, "target_modules": {"k_proj", "o_proj", "q_proj"}, "lora_dropout": 0.1, "use_rslora": True},
        {"r": 1, "target_modules": "all-linear", "base_model_name_or_path": "some/base", "inference_mode": True},
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": "gaussian"},
    ],
)
def test_what_peft_writes_is_read(tmp_path, options):
    from peft import LoraConfig

    peft_config = LoraConfig(**options)
    peft_config.save_pretrained(str(tmp_path))
    spec = load_spec(tmp_path / "adapter_config.json")
    wanted = options["target_modules"]
    assert sorted(spec.target_modules) == ([wanted] if isinstance(wanted, str) else sorted(wanted))
    scaling = peft_config.lora_alpha / (peft_config.r**0.5 if peft_config.use_rslora else peft_config.r)
    assert (spec.r, spec.dropout, spec.use_rslora) == (
        peft_config.r,
        peft_config.lora_dropout,
        peft_config.use_rslora,
    )
    assert spec.scaling == pytest.approx(scaling)


def test_every_field_of_the_installed_peft_is_known_at_its_default():
    """A field that a newer PEFT adds fails here first: it then gets a meaning, or a neutral value."""
    from peft import LoraConfig

    default = LoraConfig()
    fields = {field.name for field in dataclasses.fields(LoraConfig)} - {"runtime_config"}
    assert fields - set(AdapterConfig.model_fields) == fields & NEUTRAL.keys()
    assert all(getattr(default, name) in NEUTRAL[name] for name in fields & NEUTRAL.keys())


def test_each_neutral_value_is_accepted_and_nothing_else_in_its_place(tmp_path):
    for name, values in NEUTRAL.items():
        for value in values:
            assert load_spec(written(tmp_path, {name: value})).r == 4
        with pytest.raises(UsageError, match=f"{name}="):
            load_spec(written(tmp_path, {name: "something else"}))


def test_a_configuration_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"adapter_config\.json: no such file"):
        load_spec(tmp_path / "adapter_config.json")


def test_a_file_beyond_the_limit_is_not_read_whole(tmp_path):
    path = tmp_path / "adapter_config.json"
    with path.open("wb") as handle:
        handle.truncate(20 << 30)
    with pytest.raises(UsageError, match=f"larger than {adapter_config.MOST_BYTES} bytes"):
        load_spec(path)
