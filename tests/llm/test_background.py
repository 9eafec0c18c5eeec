from pathlib import Path

import pytest
import torch

from fedlora.config.train import TrainConfig
from fedlora.federated.adapters import make_adapter
from fedlora.llm.base_model import load_base_model
from fedlora.llm.examples import Example
from fedlora.llm.layout import Layout, LayoutBook
from fedlora.llm.local_training import Trainer
from fedlora.llm.lora import LoraModel, LoraSpec
from fedlora.types import Phase

SPEC = LoraSpec(4, 12.0, 3.0, 0.0, ("q_proj", "v_proj", "down_proj"))
IDS = torch.arange(3, 40)[None]


@pytest.fixture
def base(tiny_model: Path):
    return load_base_model(str(tiny_model), device="cpu", dtype="float32")


@pytest.fixture
def lora(base) -> LoraModel:
    return LoraModel(base.model, SPEC)


def trained_like(shapes, seed) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in sorted(shapes.items())}


def scaled_b(state, factor):
    return {key: value * factor if ".lora_B." in key else value for key, value in state.items()}


def joined(*states):
    """One adapter whose update is the sum of all."""
    return {key: torch.cat([state[key] for state in states], dim=0 if ".lora_A." in key else 1) for key in states[0]}


def dense(state):
    names = [key.removesuffix(".lora_A.weight") for key in state if ".lora_A." in key]
    return {f"{name}.delta.weight": state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"] for name in names}


@torch.no_grad()
def logits(lora, ids=IDS):
    return lora.model(ids).logits


@pytest.mark.parametrize("form", [dict, dense])
def test_a_background_and_an_adapter_answer_as_the_stack_of_both(lora, form):
    one, other = (trained_like(lora.shapes(), seed) for seed in (1, 2))
    lora.set_background(form(scaled_b(one, 0.7)))
    lora.set_adapter(other, weight=0.4)
    found = logits(lora)
    lora.set_background(None)
    lora.set_adapter(None)
    without = logits(lora)
    # the same as one background of both, on the base alone
    lora.set_background(joined(scaled_b(one, 0.7), scaled_b(other, 0.4 * SPEC.scaling)))
    torch.testing.assert_close(logits(lora), found, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, without, atol=1e-3)
    lora.set_background(None)
    assert torch.equal(logits(lora), without)


def test_stacked_adapters_answer_on_the_background_too(lora):
    one, other = (trained_like(lora.shapes(), seed) for seed in (1, 2))
    lora.set_background(scaled_b(one, 0.7))
    lora.set_adapter(other)
    expected = logits(lora)
    lora.stack_adapters([None, other], torch.float32)
    lora.choose_rows(torch.tensor([1]))
    torch.testing.assert_close(logits(lora), expected, rtol=1e-4, atol=1e-5)


def rank(state, r):
    return {key: value[:r].clone() if ".lora_A." in key else value[:, :r].clone() for key, value in state.items()}


def test_an_adapter_of_smaller_rank_is_set_and_read_as_it_is(lora):
    small = rank(trained_like(lora.shapes(), 1), 2)
    lora.set_adapter(trained_like(lora.shapes(), 2))
    lora.set_adapter(small)
    found = lora.get_adapter()
    assert all(torch.equal(found[key], small[key]) for key in small)
    background = scaled_b(small, SPEC.scaling)
    expected = logits(lora)
    lora.set_adapter(None)
    lora.set_background(background)
    torch.testing.assert_close(logits(lora), expected, rtol=1e-4, atol=1e-5)


def test_stacked_adapters_of_different_ranks_answer_as_each_alone(lora):
    states = [rank(trained_like(lora.shapes(), seed), r) for seed, r in ((1, 2), (2, 4), (3, 1))]
    expected = []
    for state in states:
        lora.set_adapter(state)
        expected.append(logits(lora))
    lora.stack_adapters(states, torch.float32)
    lora.choose_rows(torch.tensor([0, 1, 2]))
    torch.testing.assert_close(logits(lora, IDS.expand(3, -1)), torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", ["transposed", "too large", "flat"])
def test_what_is_no_adapter_of_these_layers_is_refused(lora, shape):
    state = trained_like(lora.shapes(), 1)
    key = next(key for key in state if ".lora_A." in key)
    state[key] = {"transposed": state[key].T, "too large": state[key].repeat(2, 1), "flat": state[key][0]}[shape]
    with pytest.raises(ValueError, match="expected"):
        lora.set_adapter(state)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_smaller_rank_trains_as_a_model_of_that_rank(tiny_model, optimizer):
    config = TrainConfig(
        local_optimizer=optimizer,
        weight_decay=0.1,
        local_batch_size=4,
        local_num_epochs=2,
        local_learning_rate=1e-2,
        lora_dropout=0.0,
    )
    examples = [Example(list(range(3 + i, 20 + i)), 5) for i in range(8)]
    start, ends = None, []
    for r in (2, 4):
        base = load_base_model(str(tiny_model), device="cpu", dtype="float32")
        lora = LoraModel(base.model, LoraSpec(r, 3.0 * r, 3.0, 0.0, SPEC.target_modules))
        start = start or make_adapter(lora.shapes(), 1)
        trainer = Trainer(base, lora, config, LayoutBook(Layout(4096)))
        ends.append(trainer.train(Phase(start), examples, round_number=1, client_id=0).adapter)
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-4, atol=1e-6)
        assert not torch.equal(value, start[key])
