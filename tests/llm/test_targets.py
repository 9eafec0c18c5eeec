import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fedlora import cli
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.llm.adapter_config import make_peft_config
from fedlora.llm.adapter_files import to_safetensors
from fedlora.llm.base_model import load_base_model
from fedlora.llm.lora import LoraModel, LoraSpec, is_fan_in_fan_out
from fedlora.llm.targets import find_targets

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=2),
    "lfm2": lambda: transformers.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    "llama4": lambda: transformers.Llama4TextConfig(
        **{**SMALL, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 24}
    ),
    "phimoe": lambda: transformers.PhimoeConfig(**SMALL, num_local_experts=2),
    "falcon_h1": lambda: transformers.FalconH1Config(
        **{**SMALL, "head_dim": 8},
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
    ),
    "gemma3": lambda: transformers.Gemma3Config(
        text_config={**SMALL, "head_dim": 8}, vision_config=VISION, mm_tokens_per_image=4
    ),
}


def make(kind: str):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()


def spec_of(*targets: str) -> LoraSpec:
    return LoraSpec(2, 4.0, 2.0, 0.0, targets)


def names_of(model, *targets: str) -> list[str]:
    return [layer.name for layer in find_targets(model, targets).layers]


def ends_of(names) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], r"model\.layers\.[01]\.self_attn\.q_proj"),
        (["self_attn.q_proj", "mlp.up_proj"], r".*(q_proj|up_proj)"),
        (["model.layers.1.mlp.down_proj"], r"model\.layers\.1\.mlp\.down_proj"),
        (["model.layers.*.self_attn.q_proj"], r".*q_proj"),
        (["layers.*.self_attn.?_proj"], r".*self_attn.*"),
        (["*.mlp.*"], r".*\.mlp\..*"),
        ([r"re:model\.layers\.1\..*\.[qv]_proj"], r"model\.layers\.1\..*\.[qv]_proj"),
        (["re:.*(gate|up)_proj", "k_proj"], r".*(gate|up|k)_proj"),
        (["all-linear"], r".*_proj"),
    ],
)
def test_targets_are_names_paths_with_wildcards_and_regular_expressions(targets, expected):
    model = make("llama")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    wanted = [name for name in linear if re.fullmatch(expected, name)]
    assert wanted
    assert names_of(model, *targets) == wanted


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("q_proj,v_proj", ("q_proj", "v_proj")),
        ("[v_proj, 'q_proj']", ("q_proj", "v_proj")),
        (["v_proj,q_proj", "k_proj"], ("k_proj", "q_proj", "v_proj")),
        (r"re:.*\.\d{1,2}\.[qv]_proj", (r"re:.*\.\d{1,2}\.[qv]_proj",)),
        ("q_proj, re:.*(k|v)_[a-z]", ("q_proj", "re:.*(k|v)_[a-z]")),
        (["re:a{1,2}", "q_proj"], ("q_proj", "re:a{1,2}")),
    ],
)
def test_an_expression_keeps_its_commas_and_brackets(given, expected):
    assert TrainConfig.of(lora_target_modules=given).lora_target_modules == expected


@pytest.mark.parametrize("given", ["re:(", "re:*", "", [], "x" * 1001, ["x"] * 10_001])
def test_what_is_no_target_is_refused_before_a_model_is_loaded(given):
    with pytest.raises(UsageError, match="lora_target_modules"):
        TrainConfig.of(lora_target_modules=given)


@pytest.mark.parametrize(
    ("target", "parts", "hint"),
    [
        ("q_prj", ["q_prj"], "did you mean q_proj?"),
        ("embed_tokens", ["embed_tokens", "a Embedding"], "this model has"),
        ("lm_head", ["lm_head", "a Linear"], "this model has"),
        ("*.attn.*", ["*.attn.*"], "this model has"),
        ("re:q_proj", ["re:q_proj"], "this model has"),
    ],
)
def test_a_target_that_fits_no_linear_layer_is_an_error_with_the_names_there_are(target, parts, hint):
    with pytest.raises(UsageError) as caught:
        find_targets(make("llama"), ("q_proj", target))
    assert all(part in str(caught.value) for part in parts)
    assert hint in caught.value.hint
    assert "down_proj" in caught.value.hint


