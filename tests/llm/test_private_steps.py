"""Example-level DP-SGD against a loop over single rows, and what it promises of one row."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fedlora.config.train import TrainConfig
from fedlora.federated.adapters import difference_norm, make_adapter, pick_half
from fedlora.federated.privacy.randomness import Secret
from fedlora.llm.base_model import load_base_model
from fedlora.llm.examples import Example, encode_rows, make_batch
from fedlora.llm.layout import Layout, LayoutBook
from fedlora.llm.local_training import Trainer
from fedlora.llm.lora import LoraModel, LoraSpec
from fedlora.llm.loss import backward_loss
from fedlora.llm.private_steps import PrivateSteps
from fedlora.llm.prompts import PromptEncoder
from fedlora.rows import Row
from fedlora.types import Phase

SECRET = Secret(bytes(range(32)))
ROWS = [Row("ask " + "x" * (7 * i % 40), "", "yes" * (1 + i % 5), "c") for i in range(8)]


def make_trainer(tiny_model, dtype="float32", tokens=4096, checkpointing=False, secret=SECRET, **changes) -> Trainer:
    options = {
        "local_batch_size": 8,
        "local_num_epochs": 1,
        "local_learning_rate": 1e-2,
        "lora_dropout": 0.0,
        "max_grad_norm": 0.0,
        "dp_example_clip": 0.01,
        "dp_example_noise_multiplier": 0.0,
    }
    config = TrainConfig.of(**{**options, **changes})
    base = load_base_model(str(tiny_model), device="cpu", dtype=dtype)
    spec = LoraSpec(4, 16, 4.0, config.lora_dropout, ("q_proj", "v_proj", "down_proj"))
    return Trainer(base, LoraModel(base.model, spec), config, LayoutBook(Layout(tokens, checkpointing)), secret)


def examples_of(trainer: Trainer, rows=ROWS) -> list[Example]:
    return encode_rows(rows, PromptEncoder(trainer.base.tokenizer, "chat"), cutoff=128).examples


def start_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """An adapter both of whose factors have a gradient."""
    draw = torch.Generator().manual_seed(3)
    return {key: 0.1 * torch.randn(shape, generator=draw) for key, shape in trainer.lora.shapes().items()}


def factors_of(trainer: Trainer, half="both"):
    trainer.lora.set_adapter(start_of(trainer))
    return pick_half(dict(trainer.lora.named_factors()), half)


def gradient_of_one(trainer: Trainer, example: Example, half="both") -> dict[str, torch.Tensor]:
    """The oracle: the gradient of one row's mean loss, by an ordinary pass over this row alone."""
    factors = factors_of(trainer, half)
    for _, factor in trainer.lora.named_factors():
        factor.grad = None
    backward_loss(trainer.base, make_batch([example], pad_id=trainer.base.pad_id), scale=1 / example.num_labels)
    return {key: factor.grad.clone() for key, factor in factors.items()}


def clipped_sum(trainer: Trainer, groups, half="both") -> dict[str, torch.Tensor]:
    """What the steps add up over some passes, before noise."""
    factors = factors_of(trainer, half)
    for _, factor in trainer.lora.named_factors():
        factor.grad = None
    steps = PrivateSteps(trainer.lora, factors, trainer.config, SECRET, round_number=1, client_id=0)
    for group in groups:
        batch = make_batch(group, pad_id=trainer.base.pad_id)
        steps.add_clipped(group, lambda batch=batch: backward_loss(trainer.base, batch, scale=1.0))
    return {key: factor.grad.clone() for key, factor in factors.items()}


def norm_of(state) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in state.values()))


def close(one, other, tolerance=1e-6) -> bool:
    return difference_norm(one, other) <= tolerance * norm_of(other)


@pytest.mark.parametrize("half", ["both", "A", "B"])
@pytest.mark.parametrize("clip", [1e9, 0.05])
def test_rows_side_by_side_give_the_clipped_gradients_of_a_loop_over_single_rows(tiny_model, half, clip):
    trainer = make_trainer(tiny_model, dp_example_clip=clip)
    examples = examples_of(trainer)
    expected = None
    norms = []
    for example in examples:
        own = gradient_of_one(trainer, example, half)
        norms.append(norm_of(own))
        scaled = {key: value.double() * min(1.0, clip / norms[-1]) for key, value in own.items()}
        expected = scaled if expected is None else {key: expected[key] + scaled[key] for key in scaled}
    assert clip > 1 or min(norms) > clip, "the bound must bind"
    found = clipped_sum(trainer, [examples[:3], examples[3:]], half)
    assert found.keys() == expected.keys()
    assert close(found, expected, 1e-5)


