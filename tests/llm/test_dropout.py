"""LoRA dropout: the noise of an example is its own, whatever the layout of the pass."""

from __future__ import annotations

import itertools

import pytest
import torch

from fedlora.config.train import TrainConfig
from fedlora.federated.privacy.randomness import Secret
from fedlora.llm import local_training
from fedlora.llm.base_model import load_base_model
from fedlora.llm.dropout import DropoutNoise, drop, split_mix
from fedlora.llm.examples import encode_rows
from fedlora.llm.layout import Layout, LayoutBook
from fedlora.llm.local_training import Trainer
from fedlora.llm.lora import LoraModel, LoraSpec
from fedlora.llm.prompts import PromptEncoder
from fedlora.rows import Row
from fedlora.types import Phase

CPU = torch.device("cpu")
ROWS = [Row("ask " + "x" * (37 * i % 101), "", "yes" * (1 + i % 5), "c") for i in range(8)]


def noise_of(seeds, p=0.05, num_layers=3) -> DropoutNoise:
    noise = DropoutNoise(p, num_layers)
    noise.begin_pass(seeds, CPU)
    return noise


def split_mix_by_hand(seed: int, number: int) -> int:
    """SplitMix64 in Python's integers, from the authors' C."""
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_the_generator_is_splitmix64():
    assert split_mix_by_hand(1234567, 0) == 6457827717110365317  # published beside the algorithm
    seeds = [0, 1, 1234567, 2**63 - 1]
    found = split_mix(torch.tensor(seeds), torch.arange(5))
    assert [[number % 2**64 for number in row] for row in found.tolist()] == [
        [split_mix_by_hand(seed, number) for number in range(5)] for seed in seeds
    ]


def test_an_entry_is_dropped_by_the_formula():
    seed, layer, d, length, p = 77, 2, 6, 9, 0.3
    kept = noise_of([5, seed], p).draw(layer, torch.zeros(2, length, d))[1]
    stream = split_mix_by_hand(seed, layer)
    words = [split_mix_by_hand(stream, number) >> 32 for number in range(2 * d + length)]
    for token, feature in itertools.product(range(length), range(d)):
        # as signed words, which the threshold is in
        word = (words[feature] * words[2 * d + token] + words[d + feature] + 2**31) % 2**32
        assert bool(kept[token, feature]) == (word >= round(p * 2**32)), (token, feature)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_share_of_dropped_entries_and_its_variance_are_those_of_independent_draws(p):
    rows, length, d = 300, 64, 48
    kept = noise_of(range(rows), p).draw(0, torch.zeros(rows, length, d)).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(float(kept.mean()) - (1 - p)) < 4 * deviation / kept.numel() ** 0.5
    # the count in a row, in a token and in a feature vary as sums of independent entries do
    for counts in (kept.sum((1, 2)), kept.sum(2).flatten(), kept.sum(1).flatten()):
        entries = kept.numel() / counts.numel()
        spread = float(counts.var()) / (entries * p * (1 - p))
        # the variance of a variance over n counts that are about normal is 2 / n
        assert abs(spread - 1) < 5 * (2 / counts.numel()) ** 0.5, entries
    neighbours = (
        ((kept[:, 1:] - 1 + p) * (kept[:, :-1] - 1 + p)).mean(),
        ((kept[:, :, 1:] - 1 + p) * (kept[:, :, :-1] - 1 + p)).mean(),
    )
    assert all(abs(float(value)) < 5 * p * (1 - p) / kept.numel() ** 0.5 for value in neighbours)


def test_what_is_kept_is_scaled_up_so_that_the_mean_stays():
    noise = noise_of(range(200), 0.3)
    x = torch.ones(200, 32, 32)
    assert float(drop(x, noise.draw(0, x)).mean()) / noise.kept_share == pytest.approx(1, abs=0.01)
    assert noise.kept_share == pytest.approx(0.7, abs=1e-9)


def test_the_noise_of_an_example_does_not_depend_on_padding_place_company_or_shape():
    alone = noise_of([7]).draw(1, torch.zeros(1, 20, 16))[0]
    assert not alone.all()
    padded = noise_of([3, 7, 9]).draw(1, torch.zeros(3, 50, 16))
    assert torch.equal(padded[1, :20], alone)
    assert torch.equal(noise_of([3, 7, 9]).draw(1, torch.zeros(3 * 50, 16)).view(3, 50, 16), padded)


def test_many_words_at_a_time_or_few_give_the_same_noise(monkeypatch):
    whole = noise_of(range(9)).draw(0, torch.zeros(9, 10, 8))
    monkeypatch.setattr("fedlora.llm.dropout.MOST_WORDS", 2 * 10 * 8)
    assert torch.equal(noise_of(range(9)).draw(0, torch.zeros(9, 10, 8)), whole)


def test_other_examples_and_other_layers_draw_other_noise():
    noise = noise_of([7, 8], 0.5)
    drawn = [noise.draw(layer, torch.zeros(2, 64, 64))[row].double() for layer in range(3) for row in range(2)]
    for first, second in itertools.combinations(drawn, 2):
        assert abs(float(((first - 0.5) * (second - 0.5)).mean())) < 5 * 0.25 / 64


def test_a_pass_of_other_examples_or_of_none_is_an_error():
    with pytest.raises(ValueError, match="begin_pass"):
        DropoutNoise(0.1, 1).draw(0, torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="2 examples"):
        noise_of([1, 2]).draw(0, torch.zeros(3, 3, 4))


def test_tokens_that_a_router_picked_are_hashed_by_their_place():
    assert noise_of([1, 2], 0.5).draw(0, torch.zeros(7, 64)).double().mean() == pytest.approx(0.5, abs=0.1)


