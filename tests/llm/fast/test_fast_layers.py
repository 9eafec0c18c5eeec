"""The fast path of training against the model's own code: structure, gradients, dropout, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GemmaConfig, GraniteConfig, LlamaConfig, MistralConfig, Qwen2Config

from fedlora.config.train import TrainConfig
from fedlora.llm.base_model import load_base_model
from fedlora.llm.examples import Example
from fedlora.llm.fast import decoder_layer, kernels
from fedlora.llm.fast.fast_layers import FastLayers
from fedlora.llm.fast.packed_rows import cut_packs, pack_rows
from fedlora.llm.fast.proof import LONGEST, with_fast_layers
from fedlora.llm.layout import Layout, LayoutBook
from fedlora.llm.local_training import Trainer
from fedlora.llm.lora import LoraModel, LoraSpec

SIZES = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
KINDS = {
    "llama": LlamaConfig(**SIZES),
    "wide heads": LlamaConfig(**SIZES, head_dim=10),
    "biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=200),
}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def draw_rows(*lengths: int) -> list[Example]:
    """Rows of which every two neighbours begin alike, with a masked turn in the longer ones."""
    draw = torch.Generator().manual_seed(len(lengths))
    found = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, 60, (length,), generator=draw).tolist()
        if number % 2:
            same = min(length, len(found[-1].ids), 20)
            ids[:same] = found[-1].ids[:same]
        start = max(1, length - 9)
        found.append(Example(ids, start, ((start + 2, start + 4),) if length > 40 else ()))
    return found


ROWS = draw_rows(30, 33, 150, 31, 9, 280, 12, 64)


@pytest.fixture
def make_base(tiny_model, tmp_path):
    """Builds a small random model of a configuration and loads it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def make(config, dtype="float32"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # norms that are not ones, biases that are not zeros
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
        return load_base_model(str(tmp_path / "model"), device="cpu", dtype=dtype)

    return make


def make_trainer(base, targets=ALL, *, fast=True, **changes) -> Trainer:
    config = TrainConfig.of(**{"lora_dropout": 0.0, "local_batch_size": 8, **changes})
    lora = LoraModel(base.model, LoraSpec(4, 8, 2.0, config.lora_dropout, tuple(targets)))
    draw = torch.Generator().manual_seed(5)
    lora.set_adapter({key: torch.randn(shape, generator=draw) * 0.1 for key, shape in lora.shapes().items()})
    base = replace(base, can=replace(base.can, fast_layers=LONGEST if fast else 0))
    return Trainer(base, lora, config, LayoutBook(Layout(400)))


def step(trainer: Trainer, rows=ROWS):
    """Loss and gradients of one optimizer step."""
    with trainer.lora.train_mode():
        loss = trainer._add_gradients(rows, 1, 0, 0, None)
    return loss, {key: factor.grad.clone() for key, factor in trainer.lora.named_factors()}


def differences(one, other):
    return max(float((one[key] - other[key]).norm() / other[key].norm()) for key in other)


def plain_and_fast(base, **options):
    from fedlora.llm.resident_base import remove_lora

    found = []
    for fast in (False, True):
        trainer = make_trainer(base, fast=fast, **options)
        assert (trainer.fast is not None) == fast
        found.append(step(trainer))
        remove_lora(base.model)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_loss_and_the_gradients_of_the_plain_path(make_base, kind):
    base = make_base(KINDS[kind])
    rows = [row for row in ROWS if kind != "mistral" or len(row.ids) < 200]
    loss, gradients = step(make_trainer(base, fast=False), rows)
    fast_loss, fast_gradients = step(make_trainer(load_again(base)), rows)
    assert fast_loss == pytest.approx(loss, rel=1e-6)
    assert differences(fast_gradients, gradients) < 1e-5


def load_again(base):
    return load_base_model(base.name, device="cpu", dtype=base.dtype_name)


@pytest.mark.parametrize("targets", [("q_proj",), ("v_proj", "down_proj"), ("up_proj", "o_proj")])
def test_any_choice_of_layers_can_be_adapted(make_base, targets):
    (loss, gradients), (fast_loss, fast_gradients) = plain_and_fast(make_base(KINDS["llama"]), targets=targets)
    assert fast_loss == pytest.approx(loss, rel=1e-6)
    assert differences(fast_gradients, gradients) < 1e-5


def test_dropout_drops_what_the_plain_path_drops(make_base):
    (loss, gradients), (fast_loss, fast_gradients) = plain_and_fast(make_base(KINDS["llama"]), lora_dropout=0.3)
    assert fast_loss == pytest.approx(loss, rel=1e-6)
    assert differences(fast_gradients, gradients) < 1e-5


def test_losses_of_labels_come_in_the_order_of_rows(make_base):
    base = make_base(KINDS["llama"])
    trainer = make_trainer(base)
    fast = trainer.label_losses(ROWS)
    trainer.fast = None
    assert torch.allclose(fast, trainer.label_losses(ROWS), rtol=1e-4, atol=1e-6)


def test_what_several_rows_begin_with_is_computed_once(make_base):
    first = list(range(3, 43))
    other = [50, *range(3, 33)]
    rows = [Example([*first, number, 4, 5], 42) for number in range(6, 12)]
    rows += [Example([*other, number, 4, 5], 33) for number in range(6, 12)]
    pack = pack_rows(rows[::2] + rows[1::2], share=True)
    assert len(pack.ids) == (40 + 6 * 3) + (31 + 6 * 3)
    apart = pack_rows(rows, share=False)
    assert len(apart.ids) == sum(len(row.ids) for row in rows)


def test_rows_that_predict_from_one_place_each_get_their_share(make_base):
    rows = [Example([*range(3, 30), last, 7], 27) for last in (31, 32, 33)]
    base = make_base(KINDS["llama"])
    fast = step(make_trainer(base), rows)
    plain = step(make_trainer(load_again(base), fast=False), rows)
    assert fast[0] == pytest.approx(plain[0], rel=1e-6)
    assert differences(fast[1], plain[1]) < 1e-5


def test_packs_hold_no_more_than_the_budget_and_every_row_once():
    packs = cut_packs(ROWS, token_budget=200)
    assert sorted(place for pack in packs for place in pack) == list(range(len(ROWS)))
    assert all(len(pack) == 1 or sum(len(ROWS[place].ids) for place in pack) <= 200 for pack in packs)
    assert max(len(pack) for pack in cut_packs(ROWS, token_budget=10**6, most_rows=3)) == 3


def test_weights_side_by_side_are_the_models_own_and_not_a_copy(make_base):
    base = make_base(KINDS["qwen2"])
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    layer = FastLayers.of(base).parts.layers[0]
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    attention = base.decoder.layers[0].self_attn
    storage = layer.qkv.weight.untyped_storage().data_ptr()
    assert {getattr(attention, f"{name}_proj").weight.untyped_storage().data_ptr() for name in "qkv"} == {storage}
    assert FastLayers.of(base).parts.layers[0].qkv.weight.untyped_storage().data_ptr() == storage


def prove(base):
    return with_fast_layers(base, LoraModel(base.model, LoraSpec(4, 8, 2.0, 0.0, ("q_proj", "v_proj"))), again=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_llama_is_proven_and_goes_up_to_where_its_attention_changes(make_base, dtype):
    assert prove(make_base(KINDS["biases"], dtype)).can.fast_layers == LONGEST
    assert prove(make_base(KINDS["mistral"], dtype)).can.fast_layers == 200


def test_a_model_with_names_of_a_llama_that_computes_otherwise_is_found_out(make_base):
    base = prove(make_base(GraniteConfig(**SIZES, residual_multiplier=0.9, attention_multiplier=0.3)))
    assert base.can.fast_layers == 0
    assert "fast_layers" in base.can.reasons


def test_a_model_of_another_structure_keeps_its_own_path(make_base):
    base = prove(make_base(GemmaConfig(**SIZES, head_dim=6)))
    assert base.can.fast_layers == 0
    assert base.can.reasons == {}


@pytest.mark.parametrize("fault", ["rotate", "norm_back", "swiglu_back", "attend_back"])
def test_a_fault_in_a_gradient_is_found(make_base, monkeypatch, fault):
    right = getattr(decoder_layer, fault)

    def wrong(*arguments, **options):
        if fault == "rotate":
            return None
        return right(*arguments, **options) * 1.01

    monkeypatch.setattr(decoder_layer, fault, wrong)
    assert prove(make_base(KINDS["llama"])).can.fast_layers == 0


def test_rows_beyond_the_limit_and_checkpointed_runs_take_the_plain_path(make_base):
    trainer = make_trainer(make_base(KINDS["llama"]))
    assert trainer._fast_for(ROWS) is not None
    assert trainer._fast_for(draw_rows(LONGEST + 1)) is None
    trainer.book.layout = replace(trainer.book.layout, gradient_checkpointing=True)
    assert trainer._fast_for(ROWS) is None


needs_kernels = pytest.mark.skipif(
    kernels.compiled() is None, reason="the extension module is not built, or no AVX-512"
)


@needs_kernels
def test_compiled_passes_are_as_near_to_float32_as_torch(make_base):
    exact = make_base(KINDS["biases"])
    expected = step(make_trainer(exact))[1]
    short = [load_base_model(exact.name, device="cpu", dtype="bfloat16") for _ in range(2)]
    ours, theirs = (step(make_trainer(base, fast=fast))[1] for base, fast in zip(short, (True, False), strict=True))
    assert differences(ours, expected) < 1.5 * differences(theirs, expected)


@needs_kernels
def test_the_number_of_threads_changes_no_bit(make_base):
    base = make_base(KINDS["llama"], "bfloat16")
    trainer = make_trainer(base)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            x = torch.randn(300, 2 * 400, generator=torch.Generator().manual_seed(0)).bfloat16()
            found.append((kernels.swiglu(x), kernels.norm(x, x[0].clone(), 1e-5)[0], step(trainer)[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(found[0][:2], found[1][:2], strict=True))
