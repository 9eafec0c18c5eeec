import importlib.metadata
import json
import logging
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from fedlora.errors import UsageError
from fedlora.llm.base_model import load_base_model, load_outline
from fedlora.llm.lora import LoraModel, LoraSpec, is_fan_in_fan_out
from fedlora.llm.quantization import LIBRARY, FrozenLinear, Int8Linear, Nf4Linear, _without_kernels

bitsandbytes = pytest.importorskip("bitsandbytes")

KINDS = ("int8", "nf4")


def load(folder, kind, dtype="float32"):
    return load_base_model(str(folder), device="cpu", dtype=dtype, quantization=kind)


def dequantised(layer) -> torch.Tensor:
    """What the stored bits stand for, by the definitions of the two formats."""
    if isinstance(layer, Int8Linear):
        return layer.weight.float() * layer.scale
    packed = layer.weight.flatten()
    levels = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    weights = levels[torch.stack([packed >> 4, packed & 15], 1).flatten().long()]
    scales = layer.scale.repeat_interleave(64)[: len(weights)]
    return (weights * scales).view(layer.out_features, layer.in_features)


def quantised_layers(base):
    return {name: module for name, module in base.model.named_modules() if isinstance(module, FrozenLinear)}


def dense_twin(folder, base):
    """The model unquantised, with the weights that the quantised one stands for."""
    twin = load(folder, "none")
    for name, layer in quantised_layers(base).items():
        place = twin.model.get_submodule(name)
        weight = dequantised(layer)
        place.weight.data = (weight if isinstance(place, nn.Linear) else weight.T).clone()
    return twin


def adapt(base, targets=("all-linear",)) -> LoraModel:
    lora = LoraModel(base.model, LoraSpec(4, 8.0, 2.0, 0.0, targets))
    generator = torch.Generator().manual_seed(1)
    lora.set_adapter({key: 0.2 * torch.randn(shape, generator=generator) for key, shape in lora.shapes().items()})
    return lora


def outputs_and_gradients(base, lora) -> dict[str, torch.Tensor]:
    """Logits and the gradients of the factors, which for the first layers have come through every base layer."""
    ids = torch.arange(5, 45).view(2, 20)
    with lora.train_mode():
        logits = base.head(base.hidden(ids))
        logits.log_softmax(-1)[..., 7].sum().backward()
    return {"logits": logits.detach(), **{key: factor.grad for key, factor in lora.named_factors()}}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_dequantised_weights(tiny_model, kind):
    """Also after passes without gradients: loading has made some, and the base has answered one more.

    Only the order of sums may differ, for int8 as well: its activations are not rounded.
    """
    base = load(tiny_model, kind)
    twin = dense_twin(tiny_model, base)
    lora, dense = adapt(base), adapt(twin)
    with torch.no_grad():
        base.hidden(torch.arange(5, 25)[None])
    found, expected = outputs_and_gradients(base, lora), outputs_and_gradients(twin, dense)
    assert len(found) == 1 + 2 * 14
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=key)


def test_quantised_weights_are_near_the_ones_they_stand_for(tiny_model):
    """int8: half a step of the row's largest weight; nf4: half the widest gap (0.304) of its block's largest."""
    dense = load(tiny_model, "none").model
    for kind in KINDS:
        layers = quantised_layers(load(tiny_model, kind))
        assert len(layers) == 14
        for name, layer in layers.items():
            weight = dense.get_submodule(name).weight.detach()
            error = (dequantised(layer) - weight).abs()
            if kind == "int8":
                limit = weight.abs().amax(1, keepdim=True).expand_as(weight) * (0.5 / 127 + 2**-10)
            else:
                blocks = weight.reshape(-1, 64)
                limit = (blocks.abs().amax(1, keepdim=True) * 0.153).expand_as(blocks).reshape(weight.shape)
            assert bool((error <= limit).all())
            assert float(error.max()) > 0


@pytest.mark.parametrize(("kind", "most_bytes"), [("int8", 1.2), ("nf4", 0.6)])
def test_the_layers_really_take_fewer_bytes_and_embeddings_and_head_stay(tiny_model, kind, most_bytes):
    base, dense = load(tiny_model, kind), load(tiny_model, "none")
    num_bytes = num_weights = 0
    for layer in quantised_layers(base).values():
        num_bytes += sum(tensor.untyped_storage().nbytes() for tensor in (layer.weight, layer.scale))
        num_weights += layer.in_features * layer.out_features
    assert num_bytes <= most_bytes * num_weights
    assert num_weights == sum(m.weight.numel() for m in dense.model.model.modules() if isinstance(m, nn.Linear))
    assert torch.equal(base.model.get_input_embeddings().weight, dense.model.get_input_embeddings().weight)
    assert type(base.model.get_output_embeddings()) is nn.Linear
    assert base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight


