"""What must be the same on a GPU as on the CPU: `make test-gpu`. Every check runs on the CPU as well, by default.

Comparisons are in float32, where a GPU's products differ from the CPU's by rounding only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fedlora.config.train import TrainConfig
from fedlora.federated.privacy.randomness import Secret
from fedlora.llm import local_training
from fedlora.llm.abilities import ALWAYS
from fedlora.llm.base_model import BaseModel, load_base_model
from fedlora.llm.decoding import Decoding
from fedlora.llm.dropout import DropoutNoise
from fedlora.llm.examples import Example
from fedlora.llm.generation import Request, generate_answers
from fedlora.llm.layout import Layout, LayoutBook
from fedlora.llm.local_training import Trainer
from fedlora.llm.lora import LoraModel, LoraSpec
from fedlora.llm.memory import available_memory, is_out_of_memory, plan_layout
from fedlora.stages import train
from fedlora.types import Phase


def on_cuda(value: object, count: int = 1):
    """A parameter that needs so many CUDA devices."""
    found = torch.cuda.device_count()
    lacking = pytest.mark.skipif(found < count, reason=f"needs {count} CUDA device(s), found {found}")
    return pytest.param(value, marks=[pytest.mark.gpu, lacking])


both = pytest.mark.parametrize("device", ["cpu", on_cuda("cuda")])

OPTIONS = {"local_batch_size": 64, "local_num_epochs": 1, "lora_dropout": 0.05, "max_grad_norm": 0.0}
TARGETS = ("q_proj", "v_proj", "down_proj")


def load(model: Path, device: str, **how) -> BaseModel:
    return load_base_model(str(model), device=device, **{"dtype": "float32", **how})


def adapt(base: BaseModel, dropout: float = 0.05) -> LoraModel:
    lora = LoraModel(base.model, LoraSpec(4, 16, 4.0, dropout, TARGETS))
    lora.set_adapter(start_of(lora))
    return lora


def start_of(lora: LoraModel) -> dict[str, torch.Tensor]:
    """The same adapter on every device, both of whose factors have a gradient."""
    draw = torch.Generator().manual_seed(3)
    return {key: 0.3 * torch.randn(shape, generator=draw) for key, shape in sorted(lora.shapes().items())}


def examples(count: int, length: int, *, ragged: bool = True) -> list[Example]:
    """Rows of at most `length` tokens, nearly all of them labels."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 259, (count, length), generator=draw).tolist()
    ends = [length - 3 * number % (length // 2) if ragged else length for number in range(count)]
    return [Example(row[:end], 4) for row, end in zip(ids, ends, strict=True)]


def make_trainer(model: Path, device: str, tokens: int = 4096, **changes) -> Trainer:
    config = TrainConfig.of(**{**OPTIONS, **changes})
    base = load(model, device, quantization=config.quantization)
    layout = Layout(tokens, config.gradient_checkpointing == "on")
    return Trainer(base, adapt(base, config.lora_dropout), config, LayoutBook(layout), Secret(bytes(32)))


def gradient(trainer: Trainer, rows: list[Example]) -> dict[str, torch.Tensor]:
    """The gradient of one optimizer step."""
    start = start_of(trainer.lora)
    trained = trainer.train(Phase(start), rows, round_number=1, client_id=0, needs_gradient=True)
    assert (trained.num_steps, trained.mean_gradient is None) == (1, False)
    return dict(trained.mean_gradient or {})


def difference(first, second) -> float:
    """Relative, over all tensors together."""
    gap = sum(float((first[key].cpu() - second[key].cpu()).norm()) ** 2 for key in second) ** 0.5
    return gap / sum(float(value.norm()) ** 2 for value in second.values()) ** 0.5


@both
def test_a_base_lies_on_its_device_and_finds_a_layout_there(tiny_model, device):
    base = load(tiny_model, device, dtype="auto")
    lora = adapt(base)
    assert {parameter.device.type for parameter in base.model.parameters()} == {device}
    assert all(value.device.type == "cpu" for value in lora.get_adapter().values())
    assert available_memory(base.device) > 0
    assert plan_layout(base, lora, TrainConfig.of()).tokens_per_pass >= 512
    assert (base.can.head, base.can.shared_prefix) == ("linear", ALWAYS)


@both
def test_logits_are_the_cpu_s(tiny_model, device):
    ids = torch.arange(3, 103).view(4, 25)
    found = []
    for where in (device, "cpu"):
        base = load(tiny_model, where)
        adapt(base)
        with torch.no_grad():
            found.append({"logits": base.head(base.hidden(ids.to(base.device)))})
    assert difference(*found) < 1e-5


@both
def test_dropout_draws_the_same_bits(device):
    drawn = []
    for where in (device, "cpu"):
        noise = DropoutNoise(0.3, 2)
        noise.begin_pass([1, 2**62, 77], torch.device(where))
        drawn.append(noise.draw(1, torch.zeros(3, 40, 20, device=where)).cpu())
    assert torch.equal(*drawn)


@both
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": "on"},
        {"lora_dropout": 0.0},
        {"dp_example_clip": 0.5, "dp_example_noise_multiplier": 0.1},
    ],
    ids=["dropout", "checkpointing", "plain", "private"],
)
def test_a_step_has_the_cpu_s_gradient(tiny_model, device, changes):
    rows = examples(16, 60)
    found = gradient(make_trainer(tiny_model, device, 400, **changes), rows)
    assert difference(found, gradient(make_trainer(tiny_model, "cpu", **changes), rows)) < 1e-4


