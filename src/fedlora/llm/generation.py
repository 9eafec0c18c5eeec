"""Answers to many prompts with one resident model.

Prompts are sorted by length and batched under a token budget; what all prompts of a batch begin with is
computed once; rows of several adapters may share a batch, so that the base's weights are read once for all;
finished rows leave; the results come back in the order of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fedlora.errors import TrainingError
from fedlora.llm.base_model import BaseModel
from fedlora.llm.cache import can_share_rows, make_cache, room_for
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
from fedlora.llm.examples import cut_alike
from fedlora.llm.library_generation import LibraryBatch
from fedlora.llm.lora import LoraModel
from fedlora.llm.memory import is_out_of_memory
from fedlora.stopping import stop_if_asked

BATCH_OVERHEAD_TOKENS = 4096
"""What another batch costs in tokens of padding: every decode step reads all weights again."""


def generate_answers(
    base: BaseModel,
    requests: Sequence[Request],
    decoding: Decoding,
    *,
    tokens_per_pass: int,
    most_rows: int | None = None,
    lora: LoraModel | None = None,
    ends: Ends = NO_ENDS,
    on_rows: Callable[[int], None] = lambda rows: None,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Token ids of the answer to every request (without the end token), in the requests' order.

    `on_token` is called with the number of a request and all ids of its answer so far, with each that comes; an answer
    starts again where memory ran out. `ends` has what ends an answer besides the tokenizer and the generation
    configuration. With `lora`, which then holds
    stacked adapters, each request is answered by its own; else by what is set.
    """
    answers: list[list[int]] = [[] for _ in requests]
    can = base.can
    ahead = cut_alike(
        [len(request.prompt) + decoding.max_new_tokens for request in requests],
        # rows for our own cache and rows for the library's are never mixed
        min(can.padded_prompts, can.own_cache) if can.own_cache else can.padded_prompts,
        token_budget=tokens_per_pass,
        most_rows=most_rows if can.equal_prompts else 1,
        overhead=BATCH_OVERHEAD_TOKENS,
    )[::-1]
    while ahead:
        numbers = ahead.pop()
        told = None if on_token is None else partial(_tell, on_token, numbers)
        done = _answer_together(base, [requests[number] for number in numbers], decoding, lora, ends, told)
        if done is None:
            ahead += [numbers[len(numbers) // 2 :], numbers[: len(numbers) // 2]]
            continue
        for number, answer in zip(numbers, done, strict=True):
            answers[number] = answer
        on_rows(len(numbers))
    return answers


def _tell(on_token: OnToken, numbers: Sequence[int], row: int, ids: Sequence[int]) -> None:
    """Call what listens with the number of a request in the place of its row in a batch."""
    on_token(numbers[row], ids)


def _answer_together(
    base: BaseModel,
    requests: Sequence[Request],
    decoding: Decoding,
    lora: LoraModel | None,
    ends: Ends,
    on_token: OnToken | None,
) -> list[list[int]] | None:
    """The answers; None when memory runs out. TrainingError when it does for a single request."""
    try:
        longest = max(len(request.prompt) for request in requests) + decoding.max_new_tokens
        kind = Batch if longest <= base.can.own_cache else LibraryBatch
        return kind(base, requests, decoding, lora, ends, on_token=on_token).answer()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(requests) == 1:
            raise TrainingError(
                f"row {requests[0].row + 1}: out of memory with one prompt of {len(requests[0].prompt)} tokens",
                hint="use a smaller --cutoff_len or --max_new_tokens, or a smaller model",
            ) from error
    # outside the handler: the exception's frames hold the tensors of the failed batch
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
    return None


class Batch:
    """Rows that are answered together: a shared prefix, left-padded ids after it, and which rows are unfinished."""

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
        self.lora = lora
        self.adapters = torch.tensor([request.adapter if lora else 0 for request in requests], device=base.device)
        prompts = [request.prompt for request in requests]
        self.stop_ids = torch.tensor(sorted(stop_tokens(base) | ends.ids), device=base.device)
        skip = self._count_shared(prompts)
        longest = max(len(prompt) for prompt in prompts) - skip
        ids = torch.full((len(prompts), longest), base.pad_id, dtype=torch.long)
        # one column per token that may come, zero until it is there: transformers takes a mask of ones for none
        mask = torch.zeros((len(prompts), room_for(skip + longest + decoding.max_new_tokens)), dtype=torch.long)
        mask[:, :skip] = 1
        for index, prompt in enumerate(prompts):
            behind = len(prompt) - skip
            ids[index, longest - behind :] = torch.tensor(prompt[skip:], dtype=torch.long)
            mask[index, skip + longest - behind : skip + longest] = 1
        self.prefix = torch.tensor(prompts[0][:skip], dtype=torch.long, device=base.device)
        self.ids, self.mask = ids.to(base.device), mask.to(base.device)
        self.length = skip + longest
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, skip : self.length]
        self.limits = torch.tensor(answer_limits(base, prompts, decoding), device=base.device)
        self.uniforms = draw_uniforms(decoding, [request.row for request in requests]).to(base.device)
        self.seen = mark_seen(base, prompts, decoding)
        self.alive = torch.arange(len(prompts), device=base.device)
        self.choose = choose or self._choose_next
        self.written: list[list[int]] = [[] for _ in prompts]

    @torch.inference_mode()
    def answer(self) -> list[list[int]]:
        """Prefill, then one token per live row and step."""
        self._start_cache()
        ids, positions = self.ids, self.positions
        for step in range(self.decoding.max_new_tokens):
            stop_if_asked()
            logits = self.base.last_logits(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
            )
            tokens = self.choose(logits, self.alive, step)
            written = ~torch.isin(tokens, self.stop_ids)
            for row, token, is_text in zip(self.alive.tolist(), tokens.tolist(), written.tolist(), strict=True):
                if is_text:
                    self.written[row].append(token)
                    if self.on_token is not None:
                        self.on_token(row, self.written[row])
            if self.ends.texts:
                over = [self.ends.is_over(self.written[row]) for row in self.alive.tolist()]
                written &= ~torch.tensor(over, device=written.device)
            going = written & (step + 1 < self.limits[self.alive])
            positions = positions[:, -1:] + 1
            if not bool(going.all()):
                if not bool(going.any()):
                    break
                kept = order_left(going)
                tokens, positions = tokens[kept], positions[kept]
                self._keep(kept)
            if self.seen.numel():
                self.seen.scatter_(1, tokens[:, None], True)
            ids = tokens[:, None]
            self.mask[:, self.length] = 1
            self.length += 1
        return self.written

    def _start_cache(self) -> None:
        """The prefix passes through the model once per adapter and is copied to every row."""
        self.cache = make_cache(self.base.model.config)
        if len(self.prefix):
            owners, places = self.adapters.unique(return_inverse=True)
            self._place(owners)
            ids = self.prefix.expand(len(owners), -1)
            self.base.decoder(input_ids=ids, past_key_values=self.cache, use_cache=True)
            self.cache.batch_select_indices(places)
        self._place(self.adapters)

    def _choose_next(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        return choose_tokens(logits, self.seen, self.uniforms[rows, step], self.decoding)

    def _place(self, adapters: Tensor) -> None:
        if self.lora is not None:
            self.lora.choose_rows(adapters)

    def _keep(self, kept: Tensor) -> None:
        self.cache.batch_select_indices(kept)
        self.alive, self.mask, self.seen = self.alive[kept], self.mask[kept], self.seen[kept]
        self.adapters = self.adapters[kept]
        self._place(self.adapters)

    def _count_shared(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many tokens all prompts begin with; every row keeps one of its own."""
        can = self.base.can
        longest = max(len(prompt) for prompt in prompts) + self.decoding.max_new_tokens
        if len(prompts) < 2 or longest > can.shared_prompts or not can_share_rows(self.base.model.config):
            return 0
        limit = min(len(prompt) for prompt in prompts) - 1
        first = prompts[0]
        for prompt in prompts[1:]:
            limit = next((i for i in range(limit) if prompt[i] != first[i]), limit)
        return max(0, limit)


def order_left(going: Tensor) -> Tensor:
    """The place that each row takes when rows leave (rows,) -> (rows left,): the last ones left move into the free
    places."""
    kept = going.nonzero()[:, 0]
    order = torch.arange(len(kept), device=going.device)
    order[~going[: len(kept)]] = kept[kept >= len(kept)]
    return order
