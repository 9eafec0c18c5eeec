"""Local training against PEFT's layers and torch's optimizers, for Linear and for GPT-2's Conv1D.

The oracle shares no code with the trainer but the order of the rows: PEFT's model, whole padded batches, full logits,
and the terms of a method added to the gradient by hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from fedlora.config.train import TrainConfig
from fedlora.federated.adapters import pick_half
from fedlora.llm.base_model import load_base_model
from fedlora.llm.examples import encode_rows, order_steps
from fedlora.llm.layout import Layout, LayoutBook
from fedlora.llm.local_gradient import GradientTerms
from fedlora.llm.local_training import Trainer
from fedlora.llm.lora import LoraModel, LoraSpec
from fedlora.llm.prompts import PromptEncoder
from fedlora.rows import Row
from fedlora.types import Phase

ROWS = [Row("ask " + "x" * (7 * i % 20), "", "yes" * (1 + i % 3), "c") for i in range(7)]
TARGETS = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("c_attn", "c_proj", "c_fc")}
OPTIONS = {"local_batch_size": 3, "local_num_epochs": 1, "lora_dropout": 0.0, "weight_decay": 0.1}
TOLERANCE = {"sgd": 5e-5, "adamw": 1e-3}
"""Of the way gone: Adam's first steps are as long where a gradient is rounding only."""
RATES = {"sgd": 0.05, "adamw": 1e-2}


@pytest.fixture(scope="module")
def gpt2(tiny_model: Path, tmp_path_factory) -> Path:
    """A two-layer GPT-2: Conv1D layers, wide, tall and square, some with as many inputs as the larger rank."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sizes = {"n_positions": 128, "n_embd": 16, "n_layer": 2, "n_head": 2}
    torch.manual_seed(0)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **sizes, **quiet)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def base_of(tiny_model, gpt2):
    return {"llama": tiny_model, "gpt2": gpt2}.__getitem__


def make_trainer(folder: Path, family: str, rank: int, optimizer: str) -> Trainer:
    config = TrainConfig.of(**OPTIONS, local_optimizer=optimizer, local_learning_rate=RATES[optimizer])
    base = load_base_model(str(folder), device="cpu", dtype="float32")
    spec = LoraSpec(rank, 12, 12 / rank, 0.0, TARGETS[family])
    return Trainer(base, LoraModel(base.model, spec), config, LayoutBook(Layout(4096, False)))


def drawn(shapes, seed: int, size: float = 0.2) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=draw) * size for key, shape in sorted(shapes.items())}


def make_phase(shapes, kind: str) -> Phase:
    """A start with a B that is not zero, and the terms of a method."""
    start = drawn(shapes, 1)
    return {
        "plain": Phase(start),
        "prox": Phase(start, proximal_mu=3.0, anchor=drawn(shapes, 2)),
        "scaffold": Phase(start, correction=drawn(shapes, 3, 0.5)),
        "B": Phase(start, trainable="B"),
        "A": Phase(start, trainable="A"),
    }[kind]


def peft_loop(folder: Path, trainer: Trainer, phase: Phase):
    """The same steps on PEFT's model; (adapter, mean gradient that the optimizer got, less the correction)."""
    from peft import LoraConfig, get_peft_model

    spec, config = trainer.lora.spec, trainer.config
    settings = LoraConfig(
        r=spec.r,
        lora_alpha=int(spec.alpha),
        target_modules=list(spec.target_modules),
        task_type="CAUSAL_LM",
        fan_in_fan_out="c_attn" in spec.target_modules,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings).train()
    named = {name.replace(".default", ""): value for name, value in model.named_parameters() if "lora_" in name}
    assert named.keys() == phase.start.keys()
    with torch.no_grad():
        for key, value in named.items():
            value.copy_(phase.start[key])
    learning = pick_half(named, phase.trainable)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[config.local_optimizer]
    optimizer = kind(learning.values(), lr=config.local_learning_rate, weight_decay=config.weight_decay)
    steps = order_steps(examples_of(trainer), batch_size=3, seed=config.seed, round_number=1, client_id=0, epoch=0)
    total = {key: torch.zeros_like(value) for key, value in learning.items()}
    for rows in steps:
        model.zero_grad()
        loss_of(model, rows).backward()
        for key, factor in learning.items():
            if phase.anchor is not None:
                factor.grad += phase.proximal_mu * (factor.detach() - phase.anchor[key])
            if phase.correction is not None:
                factor.grad += phase.correction[key]
        torch.nn.utils.clip_grad_norm_(learning.values(), config.max_grad_norm)
        for key, factor in learning.items():
            total[key] += factor.grad - (0 if phase.correction is None else phase.correction[key])
        optimizer.step()
    adapter = {key: value.detach().clone() for key, value in named.items()}
    return adapter, {key: value / len(steps) for key, value in total.items()}