def test_without_a_bound_rows_of_equal_length_give_the_ordinary_gradient(tiny_model):
    trainer = make_trainer(tiny_model, dp_example_clip=1e9)
    examples = examples_of(trainer, [replace(row, output="yes") for row in ROWS])
    labels = sum(example.num_labels for example in examples)
    factors = factors_of(trainer)
    backward_loss(trainer.base, make_batch(examples, pad_id=trainer.base.pad_id), scale=1 / labels)
    ordinary = {key: factor.grad.clone() for key, factor in factors.items()}
    found = {key: value / len(examples) for key, value in clipped_sum(trainer, [examples]).items()}
    assert close(found, ordinary, 1e-5)


def test_one_row_moves_the_sum_by_no_more_than_the_clip(tiny_model):
    trainer = make_trainer(tiny_model, dp_example_clip=0.02)
    examples = examples_of(trainer)
    whole = clipped_sum(trainer, [examples])
    for index in range(len(examples)):
        without = clipped_sum(trainer, [examples[:index] + examples[index + 1 :]])
        assert difference_norm(whole, without) <= 0.02 * (1 + 1e-4)


def test_the_cut_into_passes_does_not_change_the_sum(tiny_model):
    trainer = make_trainer(tiny_model)
    examples = examples_of(trainer)
    assert close(clipped_sum(trainer, [examples]), clipped_sum(trainer, [[row] for row in examples]), 1e-5)


def train(trainer: Trainer, examples=None, *, half="both", client=0, number=1):
    phase = Phase(start_of(trainer), half)
    return trainer.train(
        phase, examples or examples_of(trainer), round_number=number, client_id=client, needs_gradient=True
    )


def test_noise_is_added_once_per_step_with_the_promised_deviation(tiny_model):
    """All rows in one lot: mean gradient = (sum + noise) / lot, whatever the passes; chi-squared on the noise."""
    quiet = train(make_trainer(tiny_model))
    for micro in (None, 1):
        loud = train(make_trainer(tiny_model, dp_example_noise_multiplier=50.0, local_micro_batch_size=micro))
        noise = {key: loud.mean_gradient[key] - quiet.mean_gradient[key] for key in quiet.mean_gradient}
        size = sum(value.numel() for value in noise.values())
        square = (norm_of(noise) / (50.0 * 0.01 / 8)) ** 2
        assert abs(square - size) < 5 * math.sqrt(2 * size)


def test_noise_lies_on_what_is_trained_and_on_nothing_else(tiny_model):
    trainer = make_trainer(tiny_model, dp_example_noise_multiplier=1.0)
    start, trained = start_of(trainer), train(trainer, half="B").adapter
    for key in start:
        assert torch.equal(start[key], trained[key]) == (".lora_A." in key)


def test_without_noise_and_bound_a_lot_of_everybody_is_a_plain_step(tiny_model):
    rows = [replace(row, output="yes") for row in ROWS]
    results = []
    for optimizer in ("sgd", "adamw"):
        private = make_trainer(tiny_model, dp_example_clip=1e9, local_optimizer=optimizer)
        plain = make_trainer(
            tiny_model, dp_example_clip=None, dp_example_noise_multiplier=None, local_optimizer=optimizer
        )
        results = [train(trainer, examples_of(trainer, rows)) for trainer in (private, plain)]
        assert close(results[0].mean_gradient, results[1].mean_gradient, 1e-5)
        assert close(results[0].adapter, results[1].adapter, 1e-4)
        assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)


def test_lots_are_poisson_with_a_fixed_denominator_and_can_be_empty(tiny_model):
    trainer = make_trainer(tiny_model, local_batch_size=2, local_num_epochs=200)
    examples = [SimpleNamespace(index=index) for index in range(8)]
    steps = PrivateSteps(trainer.lora, factors_of(trainer), trainer.config, SECRET, round_number=1, client_id=0)
    lots = steps.draw_lots(examples)
    sizes = [len(lot) for lot in lots]
    assert len(lots) == 200 * 4
    assert sum(sizes) / len(lots) == pytest.approx(2, abs=5 * math.sqrt(8 * 0.25 * 0.75 / len(lots)))
    assert sizes.count(0) / len(lots) == pytest.approx(0.75**8, abs=0.06)
    assert 0 in sizes
    assert steps._denominator == 2


