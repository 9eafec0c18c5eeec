"""Small tokenizers of every kind that models come with, trained on a few lines of text.

Byte-level BPE as GPT-2 has it, and with the pre-tokenizers of Llama 3 and Qwen; SentencePiece's forms as BPE with a
space in front and as Unigram; WordPiece.
"""

from __future__ import annotations

from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, as Qwen and SmolLM write it, without a system prompt of its own."""

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
ADDED = ["<think>", "</think>", "<tool_call>"]
"""Added tokens that are not flagged special."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3, QWEN = _WORDS + r"\p{N}{1,3}" + _REST, _WORDS + r"\p{N}" + _REST

LINES = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\n\nName the capital of France.\n\n### Response:\nParis.",
    "user\nWhat is 12 + 30?\n\n(Answer in one word.)\nassistant\nForty-two!\n",
    "def f(x):\n    return x * 2  # double\n\n\nprint(f(21))\n",
    "It's 3.14, isn't it? We'll see...\n\n- one\n- two\n",
]
"""With line breaks behind punctuation, blank lines and indentation: what pre-tokenizers merge."""

KINDS = ("bytes", "llama3", "qwen", "prefix_space", "metaspace", "unigram", "wordpiece")


def make_tokenizer(kind: str) -> Any:
    """A tokenizer of transformers, of one of KINDS, with ChatML as its template."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend: Tokenizer = _MAKERS[kind]()
    backend.add_special_tokens(SPECIALS)
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _bytes(pattern: str | None = None) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    if pattern is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        LINES * 4,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return backend


def _prefix_space() -> Any:
    """SentencePiece's BPE as Llama 2's file writes it: a normalizer puts the space in front; a start token too."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.train_from_iterator(
        LINES * 4, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def _metaspace() -> Any:
    """The same as newer files write it: the pre-tokenizer puts the space in front of the first word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    backend.train_from_iterator(
        LINES * 4, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def _unigram() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.train_from_iterator(
        LINES * 4,
        trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False),
    )
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return backend


def _wordpiece() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        LINES * 4, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIALS, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return backend


_MAKERS = {
    "bytes": _bytes,
    "llama3": lambda: _bytes(LLAMA3),
    "qwen": lambda: _bytes(QWEN),
    "prefix_space": _prefix_space,
    "metaspace": _metaspace,
    "unigram": _unigram,
    "wordpiece": _wordpiece,
}
