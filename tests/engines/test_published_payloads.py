"""How much travels, for published models: numbers of trained values and shares of the two factors."""

import pytest
import torch

from fedlora.federated.adapters import pick_half
from fedlora.llm.base_model import _fill_with_zeros
from fedlora.llm.lora import LoraModel, LoraSpec
from fedlora.methods.choosing import load_method
from fedlora.planning.forecast import measure_traffic

MODELS = {
    "SmolLM2-135M": (30, 576, 9, 3, 1536),
    "SmolLM2-360M": (32, 960, 15, 5, 2560),
    "TinyLlama-1.1B": (22, 2048, 32, 4, 5632),
    "Llama-3.2-1B": (16, 2048, 32, 8, 8192),
    "Llama-2-7B": (32, 4096, 32, 32, 11008),
    "Llama-3.1-8B": (32, 4096, 32, 8, 14336),
}
"""Layers, hidden size, heads, key-value heads, size of the feed-forward part."""


def shapes_of_model(name: str, targets: tuple[str, ...], rank: int):
    """Shapes of an adapter, of a model without weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, hidden, heads, key_heads, inner = MODELS[name]
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    _fill_with_zeros(model)
    return LoraModel(model, LoraSpec(rank, 16, 16 / rank, 0.0, targets)).shapes()


def count(shapes) -> int:
    return sum(rows * columns for rows, columns in shapes.values())


@pytest.mark.parametrize(
    ("name", "rank", "of_a", "of_b", "of_all"),
    [
        ("SmolLM2-135M", 8, 276_480, 184_320, 2_442_240),
        ("SmolLM2-135M", 16, 552_960, 368_640, 4_884_480),
        ("SmolLM2-135M", 32, 1_105_920, 737_280, 9_768_960),
        ("SmolLM2-360M", 8, 491_520, 327_680, 4_341_760),
        ("TinyLlama-1.1B", 8, 720_896, 405_504, 6_307_840),
        ("Llama-3.2-1B", 8, 524_288, 327_680, 5_636_096),
        ("Llama-2-7B", 8, 2_097_152, 2_097_152, 19_988_480),
        ("Llama-3.1-8B", 8, 2_097_152, 1_310_720, 20_971_520),
    ],
)
def test_the_factors_of_published_models_have_their_sizes(name, rank, of_a, of_b, of_all):
    attention = shapes_of_model(name, ("q_proj", "v_proj"), rank)
    assert (count(pick_half(attention, "A")), count(pick_half(attention, "B"))) == (of_a, of_b)
    assert count(shapes_of_model(name, ("all-linear",), rank)) == of_all


@pytest.mark.parametrize(
    ("mode", "up", "down"),
    [
        ("homo", 1.0, 1.0),
        ("ffa", 0.4, 0.4),
        ("fedsa", 0.6, 0.6),
        ("rolora", 0.6, 1.0),
        ("fedsvd", 0.4, 1.0),
        ("scaffold", 2.0, 2.0),
        ("median", 1.0, 1.0),
        ("none", 0.0, 0.0),
    ],
)
def test_what_a_client_of_smollm2_sends_and_gets_is_no_half(mode, up, down):
    """A has 60 % of the values of q and v, which are 1.84 MB; of `rolora`'s two rounds the heavier counts."""
    adapter = {
        key: torch.zeros(shape) for key, shape in shapes_of_model("SmolLM2-135M", ("q_proj", "v_proj"), 8).items()
    }
    traffic = measure_traffic(load_method(mode), adapter)
    assert (traffic.bytes_up, traffic.bytes_down) == (pytest.approx(1_843_200 * up), pytest.approx(1_843_200 * down))
