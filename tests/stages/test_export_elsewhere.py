"""Exports in the programs that they are for: transformers, PEFT, and llama.cpp (`make test-llama-cpp` builds it)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_bases import BASES, make_base
from tiny_run import make_client_files, options_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedlora as fl
from fedlora.config.train import TrainConfig
from fedlora.stages import train

COLOURS = ("red", "green", "blue", "gold", "black")
PROMPTS = [f"Say the colour {colour} {count} times." for colour in COLOURS for count in (1, 2, 3, 4)]
NEW_TOKENS = 16
GGML_F32 = 0


def answers_of(model: Any, tokenizer: Any, stops: list[int]) -> list[str]:
    """Greedy answers to the prompts, framed by the tokenizer's template."""
    return [_decoded(tokenizer, _greedy(model, ids, stops)) for ids in prompt_ids(tokenizer)]


def prompt_ids(tokenizer: Any) -> list[list[int]]:
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True)["input_ids"]


def _greedy(model: Any, ids: list[int], stops: list[int]) -> list[int]:
    given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": stops, "pad_token_id": stops[0]}
    with torch.no_grad():
        return model.generate(**given, **options)[0, len(ids) :].tolist()


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def our_answers(run: fl.Run, stops: list[int]) -> list[str]:
    found = run.answer(
        PROMPTS, of="global", max_new_tokens=NEW_TOKENS, base_dtype="float32", stop="none", progress=False
    )
    return list(found["global"])


class LlamaCpp:
    """A model in llama.cpp with keys and values in float32."""

    def __init__(self, model: Path, lora: Path | None = None) -> None:
        library = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make test-llama-cpp")
        kinds = {"type_k": GGML_F32, "type_v": GGML_F32}
        self.model = library.Llama(
            str(model), lora_path=str(lora) if lora else None, logits_all=True, n_ctx=512, verbose=False, **kinds
        )

    def tokens(self, text: str) -> list[int]:
        return self.model.tokenize(text.encode(), add_bos=False, special=True)

    def logits(self, ids: list[int]) -> np.ndarray:
        self.model.reset()
        self.model.eval(ids)
        return np.array(self.model.scores[: len(ids)])

    def greedy(self, ids: list[int], stops: list[int]) -> list[int]:
        self.model.reset()
        self.model.eval(ids)
        found: list[int] = []
        while len(found) < NEW_TOKENS:
            token = int(self.model.scores[self.model.n_tokens - 1].argmax())
            found.append(token)
            if token in stops:
                break
            self.model.eval([token])
        return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], fl.Run]:
    """A run on a small base of a kind, all linear layers adapted, trained once."""
    root, made = tmp_path_factory.mktemp("small"), {}
    data = make_client_files(root / "data", [8, 8, 8, 8])

    def run_of(kind: str) -> fl.Run:
        if kind not in made:
            base = make_base(kind, root / kind)
            more = {"lora_target_modules": "all-linear", "num_communication_rounds": 1, "local_learning_rate": 3e-2}
            options = options_of("homo", base, data, root / "models") | more | {"exp_name": kind, "lora_alpha": 24}
            train.run(TrainConfig.of(**options))
            made[kind] = fl.open(root / "models" / kind)
        return made[kind]

    return run_of


@pytest.mark.thorough
def test_peft_and_transformers_answer_20_prompts_as_the_run_does(small, tmp_path):
    from peft import AutoPeftModelForCausalLM

    run = small("llama")
    ours = our_answers(run, [2])
    adapter = run.export(tmp_path / "peft", progress=False).folder
    merged = run.export(tmp_path / "merged", format="merged", progress=False).folder
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert len(set(ours)) > 5, "answers that say little about the adapter"
    assert answers_of(AutoPeftModelForCausalLM.from_pretrained(adapter), tokenizer, [2]) == ours
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert answers_of(AutoModelForCausalLM.from_pretrained(merged), tokenizer, [2]) == ours


@pytest.mark.slow
@pytest.mark.parametrize("kind", BASES)
def test_llama_cpp_computes_the_logits_of_every_kind_of_base(small, tmp_path, kind):
    run = small(kind)
    places = {
        name: run.export(tmp_path / name, format=kept, of=of, progress=False).folder
        for name, kept, of in (
            ("merged", "merged", "global"),
            ("gguf", "gguf", "global"),
            ("lora", "gguf-lora", "global"),
            ("base", "gguf", "base"),
        )
    }
    tokenizer = AutoTokenizer.from_pretrained(places["merged"])
    model = AutoModelForCausalLM.from_pretrained(places["merged"])
    untrained = AutoModelForCausalLM.from_pretrained(str(run.record.base_model))
    text = "<|im_start|>user\nsay north 12345 isn't\n\n \nnote\tGold äö  <|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        ours, base = (one(torch.tensor([ids])).logits[0].numpy() for one in (model, untrained))
    whole = LlamaCpp(places["gguf"] / "model.gguf")
    beside = LlamaCpp(places["base"] / "model.gguf", places["lora"] / "adapter.gguf")
    assert whole.tokens(text) == ids
    assert np.abs(ours - base).max() > 1
    for found in (whole.logits(ids), beside.logits(ids)):
        assert np.abs(found - ours).max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_the_embedded_model_answers_20_prompts_alike_in_transformers_peft_and_llama_cpp(tmp_path, template):
    from peft import AutoPeftModelForCausalLM

    rows = [
        {"instruction": prompt, "input": "", "output": " ".join([prompt.split()[3]] * int(prompt.split()[4]))}
        for prompt in PROMPTS
    ]
    data = fl.silos({"one": rows[::2], "two": rows[1::2]}, folder=tmp_path / "silos", progress=False)
    how: dict[str, Any] = {"template": template, "base_dtype": "float32", "client_fraction": 1, "progress": False}
    run = fl.train(
        data=data, model="smollm2-135m", rounds=2, batch_size=5, learning_rate=1e-3, name="r", model_dir=tmp_path, **how
    )
    folders = {
        kept: run.export(tmp_path / kept, format=kept, progress=False).folder
        for kept in ("peft", "merged", "gguf-lora", "gguf")
    }
    base = run.export(tmp_path / "base", format="gguf", of="base", progress=False).folder
    tokenizer = AutoTokenizer.from_pretrained(folders["peft"])
    stops = [tokenizer.eos_token_id]
    ours = our_answers(run, stops)
    assert len(set(ours)) > 5, "answers that say little about the adapter"
    assert answers_of(AutoPeftModelForCausalLM.from_pretrained(folders["peft"]), tokenizer, stops) == ours
    assert answers_of(AutoModelForCausalLM.from_pretrained(folders["merged"]), tokenizer, stops) == ours
    whole = LlamaCpp(folders["gguf"] / "model.gguf")
    beside = LlamaCpp(base / "model.gguf", folders["gguf-lora"] / "adapter.gguf")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}], add_generation_prompt=True, tokenize=False
    )
    assert whole.tokens(text) == prompt_ids(tokenizer)[0]
    for llama in (whole, beside):
        found = [_decoded(tokenizer, llama.greedy(ids, stops)) for ids in prompt_ids(tokenizer)]
        assert found == ours, json.dumps([found, ours], indent=1)