def make_trainer(tiny_model, tokens=4096, secret=bytes(range(32)), **changes) -> Trainer:
    options = {"local_batch_size": 8, "local_num_epochs": 1, "lora_dropout": 0.05, "max_grad_norm": 0.0}
    config = TrainConfig.of(**{**options, **changes})
    base = load_base_model(str(tiny_model), device="cpu", dtype="float32")
    spec = LoraSpec(4, 16, 4.0, config.lora_dropout, ("q_proj", "v_proj", "down_proj"))
    layout = Layout(tokens, config.gradient_checkpointing == "on")
    return Trainer(base, LoraModel(base.model, spec), config, LayoutBook(layout), Secret(secret))


def gradient(trainer: Trainer, *, seed_of_start=3, rows=ROWS, round_number=1, client_id=0):
    """The gradient of the first step: what one step of plain SGD at rate 1 takes off the factors."""
    draw = torch.Generator().manual_seed(seed_of_start)
    start = {key: 0.1 * torch.randn(shape, generator=draw) for key, shape in trainer.lora.shapes().items()}
    examples = encode_rows(rows, PromptEncoder(trainer.base.tokenizer, "chat"), cutoff=128).examples
    trained = trainer.train(Phase(start), examples, round_number=round_number, client_id=client_id, needs_gradient=True)
    assert trained.mean_gradient is not None
    return trained.mean_gradient


def difference(first, second) -> float:
    """Relative, over all factors together."""
    gap = sum(float((first[key] - second[key]).norm()) ** 2 for key in second) ** 0.5
    return gap / sum(float(value.norm()) ** 2 for value in second.values()) ** 0.5


PRIVATE = {"dp_example_clip": 0.5, "dp_example_noise_multiplier": 0.0, "local_optimizer": "sgd"}
LAYOUTS = [
    *({"tokens": tokens} for tokens in (64, 256, 4096)),
    *({"local_micro_batch_size": rows} for rows in range(1, len(ROWS))),
    *({"tokens": tokens, "gradient_checkpointing": "on"} for tokens in (64, 4096)),
]


@pytest.mark.parametrize(
    ("p", "private"),
    [
        pytest.param(0.05, {}, id="0.05"),
        pytest.param(0.5, PRIVATE, id="0.5-private"),
        pytest.param(0.5, {}, id="0.5", marks=pytest.mark.thorough),
        pytest.param(0.05, PRIVATE, id="0.05-private", marks=pytest.mark.thorough),
    ],
)
def test_the_layout_of_a_pass_changes_no_gradient(tiny_model, p, private):
    whole = gradient(make_trainer(tiny_model, lora_dropout=p, **private))
    assert difference(gradient(make_trainer(tiny_model, lora_dropout=0.0, **private)), whole) > 0.02
    for layout in LAYOUTS:
        found = gradient(make_trainer(tiny_model, lora_dropout=p, **layout, **private))
        assert difference(found, whole) < 1e-6, layout


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_running_out_of_memory_in_the_middle_of_a_step_changes_no_gradient(tiny_model, monkeypatch, p):
    whole = gradient(make_trainer(tiny_model, lora_dropout=p))
    backward, sizes = local_training.backward_loss, []

    def exhausted(base, batch, *, scale):
        sizes.append(len(batch.ids))
        loss = backward(base, batch, scale=scale)
        if len(sizes) == 2:
            raise MemoryError
        return loss

    monkeypatch.setattr(local_training, "backward_loss", exhausted)
    trainer = make_trainer(tiny_model, 256, lora_dropout=p)
    assert difference(gradient(trainer), whole) < 1e-6
    assert [reduction.tokens_per_pass for reduction in trainer.book.layout.reductions] == [128]
    assert sizes[:2] != sizes[2:4], "the second attempt was laid out as the first"


def test_a_base_that_can_share_a_prefix_shares_none_under_dropout(tiny_model):
    rows = [Row("ask " + "y" * 60 + "x" * i, "", "yes", "c") for i in range(8)]
    trainer, prefixes = make_trainer(tiny_model), []
    assert trainer.base.can.shared_prefix
    hook = trainer.base.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: prefixes.append(kwargs.get("past_key_values")), with_kwargs=True
    )
    gradient(trainer, rows=rows)
    assert prefixes == [None] * len(prefixes)
    hook.remove()
    single = gradient(make_trainer(tiny_model, local_micro_batch_size=1), rows=rows)
    assert difference(gradient(make_trainer(tiny_model), rows=rows), single) < 1e-6


def test_other_seeds_rounds_clients_and_steps_draw_other_noise_and_equal_ones_the_same(tiny_model):
    # one row for all, in every step: nothing but the noise tells the gradients apart
    rows, trainer = ROWS[:1], make_trainer(tiny_model, lora_dropout=0.5)
    first = gradient(trainer, rows=rows)
    assert difference(gradient(trainer, rows=rows), first) == 0
    others = [
        gradient(trainer, rows=rows, round_number=2),
        gradient(trainer, rows=rows, client_id=1),
        gradient(make_trainer(tiny_model, lora_dropout=0.5, seed=43), rows=rows),
        # the mean over two steps at a rate of almost zero
        gradient(make_trainer(tiny_model, lora_dropout=0.5, local_num_epochs=2, local_learning_rate=1e-30), rows=rows),
    ]
    for one, other in itertools.combinations([first, *others], 2):
        assert difference(one, other) > 0.1


def test_private_dropout_is_drawn_from_the_secret_and_not_from_the_public_seed(tiny_model):
    options = {**PRIVATE, "lora_dropout": 0.5}
    first = gradient(make_trainer(tiny_model, **options))
    assert difference(gradient(make_trainer(tiny_model, seed=43, **options)), first) == 0
    assert difference(gradient(make_trainer(tiny_model, secret=bytes(32), **options)), first) > 0.1
