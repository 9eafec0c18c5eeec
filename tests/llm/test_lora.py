from pathlib import Path

import pytest
import torch
from torch import nn

from fedlora.errors import UsageError
from fedlora.federated.adapters import make_adapter, shapes_of
from fedlora.llm.adapter_config import load_spec, make_peft_config
from fedlora.llm.adapter_files import load_adapter, to_bin, to_safetensors
from fedlora.llm.base_model import load_base_model
from fedlora.llm.dropout import DropoutNoise
from fedlora.llm.lora import Answerers, LoraLinear, LoraModel, LoraSpec, is_fan_in_fan_out
from fedlora.llm.targets import find_targets

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def spec_of(targets=ALL, r=4, alpha=12.0, dropout=0.0) -> LoraSpec:
    return LoraSpec(r, alpha, alpha / r, dropout, targets)


def trained_like(shapes, seed=1) -> dict[str, torch.Tensor]:
    """An adapter whose B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) * 0.2 for key, shape in sorted(shapes.items())}


@pytest.fixture
def lora(tiny_model: Path) -> LoraModel:
    return LoraModel(load_base_model(str(tiny_model), device="cpu", dtype="float32").model, spec_of())


def write_peft_folder(folder: Path, lora: LoraModel, state, base: Path, *, as_bin: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = make_peft_config(lora.spec, str(base), fan_in_fan_out=is_fan_in_fan_out(lora.model), targets=lora.peft_names)
    (folder / "adapter_config.json").write_text(text)
    name, content = (
        ("adapter_model.bin", to_bin(state)) if as_bin else ("adapter_model.safetensors", to_safetensors(state))
    )
    (folder / name).write_bytes(content)


@pytest.mark.parametrize("as_bin", [True, False])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all-linear",)])
def test_peft_loads_our_adapters_to_the_same_logits(tiny_model, tmp_path, as_bin, targets):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = LoraModel(load_base_model(str(tiny_model), device="cpu", dtype="float32").model, spec_of(targets))
    state = trained_like(lora.shapes())
    write_peft_folder(tmp_path / "a", lora, state, tiny_model, as_bin=as_bin)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "a").eval()
    lora.set_adapter(state)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, expected = lora.model(ids).logits, theirs(ids).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    lora.set_adapter(None)
    with torch.no_grad():
        assert not torch.allclose(lora.model(ids).logits, expected, atol=1e-3)


def test_gradients_equal_pefts_in_float32(tiny_model):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraModel(load_base_model(str(tiny_model), device="cpu", dtype="float32").model, spec_of())
    state = trained_like(lora.shapes())
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, target_modules=list(ALL), task_type="CAUSAL_LM")
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    named = {name.replace(".default", ""): value for name, value in theirs.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for key, value in named.items():
            value.copy_(state[key])
    lora.set_adapter(state)
    ids = torch.arange(3, 40)[None]
    for model in (theirs, lora.model):
        model.train()
        model(ids, labels=ids).loss.backward()
    assert named.keys() == dict(lora.named_factors()).keys()
    for key, factor in lora.named_factors():
        torch.testing.assert_close(factor.grad, named[key].grad, rtol=1e-4, atol=1e-6)


def test_factors_and_gradients_stay_float32_on_a_bfloat16_base(tiny_model):
    lora = LoraModel(load_base_model(str(tiny_model), device="cpu", dtype="bfloat16").model, spec_of())
    lora.set_adapter(trained_like(lora.shapes()))
    output = lora.model(torch.arange(3, 20)[None]).logits
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    for _, factor in lora.named_factors():
        assert factor.dtype == torch.float32
        assert factor.grad is not None
        assert factor.grad.dtype == torch.float32


def test_reading_gives_copies_and_the_base_takes_no_gradient(lora):
    lora.set_adapter(trained_like(lora.shapes()))
    first = lora.get_adapter()
    before = {key: value.clone() for key, value in first.items()}
    lora.set_adapter(trained_like(lora.shapes(), seed=2))
    assert all(torch.equal(first[key], before[key]) for key in first)
    trainable = [name for name, value in lora.model.named_parameters() if value.requires_grad]
    assert all(name.endswith((".a", ".b")) for name in trainable)
    assert len(trainable) == 2 * len(lora.layers)


def test_the_untrained_adapter_changes_nothing_and_follows_the_seed(lora):
    state = make_adapter(lora.shapes(), seed=3)
    lora.set_adapter(state)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        with_adapter = lora.model(ids).logits
        lora.set_adapter(None)
        assert torch.equal(with_adapter, lora.model(ids).logits)
    again, other = make_adapter(lora.shapes(), seed=3), make_adapter(lora.shapes(), seed=4)
    key = next(key for key in state if "lora_A" in key)
    assert torch.equal(state[key], again[key])
    assert not torch.equal(state[key], other[key])
    bound = state[key].shape[1] ** -0.5
    assert float(state[key].abs().max()) <= bound
    assert float(state[key].std()) == pytest.approx(bound / 3**0.5, rel=0.2)


def test_a_target_that_no_layer_has_is_an_error_that_lists_the_layers(lora, tiny_model):
    model = load_base_model(str(tiny_model), device="cpu").model
    with pytest.raises(UsageError, match="c_attn") as caught:
        find_targets(model, ("q_proj", "c_attn"))
    assert "gate_proj" in caught.value.hint
    names = [layer.name for layer in find_targets(model, ("all-linear",)).layers]
    assert len(names) == 14
    assert "lm_head" not in names


def test_conv1d_layers_of_gpt2_are_adapted_as_peft_does(tmp_path):
    from peft import PeftModel
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    lora = LoraModel(GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2"), spec_of(("c_attn", "c_proj")))
    state = trained_like(lora.shapes())
    write_peft_folder(tmp_path / "a", lora, state, tmp_path / "gpt2", as_bin=False)
    theirs = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2"), tmp_path / "a").eval()
    lora.set_adapter(state)
    lora.model.eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(lora.model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8, 6), (6, 6), (4, 9)])
def test_the_fused_layer_has_the_gradients_of_the_plain_formula_in_float64(bias, shape):
    from fedlora.llm.lora_layer import LowRankLinear

    d_in, d_out = shape
    torch.manual_seed(1)
    x = torch.randn(2, 3, d_in, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(d_out, d_in, dtype=torch.float64)
    offset = torch.randn(d_out, dtype=torch.float64) if bias else None
    a = torch.randn(4, d_in, dtype=torch.float64, requires_grad=True)
    b = torch.randn(d_out, 4, dtype=torch.float64, requires_grad=True)
    outer = torch.randn(2, 3, d_out, dtype=torch.float64)
    plain = torch.nn.functional.linear(x, weight, offset) + 0.7 * (x @ a.t()) @ b.t()
    expected = torch.autograd.grad(plain, (x, a, b), outer)
    fused = LowRankLinear.apply(x, weight, offset, a, b, (a.detach(), b.detach()), 0.7)
    torch.testing.assert_close(fused, plain)
    # gradients of the factors are float32 by contract
    for found, wanted in zip(torch.autograd.grad(fused, (x, a, b), outer), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_fused_layer_drops_what_the_plain_formula_drops_and_has_its_gradients():
    from fedlora.llm.lora_layer import LowRankLinear

    torch.manual_seed(1)
    x = torch.randn(50, 8, dtype=torch.float64)
    x[:, 3] = 0.0  # a value of zero is not a dropped one: its gradient goes on
    x.requires_grad_()
    weight, outer = torch.randn(6, 8, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    a, b = (
        torch.randn(4, 8, dtype=torch.float64, requires_grad=True),
        torch.randn(6, 4, dtype=torch.float64).requires_grad_(),
    )
    kept = torch.rand(50, 8) >= 0.4
    dropped = torch.where(kept, x, 0.0) / 0.6
    plain = x @ weight.t() + 0.7 * (dropped @ a.t()) @ b.t()
    fused = LowRankLinear.apply(x, weight, None, a, b, (a.detach(), b.detach()), 0.7 / 0.6, kept)
    torch.testing.assert_close(fused, plain)
    expected = torch.autograd.grad(plain, (x, a, b), outer)
    for found, wanted in zip(torch.autograd.grad(fused, (x, a, b), outer), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    noise = DropoutNoise(0.5, 1)
    layer = LoraLinear(nn.Linear(8, 6), 8, 6, spec_of(), Answerers(), noise)
    with torch.no_grad():
        layer.a.normal_()
        layer.b.normal_()
    x = torch.randn(3, 8)
    layer.eval()
    whole = layer(x)
    layer.train()
    noise.begin_pass([1, 2, 3], torch.device("cpu"))
    assert not torch.equal(layer(x), whole)
    # over many draws the mean of the outputs is that without dropout
    many = 4000
    noise.begin_pass(range(many), torch.device("cpu"))
    outputs = layer(x[:1].expand(many, -1))
    error = outputs.std(dim=0) / many**0.5
    assert bool(((outputs.mean(dim=0) - whole[0]).abs() < 5 * error).all())
    layer.eval()
    assert torch.equal(layer(x), whole)


def test_a_model_with_new_layers_is_in_evaluation_mode(tiny_model):
    lora = LoraModel(load_base_model(str(tiny_model), device="cpu").model, spec_of(dropout=0.5))
    lora.set_adapter(trained_like(lora.shapes()))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(lora.model(ids).logits, lora.model(ids).logits)


def test_adapters_survive_both_file_formats_and_equal_tensors_give_equal_bytes(lora, tmp_path):
    state = trained_like(lora.shapes())
    reordered = dict(reversed(list(state.items())))
    assert to_safetensors(state) == to_safetensors(reordered)
    assert to_bin(state) == to_bin(reordered)
    for name, content in (("a.safetensors", to_safetensors(state)), ("a.bin", to_bin(state))):
        (tmp_path / name).write_bytes(content)
        loaded = load_adapter(tmp_path / name, lora.shapes())
        assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_a_file_that_is_no_fitting_adapter_is_refused(lora, tmp_path):
    expected = lora.shapes()
    state = trained_like(expected)
    key = sorted(state)[0]
    bad = {
        "missing": {name: value for name, value in state.items() if name != key},
        "unknown": {**state, "base_model.model.other.lora_A.weight": torch.zeros(1)},
        "shape": {**state, key: state[key].t().contiguous()},
        "type": {**state, key: state[key].int()},
        "non-finite": {**state, key: state[key].clone().fill_(float("nan"))},
    }
    for word, content in bad.items():
        (tmp_path / "a.safetensors").write_bytes(to_safetensors(content))
        with pytest.raises(UsageError, match=word):
            load_adapter(tmp_path / "a.safetensors", expected)
    (tmp_path / "a.safetensors").write_bytes(to_safetensors(state)[:-7])
    with pytest.raises(UsageError, match="not a readable adapter"):
        load_adapter(tmp_path / "a.safetensors", expected)
    with pytest.raises(UsageError, match="no such adapter"):
        load_adapter(tmp_path / "b.safetensors", expected)
    assert shapes_of(state) == dict(expected)


class Canary:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_that_would_run_code_does_not(lora, tmp_path):
    canary = tmp_path / "canary"
    torch.save({"x": Canary(str(canary))}, tmp_path / "a.bin")
    with pytest.raises(UsageError, match="not a readable adapter"):
        load_adapter(tmp_path / "a.bin", lora.shapes())
    assert not canary.exists()


def test_the_adapter_configuration_reads_back(lora, tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        make_peft_config(lora.spec, "base", fan_in_fan_out=False, targets=lora.peft_names)
    )
    found = load_spec(tmp_path / "adapter_config.json")
    assert (found.r, found.scaling, found.target_modules) == (4, 3.0, tuple(sorted(ALL)))
    (tmp_path / "adapter_config.json").write_text('{"r": 1000000000, "lora_alpha": 1, "target_modules": ["q"]}')
    with pytest.raises(UsageError, match="not a LoRA configuration"):
        load_spec(tmp_path / "adapter_config.json")
