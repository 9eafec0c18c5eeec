"""What other programs read of an exported folder is what the run answers with; nothing is left half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_bases import make_base
from huggingface_hub import ModelCard
from tiny_run import make_client_files, options_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedlora as fl
from fedlora.config.export import ExportConfig
from fedlora.config.prompting import PromptSettings
from fedlora.config.train import TrainConfig
from fedlora.errors import StorageError, UsageError
from fedlora.exporting.load_commands import loading_commands
from fedlora.federated.adapters import layer_pairs
from fedlora.llm import gguf_tensors, merging
from fedlora.llm.adapter_files import load_adapter, read_shapes
from fedlora.llm.base_model import load_base_model
from fedlora.llm.lora import KEY_PREFIX, LoraModel
from fedlora.llm.prompts import PromptEncoder
from fedlora.llm.serving_template import make_serving_template
from fedlora.paths import RunPaths
from fedlora.rows import Row, Turn
from fedlora.runs.base_chain import load_base
from fedlora.stages import export, train

IDS = torch.tensor([[1, 40, 41, 300, 42, 43, 44, 45, 200, 46, 2, 1]])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of FedAvg, of FedEx-LoRA and with ranks of the clients' own, on a small Llama."""
    root = tmp_path_factory.mktemp("exports")
    base, data = make_base("llama", root / "base"), make_client_files(root / "data", [4, 4, 4, 4])
    more: dict[str, Any] = {"lora_target_modules": "all-linear", "num_communication_rounds": 2, "lora_alpha": 24}
    settings = {"homo": {}, "fedex": {}, "zeropad": {"client_ranks": (4, 2, 1, 2)}}
    for name, own in settings.items():
        options = options_of(name, base, data, root / "models") | more | own
        train.run(TrainConfig.of(**{**options, "exp_name": name}))
    return root


def exported(place: Path, to: Path, name: str = "homo", **settings: Any) -> export.Export:
    fields = {"exp_name": name, "model_dir": place / "models", "to": to, **settings}
    return export.run(ExportConfig.of(**fields))


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits[0]


def our_logits(place: Path, name: str = "homo", who: str = "") -> torch.Tensor:
    """What the run's own layers compute; a client of a method that adds to the base stands on its additions."""
    folder = place / "models" / name / "2" / who
    file = folder / ("adapter_model.bin" if who else "global_adapter_model.bin")
    state, facts = load_adapter(file, read_shapes(file)), json.loads((folder / "adapter_config.json").read_text())
    base = load_base_model(str(place / "base"), device="cpu", dtype="float32")
    lora = LoraModel(base.model, merging_spec(facts))
    additions = load_base(RunPaths(place / "models", name), 1) if who else None
    lora.set_background(additions.background if additions else None)
    lora.set_adapter(state)
    return logits_of(base.model)


def merging_spec(facts: dict[str, Any]) -> Any:
    from fedlora.llm.lora import LoraSpec

    scaling = facts["lora_alpha"] / facts["r"]
    return LoraSpec(facts["r"], facts["lora_alpha"], scaling, 0.0, tuple(facts["target_modules"]))


@pytest.mark.parametrize(("name", "who"), [("homo", ""), ("fedex", ""), ("fedex", "client_2"), ("zeropad", "client_1")])
def test_a_merged_model_answers_as_the_run_does(place, tmp_path, name, who):
    settings = {"of_subjects": who.removeprefix("client_")} if who else {}
    found = exported(place, tmp_path / "out", name, format="merged", **settings)
    model = AutoModelForCausalLM.from_pretrained(found.folder)
    assert model.generation_config.eos_token_id == [2]
    base = logits_of(AutoModelForCausalLM.from_pretrained(place / "base"))
    torch.testing.assert_close(logits_of(model), our_logits(place, name, who), atol=1e-3, rtol=1e-4)
    assert (logits_of(model) - base).abs().max() > 0.1, "the adapter says nothing"