def test_expert_weights_in_one_tensor_are_named_as_such():
    with pytest.raises(UsageError, match="gate_up_proj is a weight outside linear layers"):
        find_targets(make("mixtral"), ("gate_up_proj",))


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (
            "mixtral",
            ["model.layers.*.mlp.experts (MixtralExperts)", "mlp.gate (MixtralTopKRouter)", "% of the weights"],
        ),
        ("lfm2", ["model.layers.*.conv.conv (Conv1d)"]),
        ("phimoe", ["model.layers.*.mlp.router (2 layers that text does not pass through)"]),
        ("llama", []),
    ],
)
def test_all_linear_says_which_kinds_it_leaves_out(kind, parts):
    left_out = " ".join(find_targets(make(kind), ("all-linear",)).notes)
    assert all(part in left_out for part in parts), left_out
    assert bool(left_out) == bool(parts)


def test_the_tower_of_a_wrapper_is_left_out_and_peft_gets_the_paths_of_the_others():
    model = make("gemma3")
    found = find_targets(model, ("q_proj", "v_proj"))
    names = [layer.name for layer in found.layers]
    assert len(names) == 4
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert found.peft_names == sorted(names)
    assert found.notes == ["not adapted: model.vision_tower (4 layers that text does not pass through)"]
    with pytest.raises(UsageError, match=r"\*\.vision_tower\.\* can get no gradient"):
        find_targets(model, ("q_proj", "*.vision_tower.*"))


def test_a_layer_whose_weight_other_code_multiplies_by_is_left_out_by_name_too():
    model = make("falcon_h1")
    found = find_targets(model, ("all-linear",))
    assert "out_proj" not in ends_of(layer.name for layer in found.layers)
    assert {"in_proj", "q_proj", "down_proj"} <= ends_of(layer.name for layer in found.layers)
    assert "mamba.out_proj (2 layers whose weight the model's code multiplies by itself)" in found.notes[0]
    with pytest.raises(UsageError, match="out_proj can get no gradient"):
        find_targets(model, ("out_proj",))


