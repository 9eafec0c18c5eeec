"""A run small enough to be killed hundreds of times: a two-layer Llama, four clients, three rounds.

The model and its tokenizer go through the same loading code as any other; only their size is made up.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.files import json_text, sha256_of, write_text

MODES = ("homo", "seq", "none", "pooled", "scaffold", "fedsa", "fedex", "feddpa", "hetlora")
"""Every kind of memory that a run can have: a server's, a client's, own models, ranks, additions to the base."""
WORDS = ("north", "south", "east", "west", "red", "green", "blue", "gold")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(folder: Path) -> Path:
    """Write a two-layer Llama (grouped queries, tied embeddings, float32) with a byte-level tokenizer; its folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def make_client_files(data: Path, sizes: Sequence[int]) -> Path:
    """Write the contract's tree: `sizes` rows per client, one category each; returns the data folder."""
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
        write_text(data / str(len(sizes)) / f"local_training_{client}.json", json.dumps(rows))
    return data


def options_of(mode: str, model: Path, data: Path, model_dir: Path) -> dict[str, Any]:
    """The configuration of the run: everything that can be resumed is switched on."""
    return {
        "exp_name": "run",
        "federation_mode": mode,
        "base_model": str(model),
        "base_dtype": "float32",
        "data_path": str(data),
        "model_dir": str(model_dir),
        "client_selection_frac": 0.75,
        "num_communication_rounds": 3,
        "num_clients": 4,
        "local_batch_size": 2,
        "local_num_epochs": 1,
        "local_val_set_size": 1,
        "local_learning_rate": 1e-2,
        "prompt_template": "chat",
        # moments of two adapters are not kept
        "optimizer_state": "reset" if mode in ("ditto", "feddpa") else "keep",
        "device": "cpu",
    }


def file_hashes(run: Path) -> dict[str, str]:
    """Path -> SHA-256 of every file of the rounds, adapters and manifests among them; open and damaged ones too."""
    return {
        path.relative_to(run).as_posix(): sha256_of(path)
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.parent != run
    }


def facts_of(run: Path) -> dict[str, Any]:
    """What two runs must have in common: all files of the rounds, run.json, and the metrics without the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = [
        json_text({name: value for name, value in row.items() if name not in ("seconds", "check")})
        for row in rows
        if row["kind"] != "update"
    ]
    rounds = {name: value for name, value in file_hashes(run).items() if ".damaged/" not in name}
    return {"files": rounds, "metrics": measured, "run": json.loads((run / "run.json").read_text(encoding="utf-8"))}