def loss_of(model, rows) -> torch.Tensor:
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([list(row.ids) + [0] * (longest - len(row.ids)) for row in rows])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows])
    labels = torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        labels[index, row.labels_from : len(row.ids)] = torch.tensor(row.ids[row.labels_from :])
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def examples_of(trainer: Trainer):
    return encode_rows(ROWS, PromptEncoder(trainer.base.tokenizer, "chat"), cutoff=128).examples


def check_training(folder: Path, family: str, *, rank: int = 4, optimizer: str = "sgd", kind: str = "plain") -> None:
    """Where the trainer and the loop on PEFT's model end, and their mean gradients, are the same."""
    trainer = make_trainer(folder, family, rank, optimizer)
    phase = make_phase(trainer.lora.shapes(), kind)
    wanted, slope = peft_loop(folder, trainer, phase)
    found = trainer.train(phase, examples_of(trainer), round_number=1, client_id=0, needs_gradient=True)
    assert found.num_steps == 3
    assert found.mean_gradient is not None
    for state, other, way in ((found.adapter, wanted, phase.start), (found.mean_gradient, slope, {})):
        assert state.keys() == other.keys()
        for key, value in other.items():
            size = float((value - way[key]).norm() if key in way else value.norm())
            assert float((state[key] - value).norm()) <= TOLERANCE[optimizer] * size + 1e-7, key
    idle = phase.start.keys() - pick_half(phase.start, phase.trainable).keys()
    assert all(torch.equal(found.adapter[key], phase.start[key]) for key in idle)


@pytest.mark.parametrize("kind", ["plain", "prox", "scaffold", "B", "A"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_local_training_is_peft_s_layers_under_torch_s_optimizers(base_of, family, optimizer, kind):
    check_training(base_of(family), family, optimizer=optimizer, kind=kind)


def test_it_is_where_the_rank_is_the_number_of_inputs(base_of):
    check_training(base_of("gpt2"), "gpt2", rank=16)


def test_half_of_the_factors_trained_has_half_of_the_moments(base_of):
    trainer = make_trainer(base_of("llama"), "llama", 4, "adamw")
    trainer.config = trainer.config.model_copy(update={"optimizer_state": "keep"})
    phase = make_phase(trainer.lora.shapes(), "B")
    moments = trainer.train(phase, examples_of(trainer), round_number=1, client_id=0).moments
    assert moments
    assert not [key for key in moments if ".lora_A." in key]


def scaled_by(choose):
    """Layers whose scaling is another than alpha / r."""

    def fault(monkeypatch) -> None:
        build = LoraModel.set_adapter

        def set_adapter(self, state, **options):
            build(self, state, **options)
            for layer in self.layers.values():
                layer.scaling = choose(self.spec)

        monkeypatch.setattr(LoraModel, "set_adapter", set_adapter)

    return fault


def terms_forgotten(monkeypatch) -> None:
    """What a method adds to the gradient, added to nothing."""
    monkeypatch.setattr(GradientTerms, "add", lambda self: None)


def counted_before_clipping(monkeypatch) -> None:
    """The mean of gradients that the optimizer never gets."""
    add, count = GradientTerms.add, GradientTerms.count

    def add_and_count(self) -> None:
        add(self)
        count(self)

    monkeypatch.setattr(GradientTerms, "add", add_and_count)
    monkeypatch.setattr(GradientTerms, "count", lambda self: None)


def conv1d_transposed(monkeypatch) -> None:
    """The gradient of a square factor the wrong way round, as of a Conv1D taken for a Linear."""
    read = LoraModel.get_adapter

    def get_adapter(self):
        return {
            key: value.T.contiguous() if value.shape[0] == value.shape[1] else value
            for key, value in read(self).items()
        }

    monkeypatch.setattr(LoraModel, "get_adapter", get_adapter)


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        (scaled_by(lambda spec: 1.0), {"family": "llama"}),
        (scaled_by(lambda spec: 1.0), {"family": "gpt2"}),
        (scaled_by(lambda spec: spec.alpha), {"family": "gpt2"}),
        (terms_forgotten, {"family": "llama", "kind": "prox"}),
        (terms_forgotten, {"family": "llama", "kind": "scaffold"}),
        (counted_before_clipping, {"family": "llama", "kind": "scaffold"}),
        (conv1d_transposed, {"family": "gpt2", "rank": 16}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "-".join(map(str, value.values())),
)
def test_a_known_fault_of_training_is_caught(base_of, fault, options, monkeypatch):
    check_training(base_of(options["family"]), **options)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check_training(base_of(options["family"]), **options)