def test_layers_that_share_a_name_with_experts_in_one_tensor_are_named_because_peft_mistakes_them():
    config = transformers.DeepseekV3Config(
        **SMALL, n_routed_experts=2, n_group=1, topk_group=1, num_experts_per_tok=1, moe_intermediate_size=8,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert "PEFT may take down_proj, gate_proj, up_proj" in find_targets(model, ("all-linear",)).notes[-1]
    assert find_targets(model, ("q_a_proj",)).notes == []


class Detached(nn.Module):
    """Passes text through a layer, and no gradient back."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).detach()


class Packed(nn.Linear):
    """Changes its weight in training, which the whole numbers of a packed one do not take, as Gemma 3n does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise RuntimeError("result type Float can't be cast\nmore")
        return super().forward(input)


def test_a_model_whose_training_fails_is_refused_with_the_reason():
    model = make("llama")
    model.model.layers[1].mlp.up_proj = Packed(16, 24, bias=False)
    with pytest.raises(UsageError, match=r"cannot be trained: .*fails \(result type Float can't be cast\)"):
        find_targets(model, ("q_proj",))
    assert not model.training
    assert not any(module._forward_hooks for module in model.modules())


class OneExpert(nn.Module):
    """Two experts of which these tokens take the first."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[0](x)


def test_a_target_without_a_gradient_is_an_error_that_names_it():
    model = make("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj = Detached(layer.self_attn.q_proj)
    with pytest.raises(UsageError, match=r"q_proj\.inner can get no gradient.*self_attn\.q_proj"):
        find_targets(model, ("v_proj", "q_proj.inner"))
    assert "inner" not in ends_of(names_of(model, "all-linear"))


def test_experts_that_no_token_of_the_probe_takes_are_adapted_like_those_it_takes():
    model = make("llama")
    model.model.layers[0].mlp = OneExpert()
    names = names_of(model, "all-linear")
    assert {"model.layers.0.mlp.experts.0", "model.layers.0.mlp.experts.1"} <= set(names)


def test_finding_targets_leaves_no_trace():
    model = make("mixtral")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    find_targets(model, ("all-linear",))
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["llama4", "falcon_h1", "mixtral", "gemma3"])
def test_every_adapted_layer_of_any_model_gets_a_gradient_and_changes_the_answer(kind):
    """Llama 4 adds to the output of a layer in place, Falcon-H1 asks layers for the type of their weight."""
    model = make(kind)
    lora = LoraModel(model, spec_of("all-linear"))
    generator = torch.Generator().manual_seed(1)
    state = {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in lora.shapes().items()}
    lora.set_adapter(state)
    text = model.get_decoder() if kind == "gemma3" else model
    ids = torch.arange(3, 15)[None]
    with lora.train_mode():
        found = text(input_ids=ids, use_cache=False)[0]
        found.float().square().sum().backward()
    without = {key for key, factor in lora.named_factors() if factor.grad is None or not factor.grad.abs().max() > 0}
    assert not without
    lora.set_adapter(None)
    with torch.no_grad():
        assert not torch.allclose(text(input_ids=ids, use_cache=False)[0], found)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("falcon_h1", ("all-linear",)),
        ("gemma3", ("q_proj", "v_proj")),
        ("llama", (r"re:model\.layers\.1\..*", "layers.0.mlp.*")),
    ],
)
def test_peft_loads_an_adapter_of_exactly_the_layers_that_were_meant(kind, targets, tmp_path):
    from peft import PeftModel

    model, theirs = make(kind), make(kind)
    lora = LoraModel(model, spec_of(*targets))
    generator = torch.Generator().manual_seed(1)
    state = {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in lora.shapes().items()}
    lora.set_adapter(state)
    text = make_peft_config(lora.spec, "base", fan_in_fan_out=is_fan_in_fan_out(model), targets=lora.peft_names)
    (tmp_path / "adapter_config.json").write_text(text)
    (tmp_path / "adapter_model.safetensors").write_bytes(to_safetensors(state))
    loaded = PeftModel.from_pretrained(theirs, str(tmp_path)).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, loaded(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_run_with_an_expression_says_its_layers_to_peft_and_answers(
    tiny_model, tmp_path, make_clients, test_file, capsys
):
    data = make_clients([2])
    arguments = (
        f"train --base_model {tiny_model} --base_dtype float32 --device cpu --data_path {data} "
        f"--model_dir {tmp_path}/m --exp_name r --num_clients 1 --num_communication_rounds 1 --prompt_template chat "
        "--client_selection_frac 1 "
        r"--target_modules mlp.up_proj,re:.*\.layers\.1\.self_attn\.(q|v)_proj"
    )
    assert cli.main(arguments.split()) == 0, capsys.readouterr().err
    folder = tmp_path / "m" / "r"
    config = json.loads((folder / "1" / "adapter_config.json").read_text())
    expected = ["0.mlp.up_proj", "1.mlp.up_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"]
    assert config["target_modules"] == [f"model.layers.{name}" for name in expected]
    generate = f"generate r --model_dir {tmp_path}/m --test {test_file} --prediction_dir {tmp_path}/p --device cpu"
    assert cli.main([*generate.split(), "--max_new_tokens", "2"]) == 0, capsys.readouterr().err
    assert cli.main(["verify", "r", "--model_dir", f"{tmp_path}/m"]) == 0, capsys.readouterr().err


def test_a_multimodal_base_trains_and_answers_as_a_text_model_with_its_tower_as_it_was(
    tmp_path, tiny_model, make_clients, test_file, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = transformers.Gemma3Config(
        text_config={**SMALL, "vocab_size": 259, "head_dim": 8, "max_position_embeddings": 256},
        vision_config=VISION, mm_tokens_per_image=4, image_token_index=250, boi_token_index=251, eoi_token_index=252,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("gemma3")
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained("gemma3")
    make_clients([2, 2])
    commands = (
        "train --base_model gemma3 --base_dtype float32 --device cpu --exp_name r --num_clients 2 --min_clients 2 "
        "--num_communication_rounds 1 --client_selection_frac 1 --prompt_template chat --local_learning_rate 0.01",
        f"generate r --of base,global --test {test_file} --max_new_tokens 3 --device cpu",
        f"loss r --of base,global --test {test_file} --device cpu",
        "verify r",
    )
    for command in commands:
        assert cli.main(command.split()) == 0, capsys.readouterr().err
    names = json.loads((tmp_path / "models/r/1/adapter_config.json").read_text())["target_modules"]
    assert len(names) == 4
    assert all(name.startswith("model.language_model.layers.") for name in names)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("mamba", "bfloat16"),
        ("mixtral", "float32"),
        pytest.param("mamba", "float32", marks=pytest.mark.thorough),
        pytest.param("mixtral", "bfloat16", marks=pytest.mark.thorough),
    ],
)
def test_states_and_experts_of_other_models_are_planned_trained_and_answered_in_both_types(
    kind, dtype, tmp_path, tiny_model, make_clients, test_file, capsys, monkeypatch
):
    """Mamba's states are float32 in front of an output layer in bfloat16; kernels for experts mind their strides."""
    monkeypatch.chdir(tmp_path)
    sizes: dict[str, Any] = {**SMALL, "vocab_size": 259, "hidden_size": 32, "max_position_embeddings": 256}
    config = {
        "mamba": lambda: transformers.MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=1, state_size=4),
        "mixtral": lambda: transformers.MixtralConfig(**sizes, num_local_experts=4),
    }[kind]()
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("base")
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained("base")
    make_clients([1, 1])
    train = (
        "train --base_model base --device cpu --exp_name r --num_clients 2 --min_clients 2 --client_selection_frac 1 "
        f"--num_communication_rounds 1 --prompt_template chat --target_modules all-linear --base_dtype {dtype}"
    )
    commands = (
        train.replace("train", "plan", 1) + " --probe false",
        train,
        f"generate r --of base,global --test {test_file} --max_new_tokens 2 --device cpu --base_dtype {dtype}",
        f"loss r --of base,global --test {test_file} --device cpu --base_dtype {dtype}",
    )
    for command in commands:
        assert cli.main(command.split()) == 0, capsys.readouterr().err