@both
def test_answers_are_the_cpu_s(tiny_model, device):
    requests = [Request(example.ids, row) for row, example in enumerate(examples(9, 40))]
    answers = []
    for where in (device, "cpu"):
        base = load(tiny_model, where)
        adapt(base)
        answers.append(generate_answers(base, requests, Decoding(20), tokens_per_pass=4096))
    assert answers[0] == answers[1]
    assert any(answers[0])


@contextlib.contextmanager
def room_for_less(tokens: int, device: str, take: Callable[[int], object], monkeypatch) -> Iterator[None]:
    """Leave no room for a pass of so many tokens, but for one of a quarter.

    A GPU's allocator is held to the middle between the two peaks of `take(tokens)`. The CPU's knows no such limit:
    there a larger pass raises what the allocator would.
    """
    if device == "cpu":
        backward = local_training.backward_loss

        def limited(base, batch, *, scale):
            loss = backward(base, batch, scale=scale)
            if batch.ids.numel() > tokens // 4:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return loss

        monkeypatch.setattr(local_training, "backward_loss", limited)
        yield
        return
    peaks = []
    for budget in (tokens // 4, tokens):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        take(budget)
        peaks.append(torch.cuda.max_memory_reserved())
    assert peaks[0] < 0.6 * peaks[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(sum(peaks) / 2 / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@both
def test_running_out_of_memory_halves_the_pass_and_changes_no_gradient(tiny_model, device, monkeypatch):
    count, length = (16, 128) if device == "cpu" else (64, 512)
    rows, tokens = examples(count, length, ragged=False), count * length
    trainer = make_trainer(tiny_model, device)

    def take(budget: int) -> dict[str, torch.Tensor]:
        trainer.book = LayoutBook(Layout(budget))
        return gradient(trainer, rows)

    expected = take(tokens)
    assert not trainer.book.layout.reductions
    with room_for_less(tokens, device, take, monkeypatch):
        found = take(tokens)
    (reduction,) = trainer.book.layout.reductions
    assert reduction.tokens_per_pass in (tokens // 2, tokens // 4)
    assert difference(found, expected) < 1e-4


@both
def test_a_device_s_own_error_is_known_for_lack_of_memory(device):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(2**55, dtype=torch.uint8, device=device)
    assert is_out_of_memory(caught.value)


@both
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_has_the_cpu_s_gradient(tiny_model, device, kind):
    pytest.importorskip("bitsandbytes")
    rows = examples(8, 60)
    found, expected = (gradient(make_trainer(tiny_model, where, quantization=kind), rows) for where in (device, "cpu"))
    # a weight in the middle between two levels may be rounded to the other one
    assert difference(found, expected) < 1e-2


@pytest.mark.parametrize(
    "devices", [pytest.param(("cpu", "cpu"), marks=pytest.mark.thorough), on_cuda(("cuda:0", "cuda:1"), count=2)]
)
def test_two_devices_leave_the_bytes_of_one(tiny_model, make_clients, tmp_path, devices):
    common = {
        "base_model": str(tiny_model),
        "data_path": make_clients([3, 3, 3]),
        "model_dir": tmp_path / "models",
        "num_clients": 3,
        "client_selection_frac": 1.0,
        "num_communication_rounds": 1,
        "local_num_epochs": 1,
        "prompt_template": "chat",
    }
    alone = train.run(TrainConfig.of(**common, exp_name="alone", device=devices[0])).root
    together = train.run(TrainConfig.of(**common, exp_name="together", devices=devices)).root
    files = [path.relative_to(alone) for name in ("*.bin", "*.safetensors") for path in alone.rglob(name)]
    assert len(files) > 3
    assert all((together / file).read_bytes() == (alone / file).read_bytes() for file in files)
