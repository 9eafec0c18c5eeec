"""Memory before a run: an outline counts like the model itself, and the parts add up to what is really held."""

from __future__ import annotations

import psutil
import pytest
import torch

from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.llm import base_model
from fedlora.llm.base_model import load_base_model, load_outline
from fedlora.llm.footprint import BITS, count_room, count_weights, estimate_footprint, read_program
from fedlora.llm.layout import Layout
from fedlora.llm.lora import LoraModel, LoraSpec
from fedlora.llm.memory import TEMPORARIES, count_kept_bytes, kept_with_checkpointing, plan_layout

SPEC = LoraSpec(4, 16, 4.0, 0.05, ("q_proj", "v_proj"))


def open_base(load, folder):
    base = load(str(folder), device="cpu", dtype="float32")
    return base, LoraModel(base.model, SPEC)


def test_an_outline_counts_like_the_model(tiny_model):
    (real, real_lora), (outline, outline_lora) = (
        open_base(load, tiny_model) for load in (load_base_model, load_outline)
    )
    assert outline_lora.shapes() == real_lora.shapes()
    assert count_weights(outline, "none") == count_weights(real, "none")
    for length in (16, 200):
        assert count_kept_bytes(outline, outline_lora, length) == count_kept_bytes(real, real_lora, length)
    assert plan_layout(outline, outline_lora, TrainConfig()) == plan_layout(real, real_lora, TrainConfig())


def test_an_outline_holds_no_weights():
    from transformers import MixtralConfig, MixtralForCausalLM

    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=2, vocab_size=100_000))
    assert sum(value.numel() for value in model.parameters()) > 3e9
    before = psutil.Process().memory_info().rss
    base_model._fill_with_zeros(model)
    assert psutil.Process().memory_info().rss - before < 50e6
    assert len({value.untyped_storage().data_ptr() for value in model.parameters()}) == 1
    assert not any(value.is_meta for value in [*model.parameters(), *model.buffers()])


def test_an_outline_of_nothing_is_the_error_of_a_missing_model(tmp_path):
    with pytest.raises(UsageError, match="the folder is empty"):
        load_outline(str(tmp_path))


def test_the_adapter_is_no_part_of_the_weights(tiny_model):
    base = load_base_model(str(tiny_model), device="cpu", dtype="float32")
    before = count_weights(base, "none")
    LoraModel(base.model, SPEC)
    assert count_weights(base, "none") == before


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_weights_are_counted_by_their_bits(tiny_model, kind):
    base, _ = open_base(load_outline, tiny_model)
    head = base.model.get_output_embeddings()
    linear = [m for m in base.model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    count = sum(module.weight.numel() for module in linear)
    expected = count_weights(base, "none") - 4 * count + round(count * BITS[kind] / 8)
    assert count_weights(base, kind) == expected


def test_the_parts_of_the_footprint(tiny_model):
    base, lora = open_base(load_base_model, tiny_model)
    size = sum(factor.numel() for _, factor in lora.named_factors())
    kept = count_kept_bytes(base, lora, 50)

    def estimate(checkpointing: bool):
        return estimate_footprint(
            base,
            lora,
            Layout(400, checkpointing),
            pass_tokens=400,
            pass_length=50,
            pass_labels=30,
            weights=1000,
            program=10,
            available=10**9,
        )

    plain, checkpointed = estimate(False), estimate(True)
    logits = 12 * 259 * 30
    assert plain.optimizer == 8 * 4 * size
    assert plain.one_pass == round(TEMPORARIES * kept * 400 + logits)
    assert checkpointed.one_pass == round(TEMPORARIES * kept_with_checkpointing(base, kept) * 400 + logits)
    assert plain.total == 10 + 1000 + plain.optimizer + plain.one_pass


def test_the_room_holds_the_process_that_asks(tiny_model):
    base, _ = open_base(load_base_model, tiny_model)
    assert 0 < read_program(base, outline=False) < count_room(base, outline=False)
