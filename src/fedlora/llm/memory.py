"""How much memory there is, what a token of training takes of it, and the layout that fits.

The need of a token is counted, not sampled: one pass of the longest row is run and what autograd keeps for
the way back is summed. The count depends on model, type and adapter only; how many tokens fit depends on
the memory that is free, which decides speed and the last bits of a gradient, and nothing else of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from fedlora.config.train import TrainConfig
from fedlora.errors import OutOfMemoryError, UsageError
from fedlora.llm.attention import LONGEST
from fedlora.llm.base_model import BaseModel
from fedlora.llm.examples import Example, make_batch
from fedlora.llm.layout import Layout
from fedlora.llm.lora import LoraModel
from fedlora.llm.loss import LOGIT_BYTES, label_logits

Result = TypeVar("Result")

USEFUL_TOKENS = {"cpu": 2048, "cuda": 16384}
"""A larger pass fills the device no better, only its memory."""

USEFUL_CACHE_TOKENS = {"cpu": 16384, "cuda": 131072}
"""The same for generation, where a batch holds so many tokens of prompts and answers."""

SHARE = {"cpu": 0.5, "cuda": 0.85}
"""Part of the free memory that a pass may take; a CPU's is shared with the rest of the machine."""

TEMPORARIES = 1.3
"""What a pass holds at its peak over what autograd keeps: results that are freed again at once."""

STEP_TOKENS = 256
"""Budgets are multiples of this, so that a few free megabytes more or less find the same layout."""


def plan_layout(base: BaseModel, lora: LoraModel, config: TrainConfig) -> Layout:
    """The layout of a run: as the flags say, else what fits into the memory that is free now.

    Checkpointing, which costs a third of the speed, is chosen when not even two of the longest rows fit into a
    pass without it.
    Raises UsageError when it is asked of a model that has none.
    """
    wanted = config.gradient_checkpointing
    if wanted == "on" and not base.model.supports_gradient_checkpointing:
        raise UsageError(
            f"gradient_checkpointing=on: {base.name} does not support it", hint="leave --gradient_checkpointing out"
        )
    if config.tokens_per_pass and wanted != "auto":
        return Layout(config.tokens_per_pass, wanted == "on")
    useful = config.tokens_per_pass or USEFUL_TOKENS[base.device.type]
    room = available_memory(base.device) * SHARE[base.device.type] - LOGIT_BYTES[base.device.type]
    # plain attention keeps the square of a row, up to the length at which the fused kernel takes over
    longest = min(config.cutoff_len, LONGEST)
    whole = count_kept_bytes(base, lora, longest)
    fits = room / (TEMPORARIES * whole)
    checkpoints = wanted == "on"
    if wanted == "auto" and base.model.supports_gradient_checkpointing:
        checkpoints = fits < min(useful, 2 * longest)
    if checkpoints:
        fits = room / (TEMPORARIES * kept_with_checkpointing(base, whole))
    found = max(config.cutoff_len, int(min(useful, fits)) // STEP_TOKENS * STEP_TOKENS)
    return Layout(config.tokens_per_pass or found, checkpoints)


def plan_batch(base: BaseModel) -> int:
    """Tokens, prompts and answers together, that a batch of generation may hold in the memory that is free now."""
    room = available_memory(base.device) * SHARE[base.device.type]
    # as much again for what a prompt's first pass holds at a time
    fits = int(room / (2 * count_cache_bytes(base)))
    return max(STEP_TOKENS, min(USEFUL_CACHE_TOKENS[base.device.type], fits // STEP_TOKENS * STEP_TOKENS))


@torch.no_grad()
def count_cache_bytes(base: BaseModel) -> float:
    """Bytes of keys, values and other states per token of a short row; at least one number's."""
    ids = torch.zeros((1, 4), dtype=torch.long, device=base.device)
    part = base.decoder if base.can.decoder else base.model
    cache = getattr(part(input_ids=ids, use_cache=True), "past_key_values", None)
    layers = getattr(cache, "layers", [])
    found = [value for layer in layers for value in vars(layer).values()]
    tensors = [one for value in found for one in (value.values() if isinstance(value, dict) else [value])]
    held = sum(one.nbytes for one in tensors if isinstance(one, Tensor) and one.is_floating_point())
    return max(held, base.dtype.itemsize) / ids.shape[1]


def count_kept_bytes(base: BaseModel, lora: LoraModel, length: int) -> float:
    """Bytes that training keeps per token of a row of `length` tokens, parameters not counted."""
    kept: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in base.model.parameters()}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        # what an operation saves of its own result leads back to the operation: a cycle outside Python, never freed
        return tensor.detach()

    vocabulary = base.model.get_input_embeddings().weight.shape[0]
    example = Example([index % vocabulary for index in range(length)], length - 1)
    batch = make_batch([example], pad_id=base.pad_id, device=base.model.device)
    lora.noise.begin_pass([0], base.model.device)
    with (
        torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []),
        lora.train_mode(),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
    ):
        if base.can.head == "model":
            label_logits(base, batch)
        else:
            base.hidden(batch.ids)
    return sum(kept.values()) / length


def kept_with_checkpointing(base: BaseModel, whole: float) -> float:
    """Bytes per token when each layer keeps its input and one at a time is computed again, from those of all layers."""
    config = base.model.config.get_text_config()
    element = torch.finfo(base.dtype).bits // 8
    return config.num_hidden_layers * config.hidden_size * element + whole / config.num_hidden_layers


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device; on a CPU no more than the control group allows."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    limit, used = (_read_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, limit - used)


def held_memory(device: torch.device) -> dict[str, int]:
    """Bytes that this process holds: `process` in the machine's memory, `device` on a GPU that it computes on."""
    held = {"process": psutil.Process().memory_info().rss}
    return held | ({"device": torch.cuda.memory_reserved(device)} if device.type == "cuda" else {})


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that no memory is left: CUDA has a type for it, the CPU's allocator a text."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def with_less_memory(attempt: Callable[[int], Result], budget: int, smallest: int, what: str) -> tuple[Result, int]:
    """`attempt(budget)`, with half the budget each time memory runs out; returns its result and the budget used.

    Raises OutOfMemoryError when passes of a single row (`smallest` tokens) do not fit either.
    """
    while True:
        try:
            return attempt(budget), budget
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if budget <= smallest:
                raise OutOfMemoryError(
                    f"{what}: out of memory with one row of {smallest} tokens in a pass",
                    hint="use --gradient_checkpointing on, a smaller --cutoff_len, or a smaller model",
                ) from error
        # outside the handler: the exception's frames hold the tensors of the failed pass
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        budget = max(smallest, budget // 2)


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
