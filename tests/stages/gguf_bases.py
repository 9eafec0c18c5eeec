"""Small bases of every kind that is written as GGUF, each with a tokenizer that joins bytes and splits text its way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_run import CHAT_TEMPLATE, WORDS

TEXTS = [
    f"say {one} {place} note {other}\nBelow is a task. {place * 37}"
    for place, one in enumerate(WORDS)
    for other in WORDS
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BASES = {
    # heads wider than hidden_size / heads, biases, llama3's positions, an output layer of its own
    "llama": ("llama-bpe", {"head_dim": 32, "attention_bias": True, "rope_parameters": LLAMA_3_ROPE}),
    "mistral": ("smollm", {"sliding_window": None}),
    # more rows in the embedding than tokens
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("gpt-2", {"tie_word_embeddings": True, "head_dim": 32}),
}


def make_base(kind: str, folder: Path) -> Path:
    """Write a base with weights large enough that a wrong order of rows changes every answer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    split, more = BASES[kind]
    tokenizer = _make_tokenizer(split)
    tokenizer.save_pretrained(folder)
    size = len(tokenizer) + (5 if kind == "qwen2" else 0)
    config = AutoConfig.for_model(kind, vocab_size=size, **{"tie_word_embeddings": False, **SHAPE, **more})
    generator = torch.Generator().manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for value in model.parameters():
            drawn = torch.randn(value.shape, generator=generator)
            value.copy_(0.3 * drawn if value.dim() > 1 else 1 + 0.1 * drawn)
    model.save_pretrained(folder)
    return folder


def _make_tokenizer(split: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    joined = pre_tokenizers.ByteLevel(add_prefix_space=False)
    apart = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splits = {
        "gpt-2": lambda: joined,
        "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), joined]),
        "llama-bpe": lambda: _splitting(LLAMA_3, apart),
        "qwen2": lambda: _splitting(LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}"), apart),
    }

    def _splitting(regex: str, then: Any) -> Any:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), then])

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = splits[split]()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIALS, "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, **options))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