def test_a_whole_gguf_is_read_back_by_transformers_as_the_merged_model(place, tmp_path):
    found = exported(place, tmp_path / "out", format="gguf")
    model = AutoModelForCausalLM.from_pretrained(found.folder, gguf_file="model.gguf")
    # its reader knows llama3's positions only from the configuration
    model.config.rope_parameters = AutoModelForCausalLM.from_pretrained(place / "base").config.rope_parameters
    merged = AutoModelForCausalLM.from_pretrained(exported(place, tmp_path / "merged", format="merged").folder)
    read = {name: value for name, value in model.named_parameters() if "proj.bias" not in name}
    for name, value in merged.named_parameters():
        if name in read:
            torch.testing.assert_close(read[name], value, msg=name)
    assert len(read) > 15


def test_a_lora_gguf_holds_the_update_in_llama_cpp_s_order_of_rows_and_with_its_alpha(place, tmp_path):
    found = exported(place, tmp_path / "out", format="gguf-lora")
    reader = gguf.GGUFReader(found.folder / "adapter.gguf")
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    assert reader.fields["general.architecture"].contents() == "llama"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    whole = AutoModelForCausalLM.from_pretrained(exported(place, tmp_path / "merged", format="merged").folder)
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    places = {"attn_q": ("self_attn.q_proj", 4), "attn_k": ("self_attn.k_proj", 2), "ffn_down": ("mlp.down_proj", 0)}
    for short, (long, heads) in places.items():
        a, b = (tensors[f"blk.1.{short}.weight.lora_{half}"] for half in "ab")
        update = alpha / len(a) * (b @ a)
        if heads:
            update = interleaved_to_halves(update, heads)
        name = f"model.layers.1.{long}"
        wanted = whole.get_submodule(name).weight - base.get_submodule(name).weight
        torch.testing.assert_close(update, wanted, atol=1e-6, rtol=1e-3, msg=short)


