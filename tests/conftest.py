"""Fixtures for the whole suite: a two-layer Llama and a small tokenizer, built once, loaded like any model."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

from fedlora.cli import SPIN_COUNT

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# read by OpenMP when torch is first imported, so before any test imports it
os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)

# the same examples every time, and nothing kept between runs
settings.register_profile("fedlora", derandomize=True, deadline=None, database=None)
settings.load_profile("fedlora")
# its tables of characters too: set here, because test modules make strategies while they are imported
HYPOTHESIS_HOME = tempfile.mkdtemp(prefix="fedlora-hypothesis-")
atexit.register(shutil.rmtree, HYPOTHESIS_HOME, ignore_errors=True)
set_hypothesis_home_dir(HYPOTHESIS_HOME)

LOOPBACK = {"127.0.0.1", "::1", "localhost"}


@pytest.fixture(autouse=True)
def _only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection that would leave this machine fails the test that makes it."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            raise AssertionError(f"a test connects to {address[0]}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or fills the user's cache, except the slow ones, which need the converted model in it."""
    if request.config.option.markexpr != "slow":
        os.environ["FEDLORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer Llama (grouped queries, tied embeddings, float32) with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_model")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>", unk_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=None,
        )
    )
    model.save_pretrained(folder)
    return folder


WORDS = ("north", "south", "east", "west", "red", "green", "blue", "gold")


@pytest.fixture
def make_clients(tmp_path: Path) -> Callable[..., Path]:
    """Write the contract's tree: `sizes` rows per client, one category each; returns the data folder."""

    def make(sizes: list[int], folder: str = "data") -> Path:
        data = tmp_path / folder
        place = data / str(len(sizes))
        place.mkdir(parents=True)
        for client, size in enumerate(sizes):
            rows = [
                {
                    "instruction": f"say {WORDS[(client + row) % 8]} {row}",
                    "input": "" if row % 2 else f"note {client}",
                    "output": WORDS[client % 8] * (1 + row % 3),
                    "category": f"c{client}",
                }
                for row in range(size)
            ]
            (place / f"local_training_{client}.json").write_text(json.dumps(rows), encoding="utf-8")
        return data

    return make


@pytest.fixture
def test_file(tmp_path: Path) -> Path:
    """Six rows in two categories, with different prompt lengths."""
    rows = [
        {"instruction": "say " + "x" * (3 * row), "input": "", "output": WORDS[row], "category": f"c{row % 2}"}
        for row in range(6)
    ]
    path = tmp_path / "dolly_test_3.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
