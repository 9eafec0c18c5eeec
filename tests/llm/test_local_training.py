from dataclasses import replace

import pytest
import torch
from lost_signals import lose_signal

from fedlora.config.train import TrainConfig
from fedlora.errors import TrainingError
from fedlora.federated.adapters import make_adapter
from fedlora.llm.base_model import load_base_model
from fedlora.llm.examples import encode_rows
from fedlora.llm.layout import Layout, LayoutBook
from fedlora.llm.local_training import Trainer
from fedlora.llm.lora import LoraModel, LoraSpec
from fedlora.llm.loss import backward_loss
from fedlora.llm.prompts import PromptEncoder
from fedlora.methods.scaffold import CONTROL, ControlledTraining
from fedlora.rows import Row
from fedlora.stopping import stop_on_signals
from fedlora.types import ClientMemory, Download, LocalResult, Phase

ROWS = [Row("ask " + "x" * (7 * i % 40), "", "yes" * (1 + i % 5), "c") for i in range(12)]
DEFAULTS = {"local_batch_size": 5, "local_num_epochs": 2, "local_learning_rate": 1e-2, "lora_dropout": 0.0}


def make_trainer(tiny_model, dtype="float32", **changes) -> Trainer:
    config = TrainConfig.of(**{**DEFAULTS, **changes})
    base = load_base_model(str(tiny_model), device="cpu", dtype=dtype)
    spec = LoraSpec(4, 16, 4.0, config.lora_dropout, ("q_proj", "v_proj", "down_proj"))
    layout = Layout(config.tokens_per_pass or 4096, config.gradient_checkpointing == "on")
    return Trainer(base, LoraModel(base.model, spec), config, LayoutBook(layout))


def examples_of(trainer: Trainer, rows=ROWS):
    return encode_rows(rows, PromptEncoder(trainer.base.tokenizer, "chat"), cutoff=128).examples


def train(trainer: Trainer, rounds: int = 1, client: int = 0):
    adapter, moments = make_adapter(trainer.lora.shapes(), 0), None
    for number in range(1, rounds + 1):
        trained = trainer.train(
            Phase(adapter), examples_of(trainer), round_number=number, client_id=client, moments=moments
        )
        adapter, moments = trained.adapter, trained.moments or None
    return trained


def close(first, second, tolerance=1e-5) -> bool:
    return all(
        float((first[key] - second[key]).norm()) <= tolerance * float(second[key].norm() + 1e-12) for key in second
    )


