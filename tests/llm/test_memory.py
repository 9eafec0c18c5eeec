import gc
import subprocess
import sys

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fedlora.config.train import TrainConfig
from fedlora.errors import TrainingError, UsageError
from fedlora.federated.adapters import make_adapter
from fedlora.llm import local_training, memory
from fedlora.llm.base_model import load_base_model
from fedlora.llm.examples import Example, encode_rows, make_batch
from fedlora.llm.layout import Layout, LayoutBook
from fedlora.llm.local_training import Trainer
from fedlora.llm.lora import LoraModel, LoraSpec
from fedlora.llm.prompts import PromptEncoder
from fedlora.rows import Row
from fedlora.types import Phase

ROWS = [Row("ask " + "x" * (7 * i % 40), "", "yes" * (1 + i % 5), "c") for i in range(12)]


def make_trainer(tiny_model, tokens_per_pass=4096, on_change=lambda layout: None, **changes) -> Trainer:
    options = {"local_batch_size": 5, "local_num_epochs": 2, "local_learning_rate": 1e-2, "lora_dropout": 0.0}
    config = TrainConfig.of(**{**options, **changes})
    base = load_base_model(str(tiny_model), device="cpu", dtype="float32")
    lora = LoraModel(base.model, LoraSpec(4, 16, 4.0, config.lora_dropout, ("q_proj", "down_proj")))
    layout = Layout(tokens_per_pass, config.gradient_checkpointing == "on")
    return Trainer(base, lora, config, LayoutBook(layout, on_change))


def train(trainer: Trainer, round_number: int = 1):
    examples = encode_rows(ROWS, PromptEncoder(trainer.base.tokenizer, "chat"), cutoff=128).examples
    start = make_adapter(trainer.lora.shapes(), 0)
    return trainer.train(Phase(start), examples, round_number=round_number, client_id=0)


def same(first, second, tolerance=0.0) -> bool:
    return all(float((first[key] - second[key]).abs().max()) <= tolerance for key in second)


def test_checkpointing_changes_neither_adapter_nor_loss(tiny_model):
    plain, again = train(make_trainer(tiny_model)), train(make_trainer(tiny_model, gradient_checkpointing="on"))
    assert same(again.adapter, plain.adapter, 1e-5)
    assert again.loss == pytest.approx(plain.loss, rel=1e-6)


def test_checkpointing_computes_every_layer_twice_and_only_while_training(tiny_model):
    calls = []
    for asked in ("off", "on"):
        trainer = make_trainer(tiny_model, gradient_checkpointing=asked)
        layer = trainer.base.model.base_model.layers[0]
        handle = layer.mlp.register_forward_pre_hook(lambda *args: calls.append(1))
        train(trainer)
        calls.append(0)
        handle.remove()
        assert not any(getattr(module, "gradient_checkpointing", False) for module in trainer.base.model.modules())
    middle = calls.index(0)
    assert sum(calls[middle:]) == 2 * middle


class Exhausted:
    """Stands for `backward_loss` on a device with room for so many padded tokens."""

    def __init__(self, room: int, error: Exception, before: int = 0) -> None:
        self.room, self.error, self.before = room, error, before
        self.original = local_training.backward_loss

    def __call__(self, base, batch, *, scale):
        loss = self.original(base, batch, scale=scale)
        self.before -= 1
        if batch.ids.numel() > self.room and self.before < 0:
            raise self.error
        return loss


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_the_budget_and_loses_no_step(tiny_model, monkeypatch, error):
    """The failed pass had already added its gradient: what it left must not count twice."""
    told = []
    trainer = make_trainer(tiny_model, 1600, told.append)
    monkeypatch.setattr(local_training, "backward_loss", Exhausted(200, error))
    short = train(trainer)
    reduced = trainer.book.layout
    assert [reduction.tokens_per_pass for reduction in reduced.reductions] == [200]
    assert told == [reduced]
    monkeypatch.undo()
    assert same(short.adapter, train(make_trainer(tiny_model, 200)).adapter)
    assert short.num_steps == 6


def test_a_recorded_reduction_gives_the_same_bytes_without_running_out_of_memory(tiny_model, monkeypatch):
    trainer = make_trainer(tiny_model, 1600, lora_dropout=0.1)
    monkeypatch.setattr(local_training, "backward_loss", Exhausted(200, MemoryError(), before=2))
    first = train(trainer)
    assert trainer.book.layout.reductions[0].step > 0
    monkeypatch.undo()
    again = make_trainer(tiny_model, 1600, lora_dropout=0.1)
    again.book = LayoutBook(Layout.from_record(trainer.book.layout.record()))
    assert same(train(again).adapter, first.adapter)
    unreduced = train(make_trainer(tiny_model, 1600, lora_dropout=0.1))
    assert not same(unreduced.adapter, first.adapter)


def test_a_row_that_does_not_fit_alone_is_one_clear_error(tiny_model, monkeypatch):
    monkeypatch.setattr(local_training, "backward_loss", Exhausted(0, MemoryError()))
    with pytest.raises(TrainingError, match=r"step 1 of round 1: out of memory with one row of \d+ tokens"):
        train(make_trainer(tiny_model))


