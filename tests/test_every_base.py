"""Small models of every architecture: their answers, losses and gradients are transformers', or they are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import every_base
import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlora.config.generate import GenerateConfig
from fedlora.config.prompting import PromptSettings
from fedlora.config.runs import VerifyConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.llm.base_model import load_base_model
from fedlora.llm.decoding import Decoding, Request
from fedlora.llm.examples import encode_rows, make_batch, make_encoder
from fedlora.llm.generation import generate_answers
from fedlora.llm.loss import sum_loss
from fedlora.rows import Row
from fedlora.stages import generate, train, verify

STALE = "run `python tools/every_base.py`, then `make docs`"


@pytest.fixture(scope="module")
def kept():
    return json.loads(every_base.RESULTS.read_text(encoding="utf-8"))


def test_every_architecture_has_a_result(kept):
    assert list(kept["results"]) == sorted(ARCHITECTURES), STALE
    assert len(ARCHITECTURES) >= 45
    assert kept["transformers"].split(".")[0] == transformers.__version__.split(".")[0]


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_an_architecture_gives_its_own_results_or_is_refused(name, kept, tiny_model: Path, tmp_path):
    found = every_base.try_base(name, tiny_model, tmp_path / "base")
    if kept["transformers"] == transformers.__version__:
        # how far a refused base is off depends on the processor, in its last digit
        assert without_sizes(found) == without_sizes(kept["results"][name]), STALE


def without_sizes(result: dict[str, str]) -> dict[str, str]:
    return {name: re.sub(r"\d[\d.]*e[+-]?\d+", "-", text) for name, text in result.items()}


def leave_out_the_chat_template(tokenizer, model):
    tokenizer.chat_template = None


def have_no_end(tokenizer, model):
    tokenizer.eos_token = None


def pad_with_the_end(tokenizer, model):
    tokenizer.pad_token = tokenizer.eos_token


def add_tokens(tokenizer, model):
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<note>"]})
    tokenizer.add_tokens(["north", "say"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [leave_out_the_chat_template, have_no_end, pad_with_the_end, add_tokens])
def test_any_tokenizer_gives_answers_and_losses_of_its_own(change, tiny_model: Path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    own = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    change(tokenizer, own)
    tokenizer.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    base = load_base_model(str(tmp_path), device="cpu", dtype="float32")
    settings = PromptSettings("alpaca" if tokenizer.chat_template is None else "chat")
    encoder = make_encoder(base.tokenizer, settings)
    rows = [Row("say " + "x" * count, "", "north and south", "c") for count in (3, 30, 9)]
    prompts = [list(encoder.question(row, cutoff=512, context=base.context, max_new_tokens=8).ids) for row in rows]
    requests = [Request(prompt, number) for number, prompt in enumerate(prompts)]
    found = generate_answers(base, requests, Decoding(8), tokens_per_pass=4096)
    assert found == [every_base.generate_alone(own, prompt, 8) for prompt in prompts]
    examples = encode_rows(rows, encoder, cutoff=512).examples
    total = sum_loss(base, make_batch(examples, pad_id=base.pad_id))
    expected = 0.0
    for example in examples:
        batch = make_batch([example], pad_id=base.pad_id)
        logits = own(torch.tensor([example.ids])).logits[0]
        expected += float(torch.nn.functional.cross_entropy(logits[batch.positions], batch.targets, reduction="sum"))
    assert float(total) == pytest.approx(expected, rel=1e-5)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["mamba", "falcon_h1", "rwkv", "gemma2", "llama4", "zamba2", "gemma3", "modernbert-decoder", "qwen2_vl"]
)
def test_a_run_on_any_kind_of_base_trains_answers_and_verifies(
    name, tiny_model: Path, make_clients, test_file, tmp_path
):
    """Mixtures whose layers see tokens without their rows, and experts that no token reaches, among them."""
    folder = every_base.make_folder(name, tiny_model, tmp_path / "base")
    where = {"model_dir": str(tmp_path / "models"), "exp_name": "run"}
    train.run(
        TrainConfig.of(
            **where,
            base_model=str(folder),
            base_dtype="float32",
            data_path=str(make_clients([4, 3])),
            num_clients=2,
            client_selection_frac=1,
            num_communication_rounds=1,
            local_batch_size=2,
            cutoff_len=120,
            prompt_template="chat",
            lora_r=2,
            lora_target_modules="all-linear",
            device="cpu",
        )
    )
    asked = {"all": True, "test_file_path": str(test_file), "prediction_dir": str(tmp_path / "predictions")}
    found = generate.run(GenerateConfig.of(**where, **asked, max_new_tokens=4, base_dtype="float32", device="cpu"))
    assert len(found.answers) == 4
    verify.run(VerifyConfig.of(**where))


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama4_text", "modernbert-decoder"])
def test_privacy_of_examples_is_refused_where_layers_get_tokens_without_their_rows(
    name, tiny_model, make_clients, tmp_path
):
    folder = every_base.make_folder(name, tiny_model, tmp_path / "base")
    config = TrainConfig.of(
        base_model=str(folder),
        model_dir=str(tmp_path / "models"),
        exp_name="run",
        data_path=str(make_clients([4, 3])),
        num_clients=2,
        client_selection_frac=1,
        cutoff_len=120,
        prompt_template="chat",
        lora_target_modules="all-linear",
        device="cpu",
        dp_example_clip=0.5,
        dp_example_noise_multiplier=0.5,
    )
    with pytest.raises(UsageError, match="needs adapted layers that see whole rows"):
        train.run(config)