@pytest.mark.parametrize("kind", KINDS)
def test_no_dense_weight_is_kept_for_the_way_back(tiny_model, kind):
    base = load(tiny_model, kind)
    layer = quantised_layers(base)["model.layers.0.mlp.down_proj"]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.ones(3, layer.in_features, requires_grad=True)).sum()
    assert not [tensor for tensor in saved if tensor.is_floating_point() and tensor.numel() >= layer.weight.numel()]


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (5, 32), (3, 10), (40, 100)])
def test_blocks_of_4_bits_are_read_right_where_they_span_rows(shape):
    layer = bitsandbytes.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type="nf4", compress_statistics=False)
    layer.source_cls = nn.Linear
    weight = layer.weight.data.clone()
    ours = Nf4Linear(layer.to("cpu"))
    found = ours.dequantise(torch.float32)
    torch.testing.assert_close(found, dequantised(ours))
    assert float((found - weight).abs().max()) <= 0.153 * float(weight.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_s_result_depends_neither_on_its_neighbours_nor_on_the_mode(tiny_model, kind):
    layer = quantised_layers(load(tiny_model, kind))["model.layers.0.mlp.down_proj"]
    rows = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
    rows[3] *= 1e6
    together, alone = layer(rows), torch.cat([layer(row[None]) for row in rows])
    torch.testing.assert_close(together[:3], alone[:3])
    assert torch.equal(layer.train()(rows), together)


@pytest.mark.parametrize("kind", KINDS)
def test_the_products_run_in_the_base_s_type(tiny_model, kind):
    base = load(tiny_model, kind, "bfloat16")
    assert base.hidden(torch.arange(5, 15)[None]).dtype == torch.bfloat16
    assert base.can.head == "linear"


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory, tiny_model):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_store_their_weight_transposed_are_quantised_and_their_adapter_still_says_so(tiny_gpt2, kind):
    base = load(tiny_gpt2, kind)
    twin = dense_twin(tiny_gpt2, base)
    lora, dense = adapt(base, ("c_attn", "c_fc")), adapt(twin, ("c_attn", "c_fc"))
    assert lora.shapes() == dense.shapes()
    assert is_fan_in_fan_out(base.model)
    with torch.no_grad():
        ids = torch.arange(5, 25)[None]
        torch.testing.assert_close(base.last_logits(input_ids=ids), twin.last_logits(input_ids=ids))


@pytest.mark.parametrize("version", [None, "0.49.2"])
def test_a_missing_or_old_library_is_an_error_that_says_how_to_install_it(tiny_model, monkeypatch, version):
    ask = importlib.metadata.version

    def answer(name):
        if name != "bitsandbytes":
            return ask(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", answer)
    with pytest.raises(UsageError, match=r"quantization needs bitsandbytes>=0\.50") as caught:
        load(tiny_model, "nf4")
    assert "pip install 'fedlora[quantization]'" in caught.value.hint
    assert load(tiny_model, "none").can.head == "linear"


@pytest.mark.parametrize(("kind", "function"), [("int8", "int8_vectorwise_quant"), ("nf4", "quantize_4bit")])
def test_a_device_that_the_library_cannot_use_is_an_error(tiny_model, monkeypatch, kind, function):
    def refuse(*_, **__):
        raise RuntimeError("\nno binary for this device\nmany more lines")

    monkeypatch.setattr(bitsandbytes.functional, function, refuse)
    with pytest.raises(UsageError, match=r"bitsandbytes cannot quantise on cpu: no binary for this device$") as caught:
        load(tiny_model, kind)
    assert "--quantization none" in caught.value.hint


@pytest.mark.parametrize(("method", "kind"), [("gptq", "nf4"), ("bitsandbytes", "int8"), ("bitsandbytes", "none")])
def test_a_model_that_is_stored_quantised_is_an_error(tiny_model, tmp_path, method, kind):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_4bit": True, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=rf"stored quantised already \({method}\)") as caught:
        load(folder, kind)
    assert "full precision" in caught.value.hint


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_most_of_whose_weights_stay_dense_is_an_error(tiny_model, tmp_path, kind):
    """Mixtral's experts are one tensor of three dimensions, which no linear layer holds."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"quantization={kind} reaches .* weights") as caught:
        load(tmp_path, kind)
    assert "--quantization none" in caught.value.hint
    with pytest.raises(UsageError) as planned:
        load_outline(str(tmp_path), device="cpu", quantization=kind)
    assert str(planned.value) == str(caught.value)


def test_no_kernel_is_fetched_while_the_library_is_imported_and_real_warnings_are_heard(tmp_path, monkeypatch, caplog):
    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **__): raise AssertionError('fetched')")
    monkeypatch.syspath_prepend(str(tmp_path))
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with _without_kernels():
        with pytest.raises(ImportError):
            import kernels
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "reason")
        logger.warning("another trouble")
    import kernels

    assert kernels.get_kernel
    monkeypatch.delitem(sys.modules, "kernels")
    logger.warning("kernels-community again")
    assert [record.getMessage() for record in caplog.records] == ["another trouble", "kernels-community again"]


def test_the_extra_installs_what_the_code_asks_for():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["optional-dependencies"]["quantization"] == [LIBRARY]