def interleaved_to_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """From llama.cpp's order to transformers', written by places: number 2i + j of a head is number j * half + i."""
    width = len(rows) // heads
    places = [
        head * width + 2 * (place % (width // 2)) + place // (width // 2)
        for head in range(heads)
        for place in range(width)
    ]
    return rows[places]


def test_the_adapter_of_a_client_with_a_rank_of_its_own_keeps_the_scaling(place, tmp_path):
    found = exported(place, tmp_path / "out", "zeropad", of_subjects="1")
    facts = json.loads((found.folder / "adapter_config.json").read_text())
    assert (facts["r"], facts["lora_alpha"]) == (2, 12)
    assert facts["base_model_name_or_path"] == str((place / "base").absolute())
    lora = exported(place, tmp_path / "gguf", "zeropad", of_subjects="1", format="gguf-lora")
    assert gguf.GGUFReader(lora.folder / "adapter.gguf").fields["adapter.lora.alpha"].contents() == 12


def test_additions_to_the_base_are_exact_in_an_adapter_of_a_higher_rank_and_a_limit_states_its_error(place, tmp_path):
    found = exported(place, tmp_path / "out", "fedex")
    assert found.record["rank"] > 4
    assert found.record["relative_error"] == 0
    assert "nothing is lost" in found.text()
    limited = exported(place, tmp_path / "limited", "fedex", export_rank=3)
    whole, cut = (
        {key: value.double() for key, value in load_adapter(file, header_shapes(file)).items()}
        for file in (one.folder / "adapter_model.safetensors" for one in (found, limited))
    )
    for one in (found, limited):
        facts = json.loads((one.folder / "adapter_config.json").read_text())
        assert (facts["r"], facts["lora_alpha"] / facts["r"]) == (one.record["rank"], 6)
    pairs = layer_pairs(whole).values()
    # alpha / r is the same in both
    lost = sum(float((whole[b] @ whole[a] - cut[b] @ cut[a]).square().sum()) for a, b in pairs)
    size = sum(float((whole[b] @ whole[a]).square().sum()) for a, b in pairs)
    assert limited.record["rank"] == 3
    assert limited.record["relative_error"] == pytest.approx((lost / size) ** 0.5, rel=1e-3)
    assert f"lacks {limited.record['relative_error']:.2%}" in limited.text()
    with pytest.raises(UsageError, match="export_rank=2: the adapter of global has rank 4"):
        exported(place, tmp_path / "none", export_rank=2)


def header_shapes(file: Path) -> Any:
    from safetensors import safe_open

    with safe_open(file, "pt") as handle:
        return {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118


def test_rounding_to_bfloat16_says_what_it_lost_layer_by_layer(place, tmp_path):
    found = exported(place, tmp_path / "out", format="merged", dtype="bfloat16")
    total, layers = found.record["rounding"]["all"], found.record["rounding"]["layers"]
    assert len(layers) == 14
    exact = exported(place, tmp_path / "exact", format="merged").record["rounding"]["all"]
    assert exact["lost_share"] < 1e-3 < 0.05 < total["lost_share"]
    assert f"{total['unchanged_share']:.1%} of the entries" in found.text()
    model = AutoModelForCausalLM.from_pretrained(found.folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    name = layers[0]["layer"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "exact").get_submodule(name).weight
    base = AutoModelForCausalLM.from_pretrained(place / "base").get_submodule(name).weight
    # rounded once: adding in bfloat16 gives other numbers
    torch.testing.assert_close(model.get_submodule(name).weight, merged.bfloat16(), rtol=0, atol=0)
    same = (base.bfloat16() == merged.bfloat16()).double().mean()
    assert layers[0]["unchanged_share"] == pytest.approx(float(same))


def test_a_layer_that_shares_its_weight_with_the_embedding_is_merged_alone(tmp_path):
    folder = make_base("qwen3", tmp_path / "base")
    model = merging.load_exact_base(str(folder), "none", trust_remote_code=False)
    before = model.get_input_embeddings().weight.clone()
    size, width = before.shape
    key = f"{KEY_PREFIX}lm_head"
    adapter = {f"{key}.lora_A.weight": torch.ones(1, width), f"{key}.lora_B.weight": torch.ones(size, 1)}
    merging.merge_adapter(model, adapter, 0.5, torch.float32)
    assert torch.equal(model.get_input_embeddings().weight, before)
    torch.testing.assert_close(model.lm_head.weight, before + 0.5)
    merging.save_merged(model, tmp_path / "out", stop_ids=(2,))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again.lm_head.weight, before + 0.5)


def test_kinds_of_models_and_tokenizers_that_are_not_known_as_gguf_are_refused_in_one_sentence(
    place, tmp_path, tiny_model
):
    from transformers import GPT2Config

    with pytest.raises(UsageError, match="a model of the type 'gpt2' is not written as GGUF; these are: llama"):
        gguf_tensors.TensorNames(GPT2Config())
    data = make_client_files(tmp_path / "data", [4, 4])
    options = options_of("homo", tiny_model, data, tmp_path / "models") | {"num_clients": 2}
    train.run(TrainConfig.of(**{**options, "num_communication_rounds": 1}))
    with pytest.raises(UsageError, match="joins no bytes"):
        exported(tmp_path, tmp_path / "out", "run", format="gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "models"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"of_subjects": "7"}, "run homo has no client 7"),
        ({"of_subjects": "nobody"}, "'nobody' is not in run homo"),
        ({"communication_rounds": 9}, "9: no global adapter; rounds 1-2 have one"),
        ({"exp_name": "other"}, "no run of this name"),
        ({"base_model": "gone"}, "base_model='gone'"),
    ],
)
def test_what_is_not_there_is_one_error_and_leaves_nothing(place, tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        exported(place, tmp_path / "out", **{"name": settings.pop("exp_name", "homo"), **settings})
    assert not list(tmp_path.iterdir())


def test_another_base_is_refused(place, tmp_path):
    other = make_base("mistral", tmp_path / "other")
    with pytest.raises(UsageError, match="is not the base that run homo was trained on"):
        exported(place, tmp_path / "out", base_model=str(other))
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_folder_with_something_in_it_is_not_touched(place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UsageError, match="is not an empty folder"):
        exported(place, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    exported(place, tmp_path / "out2")


@pytest.mark.parametrize("format", ["peft", "merged", "gguf-lora", "gguf"])
def test_a_full_disk_is_one_error_and_leaves_nothing(place, tmp_path, monkeypatch, format):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    module = "fedlora.exporting.formats"
    for name in ("write_bytes", "save_merged", "write_lora", "write_model"):
        monkeypatch.setattr(f"{module}.{name}", refuse)
    with pytest.raises(StorageError, match="No space left"):
        exported(place, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match=r"needs .* MB, and 0 MB are free"):
        exported(place, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


def test_the_card_says_what_was_trained_and_shows_no_row_and_its_metadata_is_read_by_the_hub_s_library(place, tmp_path):
    scores = {
        "overall": {"exact": {"mean": 0.25, "interval": [0.1, 0.4]}, "rougeL": {"mean": 0.5, "interval": [0.4, 0.6]}}
    }
    file = tmp_path / "scores" / "homo" / "2" / "global_scores.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(scores))
    found = exported(place, tmp_path / "out", license="apache-2.0", evaluation_dir=tmp_path / "scores")
    card = ModelCard.load(found.folder / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "peft")
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["exact_match"].metric_value == 0.25
    assert results["rouge"].metric_args == {"interval": [0.4, 0.6]}
    for text in (
        "FedAvg",
        "round 2 of 2",
        "4 clients with 12 rows",
        "0.250 | 0.100 to 0.400",
        "No differential privacy",
    ):
        assert text in card.text, text
    for text in ("say north", "local_training", "| c0"):
        assert text not in card.text, text


def test_the_modelfile_frames_prompts_as_the_run_and_ends_answers_at_its_stops(place, tmp_path):
    found = exported(place, tmp_path / "out", format="gguf-lora")
    lines = (found.folder / "Modelfile").read_text()
    assert f"FROM {(place / 'base').absolute()}\nADAPTER ./adapter.gguf\n" in lines
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n{{ else }}" in lines
    assert "{{ .Content }}<|im_end|>\n<|im_start|>assistant\n" in lines
    assert set(found.commands) == {"Ollama", "llama.cpp"}


TEMPLATE = (
    "{{ strftime_now('%d %b %Y') }}|{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}"
    "{% if thinking %}!{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        (PromptSettings("chat"), [Row("one", "", "-", ""), Row("two", "", "-", "", (Turn("system", "be short"),))]),
        (PromptSettings("alpaca"), [Row("say {{ x }}\n", "", "-", "")]),
        (PromptSettings("own.jinja", TEMPLATE, {"thinking": True}, "2026-01-31"), [Row("one", "", "-", "")]),
    ],
)
def test_the_exported_chat_template_writes_the_prompts_that_the_run_trained_on(tmp_path, place, settings, rows):
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    encoder = PromptEncoder(tokenizer, settings)
    template = make_serving_template(encoder)
    for row in rows:
        messages = [{"role": turn.role, "content": turn.content} for turn in row.turns[:-1]]
        ids = tokenizer.apply_chat_template(messages, chat_template=template.jinja, add_generation_prompt=True)[
            "input_ids"
        ]
        assert ids == encoder.question(row, cutoff=400, context=None, max_new_tokens=1).ids
    if settings.template == "alpaca":
        assert "\n### Instruction:" in template.stops
        with pytest.raises(Exception, match="single questions"):
            tokenizer.apply_chat_template([{"role": "system", "content": "a"}], chat_template=template.jinja)


def test_a_run_object_exports_and_the_command_line_says_what_one_adapter_is(place, tmp_path):
    found = fl.open(place / "models" / "homo").export(tmp_path / "out", format="peft", progress=False)
    assert found.as_dict()["folder"] == str(tmp_path / "out")
    assert set(found.commands) == {"transformers", "vLLM"}
    assert "--max-lora-rank 8 --lora-modules homo=" in found.commands["vLLM"]
    with pytest.raises(UsageError, match="one adapter is exported at a time"):
        ExportConfig.of(exp_name="homo", of_subjects="all")
    with pytest.raises(UsageError, match="base has none: give format=gguf"):
        ExportConfig.of(exp_name="homo", of_subjects="base")


def test_a_base_that_reads_images_is_loaded_by_a_class_of_its_own():
    subject = {"paths": SimpleNamespace(exp_name="run"), "template": SimpleNamespace(stop_ids=(2,)), "rank": 8}
    wrapped: Any = SimpleNamespace(loader="AutoModelForImageTextToText", base_name="/base", **subject)
    script = loading_commands(wrapped, "peft", "/adapter")["transformers"]
    assert "PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained('/base'), folder)" in script
    compile(script, "script", "exec")
    script = loading_commands(wrapped, "merged", "/x")["transformers"]
    assert "model = AutoModelForImageTextToText.from_pretrained(folder)" in script