def plain_padded_loop(trainer: Trainer):
    """The textbook loop: whole padded batches, full logits, mean over the labels; an independent oracle."""
    from fedlora.llm.examples import order_steps

    lora, config = trainer.lora, trainer.config
    lora.set_adapter(make_adapter(lora.shapes(), 0))
    factors = [factor for _, factor in lora.named_factors()]
    optimizer = torch.optim.AdamW(factors, lr=config.local_learning_rate, weight_decay=0.0)
    examples = examples_of(trainer)
    for epoch in range(config.local_num_epochs):
        steps = order_steps(
            examples, batch_size=config.local_batch_size, seed=config.seed, round_number=1, client_id=0, epoch=epoch
        )
        for rows in steps:
            longest = max(len(row.ids) for row in rows)
            ids = torch.tensor([list(row.ids) + [0] * (longest - len(row.ids)) for row in rows])
            mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows])
            labels = torch.full_like(ids, -100)
            for index, row in enumerate(rows):
                labels[index, row.labels_from : len(row.ids)] = torch.tensor(row.ids[row.labels_from :])
            logits = lora.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(factors, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return lora.get_adapter()


@pytest.mark.parametrize("changes", [{"tokens_per_pass": 1}, {"tokens_per_pass": 100}, {"local_micro_batch_size": 2}])
def test_the_trained_adapter_is_the_same_for_any_layout(tiny_model, changes):
    whole = train(make_trainer(tiny_model))
    cut = train(make_trainer(tiny_model, **changes))
    assert close(cut.adapter, whole.adapter)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
    assert (cut.num_steps, cut.num_tokens, cut.num_labels) == (whole.num_steps, whole.num_tokens, whole.num_labels)


def test_the_gradient_is_the_same_for_any_layout_and_chunk(tiny_model, monkeypatch):
    from fedlora.llm import loss
    from fedlora.llm.examples import make_batch

    trainer = make_trainer(tiny_model)
    adapter = {key: torch.randn_like(value) * 0.1 for key, value in make_adapter(trainer.lora.shapes(), 0).items()}
    trainer.lora.set_adapter(adapter)
    examples = examples_of(trainer)
    labels = sum(example.num_labels for example in examples)

    def gradient(groups):
        for _, factor in trainer.lora.named_factors():
            factor.grad = None
        total = sum(
            float(backward_loss(trainer.base, make_batch(group, pad_id=0), scale=1 / labels)) for group in groups
        )
        return total, {key: factor.grad.clone() for key, factor in trainer.lora.named_factors()}

    whole_loss, whole = gradient([examples])
    single_loss, single = gradient([[example] for example in examples])
    monkeypatch.setattr(loss, "LOGIT_BYTES", {"cpu": 3 * 259 * 12})
    chunk_loss, chunked = gradient([examples])
    others = [(single_loss, single), (chunk_loss, chunked)]
    for head in ("own", "model"):
        monkeypatch.setattr(trainer, "base", replace(trainer.base, can=replace(trainer.base.can, head=head)))
        others.append(gradient([examples]))
    for other_loss, other in others:
        assert other_loss == pytest.approx(whole_loss, rel=1e-5)
        assert close(other, whole)


def test_training_equals_a_plain_padded_loop(tiny_model):
    trainer = make_trainer(tiny_model)
    assert close(train(trainer).adapter, plain_padded_loop(trainer))


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.3])
def test_scaffold_s_control_is_option_ii_of_the_paper_where_clipping_acts_and_where_not(tiny_model, max_grad_norm):
    trainer = make_trainer(tiny_model, local_optimizer="sgd", local_learning_rate=4.0, max_grad_norm=max_grad_norm)
    start = make_adapter(trainer.lora.shapes(), 0)
    draw = torch.Generator().manual_seed(1)
    shared, own = ({key: 0.01 * torch.randn(value.shape, generator=draw) for key, value in start.items()} for _ in "ck")
    download, memory = Download(start, extra={CONTROL: shared}), ClientMemory(slots={CONTROL: own})
    rule = ControlledTraining()
    (phase,) = rule.phases(download, memory)
    trained = trainer.train(phase, examples_of(trainer), round_number=1, client_id=0, needs_gradient=True)
    _, after = rule.upload([LocalResult(trained.adapter, trained.mean_gradient)], download, memory)
    way = {key: (start[key].double() - trained.adapter[key].double()) / (4.0 * trained.num_steps) for key in start}
    option_ii = {key: own[key].double() - shared[key].double() + way[key] for key in start}
    assert trained.num_steps == 6
    assert (norm_of(way) < 0.3) == bool(max_grad_norm)
    assert close({"all": flat(after.slots[CONTROL])}, {"all": flat(option_ii)}, 1e-6)


def flat(state) -> torch.Tensor:
    return torch.cat([state[key].double().flatten() for key in sorted(state)])


def norm_of(state) -> float:
    return float(flat(state).norm())


def test_a_memorised_row_lowers_the_loss_and_validation_agrees_with_the_base(tiny_model):
    trainer = make_trainer(tiny_model)
    examples = examples_of(trainer)
    start = make_adapter(trainer.lora.shapes(), 0)
    before = trainer.validate(start, [examples])
    assert before == pytest.approx(trainer.validate(None, [examples]), rel=1e-6)
    trained = train(trainer, rounds=4)
    assert trainer.validate(trained.adapter, [examples]) < before - 0.3


def test_equal_coordinates_give_equal_bits_and_the_global_generator_is_left_alone(tiny_model):
    trainer = make_trainer(tiny_model, lora_dropout=0.1)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = train(trainer)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(99)
    second = train(trainer)
    assert all(torch.equal(first.adapter[key], second.adapter[key]) for key in first.adapter)
    other = train(trainer, client=1)
    assert any(not torch.equal(first.adapter[key], other.adapter[key]) for key in first.adapter)


