"""Architectures of transformers, each as small as it gets: two layers of width 32, 259 tokens, random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

VOCABULARY = 259
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "d_inner"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "linear_num_value_heads", "num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim", "d_kv", "mamba_d_state"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "state_size", "mamba_num_heads", "mamba_head_dim"), 8),
    **dict.fromkeys(("ssm_state_size", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "moe_intermediate_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "chunk_size", "mamba_chunk_size"), 16),
    **{"mamba_d_ssm": 64, "mamba_n_groups": 1, "n_groups": 1, "mamba_dt_rank": 4, "rotary_dim": 4, "moe_topk": 2},
    **{"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"index_n_heads": 2, "index_head_dim": 8, "index_topk": 8, "use_mamba_kernels": False},
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout"), 0.0),
    **dict.fromkeys(("hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    **dict.fromkeys(("activation_dropout", "residual_dropout", "router_jitter_noise", "input_jitter_noise"), 0.0),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
"""What a size of any configuration is called, and how small it is here; a window is shorter than most rows, and nothing
is dropped at random."""

HALF = {"layer_types": ["linear_attention", "full_attention"]}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
LATENT = {
    **{"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8},
    **{"v_head_dim": 8, "head_dim": 4},
}
TEXT = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")} | {
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256},
}
DELTA = {name: SMALL[name] for name in SMALL if name.startswith("linear_")}
IMAGES = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
PATCHES = {
    **{"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "intermediate_size": 32, "out_hidden_size": 32},
    **{"fullatt_block_indexes": [0], "deepstack_visual_indexes": [0]},
}
ROPE = {"rope_theta": 10000.0}
SECTIONS = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], **ROPE}}
WRAPPED = {
    "llava": ("llama", "clip_vision_model"),
    "mistral3": ("mistral", "pixtral"),
    "paligemma": ("gemma", "siglip_vision_model"),
    "smolvlm": ("llama", "smolvlm_vision"),
}
"""Wrapper -> its language model and its vision tower."""
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 24}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, {})
        for name in (
            *("apertus", "arcee", "bert", "biogpt", "bitnet", "bloom", "codegen", "cohere", "ctrl", "cwm", "diffllama"),
            *(
                "doge",
                "dots1",
                "ernie4_5",
                "ernie4_5_moe",
                "falcon_h1",
                "falcon_mamba",
                "gemma",
                "gemma2",
                "glm",
                "glm4",
            ),
            *("glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granitemoe"),
            *("helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "inkling_text", "jetmoe", "llama", "mamba", "mbart"),
            *(
                "minimax",
                "mistral",
                "mixtral",
                "modernbert-decoder",
                "mpt",
                "nanochat",
                "nemotron",
                "nemotron_h",
                "olmo",
            ),
            *("olmo2", "olmo_hybrid", "olmoe", "openai-gpt", "opt", "persimmon", "phi", "phimoe", "qwen2"),
            *(
                "qwen2_moe",
                "qwen3",
                "qwen3_moe",
                "roberta",
                "rwkv",
                "seed_oss",
                "smollm3",
                "stablelm",
                "starcoder2",
                "t5",
            ),
            *("t5", "vaultgemma", "xglm"),
        )
    },
    "bamba": ("bamba", {"attn_layer_indices": [1]}),
    "bart": ("bart", {}),
    "bert, is_decoder": ("bert", {"is_decoder": True}),
    "cohere2": ("cohere2", SLIDING),
    "deepseek_v2": ("deepseek_v2", LATENT),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "falcon": ("falcon", {"head_dim": None}),
    "falcon, alibi": ("falcon", {"head_dim": None, "alibi": True}),
    "gemma3": (
        "gemma3",
        {
            **{"text_config": {**TEXT, **SLIDING, "sliding_window": 16}, "vision_config": IMAGES},
            **{"mm_tokens_per_image": 4, "image_token_index": 258, "boi_token_index": 257, "eoi_token_index": 256},
        },
    ),
    "gemma3_text": ("gemma3_text", SLIDING),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}),
    "granite": ("granite", {"logits_scaling": 4.0}),
    "granitemoehybrid": ("granitemoehybrid", HALF),
    "hy_v4": ("hy_v4", {**LATENT, "head_dim": 8, "qk_rope_head_dim": 8, "num_key_value_heads": 2}),
    "jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "layer_types": None}),
    "lfm2": ("lfm2", CONVOLUTION),
    "llama, dynamic RoPE": (
        "llama",
        {"max_position_embeddings": 48, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **ROPE}},
    ),
    "llama4": (
        "llama4",
        {"text_config": {**TEXT, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 16}},
    ),
    "llama4_text": (
        "llama4_text",
        {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 16},
    ),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8}),
    "minicpm3": ("minicpm3", LATENT),
    "olmo3": ("olmo3", SLIDING),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3, long RoPE": (
        "phi3",
        {
            **{"sliding_window": None, "original_max_position_embeddings": 24},
            "rope_parameters": {"rope_type": "longrope", **ROPE, **LONG},
        },
    ),
    **{
        name: (name, {"text_config": {"model_type": text, **TEXT}, "vision_config": {"model_type": images, **IMAGES}})
        for name, (text, images) in WRAPPED.items()
    },
    **{
        name: (name, {"text_config": {**TEXT, **SECTIONS}, "vision_config": PATCHES})
        for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    },
    "qwen3_5": (
        "qwen3_5",
        {"text_config": {**TEXT, **HALF, **DELTA}, "vision_config": {"depth": 1, "hidden_size": 32}},
    ),
    "qwen3_5_text": ("qwen3_5_text", HALF),
    "qwen3_next": ("qwen3_next", HALF),
    "recurrent_gemma": ("recurrent_gemma", {"block_types": ["recurrent", "attention"]}),
    "xlnet": ("xlnet", {"max_position_embeddings": None}),
    "zamba2": (
        "zamba2",
        {
            **{"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2, "n_mamba_heads": 8, "mamba_ngroups": 1},
            **{"layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1, "pad_token_id": None},
        },
    ),
}
"""Name in the table -> model_type, and what its configuration has besides the small sizes (None: not even those)."""


def make_config(name: str) -> Any:
    """The small configuration of one architecture."""
    from transformers import CONFIG_MAPPING

    kind, more = ARCHITECTURES[name]
    usual = CONFIG_MAPPING[kind]()
    composite = usual.get_text_config() is not usual
    sizes = {} if composite else {name: size for name, size in SMALL.items() if _has(usual, name)}
    for name, value in more.items():
        if value is None and name != "sliding_window" and name != "pad_token_id":
            sizes.pop(name, None)
        else:
            sizes[name] = value
    return CONFIG_MAPPING[kind](**sizes)


def loader_of(config: Any) -> Any:
    """What loads the model of a configuration: a causal language model, or else one that reads images too."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def load_own(folder: Path) -> Any:
    """The model of a folder as transformers loads it, in float32."""
    import torch
    from transformers import AutoConfig

    return loader_of(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).eval()


def make_folder(name: str, tokenizer: Path, folder: Path) -> Path:
    """Write a model with random weights, large enough to say different things, and a copy of a tokenizer's files."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, GenerationConfig

    config = make_config(name)
    torch.manual_seed(0)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else loader_of(config)
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 and 0 < float(weight.std()) < 0.06:
                weight *= 8
    folder.mkdir(parents=True, exist_ok=True)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder)
    for file in tokenizer.glob("*.jinja"):
        shutil.copy(file, folder)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    return folder


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # some names are ambiguous where layers differ, and say so in an error of their own
        return True


if __name__ == "__main__":
    print(json.dumps(sorted(ARCHITECTURES)))
