"""Local training the usual way: a fresh transformers Trainer per client and round around one resident PEFT model.

Written as published research code does it, and fairly: the base is loaded once, the rows are tokenised beforehand,
nothing is evaluated or saved on the way. Micro-batches of 8 are padded to their longest row (a multiple of 8), in
file order; their gradients are accumulated to one optimizer step of `local_batch_size` rows; the adapter comes
from a file and goes into one. PEFT keeps the factors in float32 also when the base is bfloat16.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from model import source_of

from fedlora.llm.examples import Example

QUERY_VALUE = ("q_proj", "v_proj")
ALL_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MICRO_BATCH = 8
IGNORED = -100


@dataclass(frozen=True)
class UsualTraining:
    """What one client's round gave: mean loss per response token, real (non-pad) tokens and padded ones."""

    loss: float
    num_tokens: int
    num_padded_tokens: int
    num_steps: int


def load_model(
    dtype: str = "float32",
    targets: Sequence[str] = QUERY_VALUE,
    *,
    name: str = "smollm2-135m",
    device: str = "cpu",
    r: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
) -> tuple[Any, Any]:
    """A PEFT model with an untrained adapter on `device`, base in `dtype`, and its tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    source = source_of(name)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    base: Any = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    base.to(device)
    lora = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none", task_type="CAUSAL_LM"
    )
    return get_peft_model(base, lora), tokenizer


def save_adapter(model: Any, path: Path) -> None:
    """Write the model's adapter as torch.save bytes."""
    from peft import get_peft_model_state_dict

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(get_peft_model_state_dict(model), path)


def load_adapter(model: Any, path: Path) -> None:
    """Read an adapter file into the model."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, torch.load(path, map_location="cpu", weights_only=True))


def train_client(
    model: Any,
    rows: Sequence[Example],
    adapter_in: Path,
    adapter_out: Path,
    *,
    tokenizer: Any,
    local_batch_size: int = 24,
    micro_batch: int = MICRO_BATCH,
    epochs: int = 1,
    learning_rate: float = 3e-4,
    autocast: bool = False,
) -> UsualTraining:
    """One client's round, files and Trainer construction included; `autocast` is bfloat16 mixed precision."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    load_adapter(model, adapter_in)
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder, _quiet(), _without_cache(model):
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=min(micro_batch, local_batch_size),
            gradient_accumulation_steps=max(1, local_batch_size // micro_batch),
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_grad_norm=1.0,
            weight_decay=0.0,
            optim="adamw_torch",
            bf16=autocast,
            use_cpu=device.type == "cpu",
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            eval_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=device.type == "cuda",
            seed=0,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=_as_dataset(rows),  # type: ignore[arg-type]
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True, pad_to_multiple_of=8, return_tensors="pt"),
        )
        done = trainer.train()
    save_adapter(model, adapter_out)
    lengths = [len(row.ids) for row in rows]
    groups = [lengths[start : start + micro_batch] for start in range(0, len(lengths), micro_batch)]
    padded = sum(-(-max(group) // 8) * 8 * len(group) for group in groups)
    return UsualTraining(done.training_loss, epochs * sum(lengths), epochs * padded, done.global_step)


def _as_dataset(rows: Sequence[Example]) -> list[dict[str, list[int]]]:
    return [
        {
            "input_ids": list(row.ids),
            "attention_mask": [1] * len(row.ids),
            "labels": [IGNORED] * row.labels_from + list(row.ids[row.labels_from :]),
        }
        for row in rows
    ]


@contextlib.contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    """Training needs no keys and values of earlier tokens, and no published code keeps them."""
    before = model.config.use_cache
    model.config.use_cache = False
    try:
        yield
    finally:
        model.config.use_cache = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The Trainer prints its logs to stdout, where only the result belongs."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
