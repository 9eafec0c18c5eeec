"""How the next token is chosen: greedy, or sampled from a stream that belongs to the row.

Every row draws its uniform numbers from its own seed, so a sampled answer does not depend on the
rows it was batched with. The filters come in transformers' order: repetition, temperature, top-k, top-p.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.config.generate import GenerateConfig
from fedlora.llm.base_model import BaseModel
from fedlora.seeds import derive_seed

Choose = Callable[[Tensor, Tensor, int], Tensor]
"""Next token of each unfinished row (rows,): from its logits (rows, vocabulary), its place in the batch (rows,), and
the number of the step."""


OnToken = Callable[[int, Sequence[int]], None]
"""Called with each token as it comes: the row, and all ids of its answer so far."""


@dataclass(frozen=True)
class Request:
    """A prompt, the number of its row (a sampled answer belongs to it), and which stacked adapter answers."""

    prompt: Sequence[int]
    row: int
    adapter: int = 0


@dataclass(frozen=True)
class Decoding:
    """Decoding parameters; temperature 0 is greedy, top_k 0, top_p 1 and repetition_penalty 1 are off."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 309

    def record(self) -> dict[str, Any]:
        """The parameters as a prediction's sidecar keeps them."""
        return asdict(self)


PRESETS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0},
    "reference": {"temperature": 0.1, "top_p": 0.75, "top_k": 50, "repetition_penalty": 1.1},
}


def choose_decoding(config: GenerateConfig) -> Decoding:
    """The preset with the flags that were given on top."""
    chosen = {name: getattr(config, name) for name in PRESETS["greedy"] if getattr(config, name) is not None}
    return Decoding(config.max_new_tokens, **{**PRESETS[config.preset], **chosen}, seed=config.seed)


def draw_uniforms(decoding: Decoding, rows: Sequence[int]) -> Tensor:
    """Uniform numbers (rows, max_new_tokens) in float64, one stream per row number."""
    streams = []
    for row in rows:
        generator = torch.Generator().manual_seed(derive_seed(decoding.seed, "sampling", row))
        streams.append(torch.rand(decoding.max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(streams)


def choose_tokens(logits: Tensor, seen: Tensor, uniforms: Tensor, decoding: Decoding) -> Tensor:
    """Next token (rows,) from logits (rows, vocabulary).

    `seen` (rows, vocabulary) marks tokens of prompt and answer so far; `uniforms` (rows,) in [0, 1).
    """
    scores = logits.float()
    if decoding.repetition_penalty != 1.0:
        penalised = torch.where(scores < 0, scores * decoding.repetition_penalty, scores / decoding.repetition_penalty)
        scores = torch.where(seen, penalised, scores)
    if decoding.temperature == 0.0:
        return scores.argmax(dim=-1)
    scores, tokens = (scores / decoding.temperature).sort(dim=-1, descending=True, stable=True)
    if decoding.top_k:
        scores[:, decoding.top_k :] = float("-inf")
    shares = torch.softmax(scores.double(), dim=-1)
    if decoding.top_p < 1.0:
        # a token stays while the tokens before it do not yet reach top_p, so the first always stays
        shares = shares.masked_fill(shares.cumsum(-1) - shares >= decoding.top_p, 0.0)
    edges = shares.cumsum(-1)
    picked = torch.searchsorted(edges, (uniforms.to(edges) * edges[:, -1])[:, None], right=True)
    return tokens.gather(1, picked.clamp(max=tokens.shape[1] - 1))[:, 0]


def mark_seen(base: BaseModel, prompts: Sequence[Sequence[int]], decoding: Decoding) -> Tensor:
    """(rows, vocabulary) marks of prompt tokens where a repetition penalty needs them, else (rows, 0)."""
    if decoding.repetition_penalty == 1.0:
        return torch.zeros((len(prompts), 0), dtype=torch.bool, device=base.device)
    seen = torch.zeros((len(prompts), base.vocabulary), dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    return seen.to(base.device)


def answer_limits(base: BaseModel, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[int]:
    """Most tokens of each answer: it ends with the model's context, for learned positions end there."""
    context = base.context or sys.maxsize
    return [max(1, min(decoding.max_new_tokens, context - len(prompt))) for prompt in prompts]


def stop_tokens(base: BaseModel) -> set[int]:
    """The ids that end an answer: the tokenizer's and the generation configuration's."""
    listed = getattr(base.model.generation_config, "eos_token_id", None)
    more = listed if isinstance(listed, list) else [listed]
    return {token for token in [base.tokenizer.eos_token_id, *more] if token is not None}