def test_kept_moments_continue_the_optimizer_and_reset_ones_do_not(tiny_model):
    kept = train(make_trainer(tiny_model, optimizer_state="keep"), rounds=2)
    reset = train(make_trainer(tiny_model), rounds=2)
    assert not close(kept.adapter, reset.adapter)
    steps = {float(value) for key, value in kept.moments.items() if key.endswith(":step")}
    assert steps == {12.0}
    assert not reset.moments


def test_two_kept_rounds_equal_one_round_of_an_unbroken_optimizer(tiny_model):
    """With the same rows in the same order, keeping the moments makes a round boundary invisible."""
    trainer = make_trainer(tiny_model, optimizer_state="keep", local_num_epochs=1, local_batch_size=12)
    two = train(trainer, rounds=2)
    trainer.config = TrainConfig.of(**{**DEFAULTS, "local_num_epochs": 2, "local_batch_size": 12})
    one = train(trainer)
    assert close(two.adapter, one.adapter)


def test_divergence_is_an_error_that_names_the_step(tiny_model):
    trainer = make_trainer(tiny_model)
    start = {key: value + float("inf") for key, value in make_adapter(trainer.lora.shapes(), 0).items()}
    with pytest.raises(TrainingError, match="the loss is not a number in step 1 of round 1") as caught:
        trainer.train(Phase(start), examples_of(trainer), round_number=1, client_id=3)
    assert "local_learning_rate" in caught.value.hint


@pytest.mark.usefixtures("handlers")
def test_validation_stops_at_the_next_group_when_a_signal_was_lost(tiny_model, monkeypatch):
    trainer, groups = make_trainer(tiny_model), []
    monkeypatch.setattr(trainer, "_sum_losses", lambda rows, tokens: groups.append(rows) or lose_signal() or 0.0)
    examples = examples_of(trainer)
    with pytest.raises(SystemExit), stop_on_signals():
        trainer.validate(None, [examples[:4], examples[4:]])
    assert len(groups) == 1


def test_a_bfloat16_base_learns_as_well(tiny_model):
    trainer = make_trainer(tiny_model, dtype="bfloat16")
    examples = examples_of(trainer)
    before = trainer.validate(None, [examples])
    assert trainer.validate(train(trainer, rounds=4).adapter, [examples]) < before - 0.3


def test_a_shared_prefix_changes_neither_loss_nor_gradient(tiny_model):
    from fedlora.llm.examples import make_batch

    trainer = make_trainer(tiny_model)
    assert trainer.base.can.shared_prefix
    adapter = {key: torch.randn_like(value) * 0.1 for key, value in make_adapter(trainer.lora.shapes(), 0).items()}
    trainer.lora.set_adapter(adapter)
    found = []
    for share in (False, True):
        batch = make_batch(examples_of(trainer, ROWS * 4), pad_id=0, share_prefix=share)
        for _, factor in trainer.lora.named_factors():
            factor.grad = None
        loss = float(backward_loss(trainer.base, batch, scale=1.0))
        found.append((len(batch.prefix), loss, {key: factor.grad for key, factor in trainer.lora.named_factors()}))
    (none, whole_loss, whole), (shared, loss, gradient) = found
    assert (none, shared) == (0, len("<user\nask "))  # < stands for the control token
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert close(gradient, whole)


def test_rows_share_a_prefix_only_where_nothing_is_predicted_and_where_it_pays():
    from fedlora.llm.examples import Example, shared_prefix

    beginning = list(range(300))
    assert shared_prefix([Example([*beginning, 1], 300), Example([*beginning, 2, 3], 300)]) == 299
    assert shared_prefix([Example([*beginning, 1], 260), Example([*beginning, 2], 300)]) == 259
    assert shared_prefix([Example([0, 1, 2, 3], 3), Example([0, 1, 2, 4], 3)]) == 0
    assert shared_prefix([Example([*beginning[:30], row], 30) for row in range(10)]) == 29
    assert shared_prefix([Example([*beginning[:30], row], 30) for row in range(5)]) == 0
    assert shared_prefix([Example(beginning, 299)]) == 0


def test_a_base_with_dropout_of_its_own_shares_no_prefix(tiny_model, tmp_path):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    base = load_base_model(str(tmp_path), device="cpu")
    assert base.can.head == "linear"
    assert not base.can.shared_prefix
