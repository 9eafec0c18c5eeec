"""The frozen base: loaded once, checked on a few tokens, put on its device in the type that device is fast at.

`head` maps final hidden states to logits, so that logits are computed only where they are needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.config.train_fields import Quantization
from fedlora.errors import UsageError
from fedlora.llm.abilities import ALWAYS, Abilities
from fedlora.llm.allocator import keep_freed_memory
from fedlora.llm.attention import use_batched_attention
from fedlora.llm.base_identity import BaseIdentity, find_identity
from fedlora.llm.base_source import open_source
from fedlora.llm.model_head import find_decoder, logits_of
from fedlora.llm.quantization import check_outline, loading_options, replace_layers


@dataclass(frozen=True)
class BaseModel:
    """A causal language model in evaluation mode with its tokenizer."""

    model: Any
    tokenizer: Any
    name: str
    device: torch.device
    dtype: torch.dtype
    pad_id: int
    identity: BaseIdentity | None = None
    """None where the hub's client keeps no copy of what it loaded."""
    can: Abilities = field(default_factory=Abilities)
    """Which faster ways are right for this base."""

    @property
    def decoder(self) -> Any:
        """The part of the model that turns token ids into hidden states."""
        return self.model.get_submodule(self.can.decoder)

    @property
    def vocabulary(self) -> int:
        """Logits of a position."""
        head = self.model.get_output_embeddings()
        return self.model.config.get_text_config().vocab_size if head is None else head.weight.shape[0]

    def hidden(self, ids: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Final hidden states (rows, length, d) of right-padded ids, all after the same `prefix` (p,).

        The prefix passes through the model once; its keys and values are shared by the rows, gradients included.
        """
        if prefix is None or not len(prefix):
            return self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        self.decoder(input_ids=prefix[None], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(ids))
        return self.decoder(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (n, vocabulary) of hidden states (n, d)."""
        if self.can.head == "linear":
            layer = self.model.get_output_embeddings()
            # Mamba's states are float32 whatever its weights are
            return layer(hidden.to(layer.weight.dtype))
        return logits_of(self.model, self.can.decoder, hidden)

    def last_logits(self, **inputs: Any) -> Tensor:
        """Logits (rows, vocabulary) after the last position of the model's input."""
        if self.can.head == "model":
            return self.model(**inputs).logits[:, -1]
        # contiguous: for a strided slice of three dimensions torch copies the output layer once per row
        return self.head(self.decoder(**inputs).last_hidden_state[:, -1].contiguous())

    @property
    def context(self) -> int | None:
        """Most tokens of prompt and answer together that the model is made for; None when it names no limit."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        limits = [limit] if isinstance(limit, int) and limit > 0 else []
        return min([*limits, *([self.can.longest] if self.can.longest != ALWAYS else [])], default=None)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def load_base_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: Quantization = "none",
    trust_remote_code: bool = False,
    again: bool = False,
) -> BaseModel:
    """Load `smollm2-135m`, a local folder or a hub id; UsageError says what is missing and what works offline.

    `again` checks the base though an earlier check is kept.
    """
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    how = {"dtype": kind, **loading_options(quantization, where, kind)}
    model, tokenizer = _load(name, quantization, how, trust_remote_code)
    if quantization == "none":
        model.to(where)
    else:
        replace_layers(model, name, quantization)
    model.eval()
    if where.type == "cpu":
        keep_freed_memory()
        use_batched_attention(model)
    # it runs the code that trains and answers, which stands on this module
    from fedlora.llm.self_check import checked

    base = BaseModel(model, tokenizer, name, where, kind, _padding(model, tokenizer), find_identity(name))
    return checked(base, quantization, again=again)


def choose_device(wanted: str) -> torch.device:
    """auto is the first CUDA device, else the CPU; UsageError for a device that is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UsageError(f"device={wanted!r} is not a device", hint="use auto, cpu, cuda or cuda:<n>") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device={wanted!r}: no CUDA device is available", hint="use --device cpu or auto")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device={wanted!r} is not supported", hint="use auto, cpu, cuda or cuda:<n>")
    return device


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The base's type; auto is bfloat16 where the device multiplies it natively, else float32."""
    if wanted != "auto":
        return getattr(torch, wanted)
    return torch.bfloat16 if is_fast_at_bfloat16(device) else torch.float32


def is_fast_at_bfloat16(device: torch.device) -> bool:
    """CUDA from compute capability 8.0 on; a CPU with avx512_bf16 or amx_bf16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # older torch cannot tell; float32 is right everywhere, and --base_dtype decides otherwise
    features = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def load_outline(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: Quantization = "none",
    trust_remote_code: bool = False,
    weights_here: bool = True,
) -> BaseModel:
    """The base with the same zeros in the place of every weight matrix, on the CPU: to count with, not to compute with.

    `device` of the outline is where the base itself would lie. Raises UsageError as `load_base_model` does; without
    `weights_here` a local folder may lack the weights.
    """
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    source = open_source(name, trust_remote_code, weights=weights_here)
    config = source.load_config(quantization)
    tokenizer = source.load_tokenizer()
    model = source.make_outline(config, kind, weights_here=weights_here)
    check_outline(model, name, quantization)
    _fill_with_zeros(model)
    model.eval()
    if where.type == "cpu":
        use_batched_attention(model)
    can = Abilities(decoder=find_decoder(model))
    return BaseModel(model, tokenizer, name, where, kind, pad_id=0, identity=find_identity(name), can=can)


def _fill_with_zeros(model: Any) -> None:
    """Real tensors in the place of those on the meta device; tied weights stay tied.

    All matrices of one type are views of the same zeros, as large as the largest one, and the experts of a stack are
    one matrix: kernels want the strides of real weights. Zeros that are never written take no memory.
    """
    largest: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        largest[parameter.dtype] = max(largest.get(parameter.dtype, 1), math.prod(parameter.shape[-2:]))
    # of numpy, which asks the system for zeros; torch writes them
    zeros = {
        dtype: torch.from_numpy(np.zeros(size * dtype.itemsize, np.uint8)).view(dtype)
        for dtype, size in largest.items()
    }
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            matrix = parameter.shape[-2:]
            zero = zeros[parameter.dtype][: math.prod(matrix)].view(matrix).expand(parameter.shape)
            made.setdefault(id(parameter), torch.nn.Parameter(zero, requires_grad=False))
            setattr(module, name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))


def _padding(model: Any, tokenizer: Any) -> int:
    """The id that fills rows up: no token sees it, but it needs a row of the embedding, which an added one may lack."""
    rows = model.get_input_embeddings().weight.shape[0]
    named = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in named if token is not None and token < rows), 0)


def _load(name: str, quantization: Quantization, how: dict[str, Any], trust_remote_code: bool) -> tuple[Any, Any]:
    source = open_source(name, trust_remote_code)
    config = source.load_config(quantization)
    return source.load_model(config, **how), source.load_tokenizer()
