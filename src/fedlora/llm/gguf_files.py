"""GGUF files: a LoRA adapter, and a whole model with its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch

from fedlora.errors import UsageError
from fedlora.llm.gguf_tensors import CONVERT, TensorNames, add_tensor
from fedlora.llm.merging import layers_of, merged_weights
from fedlora.llm.serving_template import ServingTemplate, adds_start_token
from fedlora.types import AdapterState

_FILE_TYPES = {
    torch.float32: gguf.LlamaFileType.ALL_F32,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
}
_OURS = ("general.file_type", "general.quantization_version", "tokenizer.chat_template", "general.architecture")
"""Fields of a base's GGUF that are not copied."""
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_LLAMA_3: "llama-bpe", _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}
"""How a tokenizer splits text before it joins bytes -> llama.cpp's name for that."""


def write_lora(path: Path, config: Any, adapter: AdapterState, scaling: float) -> None:
    """The adapter for llama.cpp, in float32. `config` is the base's; UsageError where its layout is not known.

    llama.cpp multiplies by alpha / rank of each layer, so alpha is the scaling times the rank.
    """
    names = TensorNames(config)
    writer = gguf.GGUFWriter(path, names.arch_name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    pairs = layers_of(adapter)
    ranks = {adapter[a_key].shape[0] for a_key, _ in pairs.values()}
    if len(ranks) > 1:
        raise ValueError("one alpha stands for all layers: they need one rank")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scaling * ranks.pop())
    for layer, (a_key, b_key) in pairs.items():
        name = names.name(f"{layer}.weight")
        add_tensor(writer, f"{name}.lora_a", adapter[a_key], torch.float32)
        add_tensor(writer, f"{name}.lora_b", names.permute(f"{layer}.weight", adapter[b_key]), torch.float32)
    _finish(writer)


def write_model(
    path: Path, model: Any, tokenizer: Any, template: ServingTemplate, dtype: torch.dtype, *, base_file: Path | None
) -> None:
    """A whole model for llama.cpp. Metadata and vocabulary are those of the base's GGUF `base_file`, where there is
    one, and else made of configuration and tokenizer; UsageError for kinds of these that are not known here."""
    names = TensorNames(model.config)
    writer = gguf.GGUFWriter(path, names.arch_name)
    if base_file is not None:
        _copy_fields(writer, base_file, names.arch_name)
    else:
        _add_hyperparameters(writer, names.config)
        _add_tokenizer(writer, tokenizer, names.config.vocab_size)
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_chat_template(template.jinja)
    if base_file is None and (factors := _rope_factors(model)) is not None:
        add_tensor(writer, "rope_freqs.weight", factors, torch.float32)
    for key, value in merged_weights(model).items():
        add_tensor(writer, names.name(key), names.permute(key, value), dtype)
    _finish(writer)


def read_architecture(path: Path) -> str:
    """What a GGUF file says its model is."""
    return str(gguf.GGUFReader(path).fields["general.architecture"].contents())


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_fields(writer: Any, base_file: Path, arch_name: str) -> None:
    reader = gguf.GGUFReader(base_file)
    if (found := reader.fields["general.architecture"].contents()) != arch_name:
        raise UsageError(
            f"{base_file}: holds a model of the kind {found}, not {arch_name}", hint="install the embedded model again"
        )
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in _OURS:
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)


def _add_hyperparameters(writer: Any, config: Any) -> None:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = _rope(config)
    if (base := rope.get("rope_theta")) is not None:
        writer.add_rope_freq_base(base)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind not in ("default", "llama3"):
        raise UsageError(
            f"positions scaled by {kind!r} are not written as GGUF",
            hint=CONVERT,
        )


def _rope(config: Any) -> Mapping[str, Any]:
    """How positions are turned: `rope_parameters` of transformers 5."""
    return getattr(config, "rope_parameters", None) or {}


def _rope_factors(model: Any) -> torch.Tensor | None:
    """By how much llama3's scaling lowers each frequency; None for plain positions."""
    config = model.config.get_text_config()
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    length = 2 * torch.pi / plain
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = (rope["original_max_position_embeddings"] / length - low) / (high - low)
    share = share.clamp(0, 1)
    scaled = (1 - share) * plain / rope["factor"] + share * plain
    return (plain / scaled).to(torch.float32)


def _add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """Vocabulary, merges and special tokens of a tokenizer that joins bytes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = json.loads(backend.to_str()) if backend is not None else {}
    kind = _split_name(facts)
    tokens, types = _vocabulary(facts, tokenizer, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in facts["model"]["merges"]]
    if not merges:
        raise UsageError("the base's tokenizer joins no bytes, and llama.cpp reads no such vocabulary", hint=CONVERT)
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(adds_start_token(tokenizer))


def _vocabulary(facts: Mapping[str, Any], tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {token["id"]: token["special"] for token in facts["added_tokens"]}
    tokens, types = [], []
    for number in range(max(size, max(known) + 1)):
        kind = gguf.TokenType.NORMAL if number in known else gguf.TokenType.UNUSED
        if number in added:
            kind = gguf.TokenType.CONTROL if added[number] else gguf.TokenType.USER_DEFINED
        tokens.append(known.get(number, f"[PAD{number}]"))
        types.append(kind)
    return tokens[:size], types[:size]


def _split_name(facts: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer splits text; UsageError for a way that is not known here."""
    pre = facts.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    is_bytes = facts.get("model", {}).get("type") == "BPE" and kinds and kinds[-1] == "ByteLevel"
    if is_bytes and not steps[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and (found := _SPLITS.get(steps[0]["pattern"].get("Regex", ""))):
            return found
    raise UsageError(
        "the base's tokenizer splits text in a way that is not known to be one of llama.cpp's",
        hint=CONVERT,
    )
