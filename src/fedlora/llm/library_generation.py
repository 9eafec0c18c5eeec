"""Answers through transformers' own cache and generate(), for bases whose results our cache would change.

Slower: rows stay in the batch until all are finished, and every step copies the cache. Tokens are chosen by our own
rule, so that seeds, filters and limits mean the same on every path.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora.llm.base_model import BaseModel
from fedlora.llm.decoding import (
    Choose,
    Decoding,
    OnToken,
    Request,
    answer_limits,
    choose_tokens,
    draw_uniforms,
    mark_seen,
    stop_tokens,
)
from fedlora.llm.ends import NO_ENDS, Ends
from fedlora.llm.lora import LoraModel
from fedlora.stopping import stop_if_asked


class LibraryBatch:
    """Rows that are answered together by generate(), left-padded when their lengths differ."""

    def __init__(
        self,
        base: BaseModel,
        requests: Sequence[Request],
        decoding: Decoding,
        lora: LoraModel | None = None,
        ends: Ends = NO_ENDS,
        *,
        choose: Choose | None = None,
        on_token: OnToken | None = None,
    ) -> None:
        """`choose` takes the place of the choice that `decoding` makes; `on_token` hears a row and its ids so far."""
        self.on_token = on_token
        self.base = base
        self.decoding = decoding
        self.ends = ends
        prompts = [request.prompt for request in requests]
        longest = max(len(prompt) for prompt in prompts)
        self.ids = torch.full((len(prompts), longest), base.pad_id, dtype=torch.long)
        self.mask = torch.zeros((len(prompts), longest), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            self.ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
            self.mask[row, longest - len(prompt) :] = 1
        self.limits = answer_limits(base, prompts, decoding)
        self.uniforms = draw_uniforms(decoding, [request.row for request in requests]).to(base.device)
        self.seen = mark_seen(base, prompts, decoding)
        self.stop_ids = stop_tokens(base) | ends.ids
        self.choose = choose or self._choose_next
        self.step = 0
        self.going = torch.ones(len(prompts), dtype=torch.bool, device=base.device)
        self.written: list[list[int]] = [[] for _ in prompts]
        if lora is not None:
            lora.choose_rows(torch.tensor([request.adapter for request in requests], device=base.device))

    @torch.inference_mode()
    def answer(self) -> list[list[int]]:
        """The tokens of every row, without the one that ends it."""
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        how = GenerationConfig(max_new_tokens=max(self.limits), do_sample=False, pad_token_id=self.base.pad_id)
        # the model's own settings would be mixed in: forced, forbidden and suppressed tokens
        model = copy.copy(self.base.model)
        model.generation_config = how
        model.generate(
            self.ids.to(self.base.device),
            attention_mask=self.mask.to(self.base.device),
            logits_processor=LogitsProcessorList([self._take]),
            stopping_criteria=StoppingCriteriaList([self._is_done]),
        )
        return self.written

    def _take(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocabulary) whose largest is the token that was chosen."""
        stop_if_asked()
        rows = self.going.nonzero()[:, 0]
        tokens = self.choose(scores[rows], rows, self.step)
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            if token in self.stop_ids:
                self.going[row] = False
                continue
            self.written[row].append(token)
            if self.on_token is not None:
                self.on_token(row, self.written[row])
            is_over = self.ends.is_over(self.written[row])
            self.going[row] = len(self.written[row]) < self.limits[row] and not is_over
        if self.seen.numel():
            self.seen[rows, tokens] = True
        self.step += 1
        chosen = torch.full_like(scores, float("-inf"))
        # a finished row goes on with anything until the others are
        chosen[:, self.base.pad_id] = 0.0
        chosen[rows] = float("-inf")
        chosen[rows, tokens] = 0.0
        return chosen

    def _is_done(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return ~self.going

    def _choose_next(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        seen = self.seen[rows] if self.seen.numel() else self.seen
        return choose_tokens(logits, seen, self.uniforms[rows, step], self.decoding)