def test_an_empty_lot_is_a_step_of_noise(tiny_model):
    trainer = make_trainer(tiny_model, dp_example_noise_multiplier=1.0)
    factors = factors_of(trainer)
    for factor in factors.values():
        factor.grad = None
    steps = PrivateSteps(trainer.lora, factors, trainer.config, SECRET, round_number=1, client_id=0)
    steps.add_noise(0)
    assert all(bool(factor.grad.all()) for factor in factors.values())


def test_rounds_clients_steps_and_secrets_have_lots_and_noise_of_their_own_and_repeat_them(tiny_model):
    changes = {"dp_example_noise_multiplier": 1.0, "local_batch_size": 3, "local_num_epochs": 2}
    trainer = make_trainer(tiny_model, **changes)
    first = train(trainer).adapter
    assert close(train(make_trainer(tiny_model, **changes)).adapter, first, 0)
    assert not close(train(trainer, client=1).adapter, first, 1e-3)
    assert not close(train(trainer, number=2).adapter, first, 1e-3)
    other = Secret(bytes(range(1, 33)))
    assert not close(train(make_trainer(tiny_model, secret=other, **changes)).adapter, first, 1e-3)


def test_the_public_seed_draws_no_lot_and_no_noise(tiny_model):
    changes = {"dp_example_noise_multiplier": 1.0, "local_batch_size": 3}
    one, other = (train(make_trainer(tiny_model, seed=seed, **changes)).adapter for seed in (1, 2))
    assert close(one, other, 0)


def test_private_training_without_a_secret_is_refused(tiny_model):
    trainer = make_trainer(tiny_model, secret=None)
    with pytest.raises(ValueError, match="secret"):
        train(trainer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_checkpointing_and_the_base_s_type_go_with_it(tiny_model, dtype):
    options = {"dp_example_clip": 1.0, "dp_example_noise_multiplier": 0.1, "lora_dropout": 0.2}
    plain, again = (
        train(make_trainer(tiny_model, dtype, checkpointing=checkpointing, **options)).adapter
        for checkpointing in (False, True)
    )
    assert close(again, plain, 1e-5 if dtype == "float32" else 1e-2)
    without = train(make_trainer(tiny_model, dtype, **{**options, "lora_dropout": 0.0})).adapter
    assert not close(without, plain, 1e-5)


def test_the_layers_are_as_before_afterwards_also_when_a_pass_fails(tiny_model):
    trainer = make_trainer(tiny_model)
    examples = examples_of(trainer)
    steps = PrivateSteps(trainer.lora, factors_of(trainer), trainer.config, SECRET, round_number=1, client_id=0)

    def fail() -> torch.Tensor:
        raise RuntimeError("planned")

    with pytest.raises(RuntimeError, match="planned"):
        steps.add_clipped(examples, fail)
    assert all(layer.instead is None for layer in trainer.lora.layers.values())
    assert trainer.validate(make_adapter(trainer.lora.shapes(), 0), [examples]) > 0


def test_rows_that_a_layer_does_not_see_one_by_one_are_an_error(tiny_model):
    trainer = make_trainer(tiny_model)
    steps = PrivateSteps(trainer.lora, factors_of(trainer), trainer.config, SECRET, round_number=1, client_id=0)
    examples = examples_of(trainer)
    batch = make_batch(examples[:2], pad_id=trainer.base.pad_id)
    with pytest.raises(ValueError, match="one by one"):
        steps.add_clipped(examples[:3], lambda: backward_loss(trainer.base, batch, scale=1.0))


def test_many_rows_with_gradients_of_their_own_do_not_fill_the_memory(tiny_model, monkeypatch):
    trainer = make_trainer(tiny_model)
    sizes = []
    add_clipped = PrivateSteps.add_clipped
    monkeypatch.setattr(
        PrivateSteps, "add_clipped", lambda self, rows, run: (sizes.append(len(rows)), add_clipped(self, rows, run))[1]
    )
    size = sum(factor.numel() for factor in factors_of(trainer).values())
    monkeypatch.setattr("fedlora.llm.private_steps.GRADIENT_BYTES", 2 * 4 * size)
    train(trainer)
    assert max(sizes) == 2
    assert sum(sizes) == 8
