"""Answers to many prompts with one resident model.

Prompts are sorted by length and batched under a token budget; finished rows leave the batch; the
results come back in the order of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedlora.llm.base_model import BaseModel
from fedlora.llm.decoding import Decoding, choose_tokens, draw_uniforms
from fedlora.llm.examples import cut_passes

BATCH_OVERHEAD_TOKENS = 4096
"""What another batch costs in tokens of padding: every decode step reads all weights again."""


def generate_answers(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    tokens_per_pass: int,
    most_rows: int | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> list[list[int]]:
    """Token ids of the answer to every prompt (without the end token), in the prompts' order."""
    answers: list[list[int]] = [[] for _ in prompts]
    batches = cut_passes(
        [len(prompt) + decoding.max_new_tokens for prompt in prompts],
        token_budget=tokens_per_pass,
        most_rows=most_rows,
        overhead=BATCH_OVERHEAD_TOKENS,
    )
    for rows in batches:
        batch = Batch(base, [prompts[row] for row in rows], rows, decoding)
        for row, answer in zip(rows, batch.answer(), strict=True):
            answers[row] = answer
        on_rows(len(rows))
    return answers


class Batch:
    """Rows that are answered together: left-padded ids, their mask, and who is still writing."""

    def __init__(
        self, base: BaseModel, prompts: Sequence[Sequence[int]], rows: Sequence[int], decoding: Decoding
    ) -> None:
        self.base = base
        self.decoding = decoding
        self.stop_ids = torch.tensor(sorted(stop_tokens(base)), device=base.device)
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), longest), base.pad_id, dtype=torch.long)
        mask = torch.zeros((len(prompts), longest), dtype=torch.long)
        for index, prompt in enumerate(prompts):
            ids[index, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
            mask[index, longest - len(prompt) :] = 1
        self.ids, self.mask = ids.to(base.device), mask.to(base.device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.uniforms = draw_uniforms(decoding, rows).to(base.device)
        self.seen = self._mark_prompts()
        self.alive = torch.arange(len(prompts), device=base.device)
        self.written: list[list[int]] = [[] for _ in prompts]

    @torch.inference_mode()
    def answer(self) -> list[list[int]]:
        """Prefill, then one token per live row and step."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.base.model.config)
        ids, positions = self.ids, self.positions
        for step in range(self.decoding.max_new_tokens):
            logits = self.base.last_logits(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
            )
            tokens = choose_tokens(logits, self.seen, self.uniforms[self.alive, step], self.decoding)
            going = ~torch.isin(tokens, self.stop_ids)
            for row, token, goes in zip(self.alive.tolist(), tokens.tolist(), going.tolist(), strict=True):
                if goes:
                    self.written[row].append(token)
            if not bool(going.any()):
                break
            positions = positions[:, -1:] + 1
            if not bool(going.all()):
                tokens, positions = tokens[going], positions[going]
                self._drop_finished(going)
            if self.seen.numel():
                self.seen.scatter_(1, tokens[:, None], True)
            ids = tokens[:, None]
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        return self.written

    def _drop_finished(self, going: Tensor) -> None:
        kept = going.nonzero()[:, 0]
        self.cache.batch_select_indices(kept)
        self.alive, self.mask, self.seen = self.alive[kept], self.mask[kept], self.seen[kept]

    def _mark_prompts(self) -> Tensor:
        """(rows, vocabulary) marks of prompt tokens where a repetition penalty needs them, else (rows, 0)."""
        if self.decoding.repetition_penalty == 1.0:
            return torch.zeros((len(self.ids), 0), dtype=torch.bool, device=self.base.device)
        vocabulary = self.base.model.get_output_embeddings().weight.shape[0]
        seen = torch.zeros((len(self.ids), vocabulary), dtype=torch.bool, device=self.base.device)
        real = self.ids.where(self.mask.bool(), self.ids[:, -1:])
        return seen.scatter_(1, real, True)


def stop_tokens(base: BaseModel) -> set[int]:
    """The ids that end an answer: the tokenizer's and the generation configuration's."""
    listed = getattr(base.model.generation_config, "eos_token_id", None)
    more = listed if isinstance(listed, list) else [listed]
    return {token for token in [base.tokenizer.eos_token_id, *more] if token is not None}