def test_another_failure_is_not_taken_for_a_lack_of_memory(tiny_model, monkeypatch):
    monkeypatch.setattr(local_training, "backward_loss", Exhausted(200, RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(make_trainer(tiny_model))


def test_the_count_of_kept_bytes_grows_with_what_is_adapted_and_with_the_square_of_a_row(tiny_model):
    counts = {}
    for targets in (("q_proj",), ("all-linear",)):
        base = load_base_model(str(tiny_model), device="cpu", dtype="float32")
        lora = LoraModel(base.model, LoraSpec(4, 16, 4.0, 0.0, targets))
        for length in (32, 64, 128):
            counts[targets, length] = memory.count_kept_bytes(base, lora, length)
    assert counts[("all-linear",), 64] > counts[("q_proj",), 64]
    short, middle, long = (counts[("q_proj",), length] for length in (32, 64, 128))
    # a token costs a constant, and in each of two layers four bytes per head and token of the row at least once
    assert long - middle == pytest.approx(2 * (middle - short), rel=0.05)
    assert middle - short >= 2 * 4 * 4 * 32


def test_the_count_is_what_a_pass_really_takes(tiny_model):
    """Counted against the bytes of every tensor that is alive before and after a forward pass."""
    base = load_base_model(str(tiny_model), device="cpu", dtype="float32")
    lora = LoraModel(base.model, LoraSpec(4, 16, 4.0, 0.0, ("q_proj", "down_proj")))
    counted = memory.count_kept_bytes(base, lora, 128) * 128
    batch = make_batch([Example(list(range(128)), 127)], pad_id=0)
    with torch.profiler.profile(profile_memory=True) as profiler:
        hidden = base.hidden(batch.ids)
    taken = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    assert hidden.shape == (1, 128, 32)
    assert counted == pytest.approx(taken, rel=0.15)


def test_a_model_whose_layout_was_planned_leaves_memory_with_its_last_owner(tiny_model):
    trainer = make_trainer(tiny_model)
    memory.plan_layout(trainer.base, trainer.lora, TrainConfig.of())
    train(trainer)
    # not the parameters: their Python halves end while autograd still holds what they stand for
    weights = [StorageWeakRef(parameter.untyped_storage()) for parameter in trainer.base.model.parameters()]
    del trainer
    gc.collect()
    assert [weight.expired() for weight in weights] == [True] * len(weights)


def plan(tiny_model, monkeypatch, gigabytes: float, **changes) -> Layout:
    trainer = make_trainer(tiny_model)
    monkeypatch.setattr(memory, "available_memory", lambda device: int(gigabytes * 1e9))
    return memory.plan_layout(trainer.base, trainer.lora, TrainConfig.of(**changes))


def test_plenty_of_memory_gives_the_useful_budget_and_little_gives_less(tiny_model, monkeypatch):
    monkeypatch.setattr(memory, "LOGIT_BYTES", {"cpu": 0})
    assert plan(tiny_model, monkeypatch, 100) == Layout(2048)
    small = plan(tiny_model, monkeypatch, 0.06)
    assert small.tokens_per_pass % memory.STEP_TOKENS == 0
    assert 512 < small.tokens_per_pass < 2048
    assert not small.gradient_checkpointing


def test_short_memory_turns_checkpointing_on_unless_it_is_forbidden(tiny_model, monkeypatch):
    monkeypatch.setattr(memory, "LOGIT_BYTES", {"cpu": 0})
    auto = plan(tiny_model, monkeypatch, 0.025)
    assert auto.gradient_checkpointing
    never = plan(tiny_model, monkeypatch, 0.025, gradient_checkpointing="off")
    assert never == Layout(512)
    assert auto.tokens_per_pass > never.tokens_per_pass
    assert plan(tiny_model, monkeypatch, 100, gradient_checkpointing="on") == Layout(2048, True)


def test_a_budget_that_is_given_is_kept(tiny_model, monkeypatch):
    assert plan(tiny_model, monkeypatch, 0.001, tokens_per_pass=3000).tokens_per_pass == 3000
    assert plan(tiny_model, monkeypatch, 100, tokens_per_pass=50, gradient_checkpointing="off") == Layout(50)


def test_a_batch_of_generation_takes_what_its_cache_may_take(tiny_model, monkeypatch):
    base = make_trainer(tiny_model).base
    assert memory.count_cache_bytes(base) == 2 * 2 * 2 * 8 * 4  # keys and values, layers, groups, width, float32
    for free, tokens in ((1e9, 16384), (512 * 2 * 256 / 0.5, 512), (1, 256)):
        monkeypatch.setattr(memory, "available_memory", lambda device, free=free: free)
        assert memory.plan_batch(base) == tokens


def test_checkpointing_asked_of_a_model_without_it_is_refused(tiny_model, monkeypatch):
    trainer = make_trainer(tiny_model)
    monkeypatch.setattr(type(trainer.base.model), "supports_gradient_checkpointing", False)
    with pytest.raises(UsageError, match="gradient_checkpointing=on"):
        memory.plan_layout(trainer.base, trainer.lora, TrainConfig.of(gradient_checkpointing="on"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a limit on the address space is Linux's")
def test_the_cpu_allocator_s_own_error_is_recognised():
    """In a process that may take no more address space; a real failure, not one of our making."""
    program = (
        "import resource, torch\n"
        "from fedlora.llm.memory import is_out_of_memory\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))\n"
        "try:\n    torch.empty(2**30)\n"
        "except RuntimeError as error:\n    assert is_out_of_memory(error), error\n    print('recognised')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "recognised\n", done.stderr
