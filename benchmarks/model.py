"""The model that every part is timed on, as a name that both sides can load.

On a CPU it is smollm2-135m. On CUDA it is the shape of Llama-3.2-1B with random weights, because speed does not
depend on their values and no hub is needed; its tokenizer is smollm2's where that is installed, else a
character tokenizer made here (whose rows are longer in tokens and end at the cutoff more often).
FEDLORA_BENCH_MODEL names a folder to use instead, which is how the runner makes the shape only once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VARIABLE = "FEDLORA_BENCH_MODEL"


@contextlib.contextmanager
def model_for(device: str, *, quick: bool = False) -> Iterator[str]:
    """A name or folder for `from_pretrained` (`source_of`) and for fedlora's --base_model."""
    if chosen := os.environ.get(VARIABLE):
        yield chosen
    elif device == "cpu":
        yield "smollm2-135m"
    else:
        with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as folder:
            make_llama_shape(Path(folder), num_layers=2 if quick else 16)
            yield folder


def source_of(name: str) -> str:
    """What transformers' `from_pretrained` takes for a name that fedlora's --base_model takes."""
    from fedlora.llm import embedded_model

    return str(embedded_model.folder()) if name == embedded_model.NAME else name


def make_llama_shape(folder: Path, *, num_layers: int = 16) -> None:
    """Write a model of Llama-3.2-1B's shape with random bfloat16 weights (about 2.5 GB) and a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    print("making a model of Llama-3.2-1B's shape with random weights", file=sys.stderr)
    tokenizer = _make_tokenizer()
    config = LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=8192,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_tokenizer() -> Any:
    from fedlora.errors import UsageError
    from fedlora.llm import embedded_model

    try:
        source = embedded_model.folder()
    except UsageError:
        return _make_byte_tokenizer()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)


def _make_byte_tokenizer() -> Any:
    """Every byte a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