def test_training_says_once_what_is_not_adapted(tmp_path, tiny_model, make_clients, capsys):
    base = tmp_path / "mixtral"
    transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**{**SMALL, "vocab_size": 259}, num_local_experts=2)
    ).save_pretrained(base)
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    data = make_clients([1])
    for command in ("plan", "train"):
        arguments = (
            f"{command} --base_model {base} --base_dtype float32 --device cpu --data_path {data} --exp_name r "
            f"--model_dir {tmp_path}/m --num_clients 1 --num_communication_rounds 1 --prompt_template chat "
            "--client_selection_frac 1 --target_modules all-linear --cutoff_len 48"
        )
        assert cli.main(arguments.split()) == 0, capsys.readouterr().err
        told = capsys.readouterr().err
        assert told.count("not adapted: ") == 1
        assert "MixtralExperts" in told


def test_a_quantised_base_has_the_same_targets(tiny_model):
    pytest.importorskip("bitsandbytes")
    dense = load_base_model(str(tiny_model), device="cpu", dtype="float32").model
    packed = load_base_model(str(tiny_model), device="cpu", dtype="float32", quantization="nf4").model
    for targets in (("all-linear",), ("*.mlp.*",), ("re:.*q_proj",)):
        assert names_of(dense, *targets) == names_of(packed, *targets)
        assert find_targets(packed, targets).notes == []


def test_the_help_names_every_form(capsys):
    assert cli.main(["train", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "names (q_proj), paths (*.mlp.*), re: with a regular expression" in told


def test_an_adapter_config_of_someone_else_still_holds_no_pattern():
    """The expression of a run's owner never travels in an adapter's file (test_fault_table: layers by a pattern)."""
    lora = LoraModel(make("llama"), spec_of("re:.*q_proj"))
    text = make_peft_config(lora.spec, "base", fan_in_fan_out=False, targets=lora.peft_names)
    assert all(Path(name).suffix == ".q_proj" for name in json.loads(text)["target_modules"])
