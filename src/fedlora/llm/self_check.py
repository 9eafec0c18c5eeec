"""A base is tried on a few tokens before it is used: each of our faster ways against the model's own.

Compared are logits: of a plain forward pass, of a training pass (attention, padding, shared prefix, head), and of every
step of decoding (cache, padding, shared prefix, a row that leaves). A way whose logits differ is off for this base;
the way in its place is slower and the model's own. Past each length at which the configuration says that the model
computes differently, one row is tried as well. Nothing depends on the name of an architecture.

In a base of fewer bits everything is computed twice: in float32 with its weights, where a difference is a fault, and in
its own type, where ours may be no farther from float32 than the model's own path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedlora.console import say
from fedlora.errors import UsageError
from fedlora.llm.abilities import ALWAYS, Abilities
from fedlora.llm.attention import choose_attention, is_batched, watched_attention
from fedlora.llm.base_model import BaseModel
from fedlora.llm.cache import BLOCK_TOKENS
from fedlora.llm.change_lengths import ChangeLength, change_lengths
from fedlora.llm.check_files import keep_check, recall_check
from fedlora.llm.dropout import has_own_dropout
from fedlora.llm.exact_numbers import TOLERANCE, ExactNumbers, find_difference, find_excess
from fedlora.llm.memory import is_out_of_memory
from fedlora.llm.model_head import find_decoder
from fedlora.llm.probes import Row, answering_logits, draw_rows, head_logits, leaving, own_logits, training_logits

MOST_WORK = {"cpu": 1e11, "cuda": 5e13}
"""Weights times tokens of a trial past a change of length: seconds. Past longer ones our cache is off, untried."""

IN_TRAINING = ("own_attention", "equal_rows", "padding", "shared_prefix")
IN_ANSWERS = ("own_attention", "own_cache", "equal_prompts", "padded_prompts", "shared_prompts")
IN_POSITIONS = ("padding", "shared_prefix", "padded_prompts", "shared_prompts")
IN_CACHE = ("own_cache", "padded_prompts", "shared_prompts")

Probe = Callable[[BaseModel], list[Tensor]]


def checked(base: BaseModel, quantization: str, *, again: bool = False) -> BaseModel:
    """The base with what it can do; said where something is off, UsageError where nothing of ours gives its results."""
    can = None if again else recall_check(base, quantization)
    if can is None:
        can = SelfCheck(base).run()
        keep_check(base, can, quantization)
    if is_batched(base.model) or can.own_attention:
        choose_attention(base.model, ours=can.own_attention)
    if slower := can.sentence():
        say(f"{base.name}: {slower}; `fedlora model check {base.name}` says why")
    return replace(base, can=can)


class SelfCheck:
    """One base on trial."""

    def __init__(self, base: BaseModel) -> None:
        self.base = replace(base, can=_bare(base.model))
        self.numbers: Any = nullcontext() if base.dtype == torch.float32 else ExactNumbers(base.model)
        self.can_batch = is_batched(base.model)
        self.reasons: dict[str, str] = {}

    @torch.no_grad()
    def run(self) -> Abilities:
        """Everything that the base can do; UsageError when it is no causal language model, or cannot be run at all."""
        rows = draw_rows(self.base)
        truth, states = self._find_truth(rows[:2])
        base = self._settle_training(rows, truth, states)
        base = self._settle_answers(base, rows, truth)
        base = self._settle_rounding(base, rows[:2], truth)
        if has_own_dropout(base.model):
            base = _with(base, base.can.off(("shared_prefix", "shared_prompts")))
        for change in change_lengths(base.model.config):
            base = self._try_past(base, change)
        return replace(base.can, reasons={name: why for name, why in self.reasons.items() if _is_less(base, name)})

    def _find_truth(self, rows: Sequence[Row]) -> tuple[list[Tensor], Tensor | None]:
        """The logits of the model's own forward pass, row by row, and what its decoder gave it for the first row."""
        states: list[Tensor | None] = []
        decoder = self.base.decoder
        hook = decoder.register_forward_hook(lambda *given: states.append(getattr(given[2], "last_hidden_state", None)))
        try:
            truth = self._find_own(lambda base: own_logits(base, rows))
        except Exception as error:
            _raise_if_memory(error)
            raise UsageError(
                f"base_model={self.base.name!r} cannot be run on token ids alone: {_first_line(error)}",
                hint="choose a causal language model, one that reads text and predicts the next token",
            ) from error
        finally:
            hook.remove()
        self._require_numbers(truth)
        shared = rows[0].shared
        if why := find_difference([truth[1][:shared]], [truth[0][:shared]]):
            raise UsageError(
                f"base_model={self.base.name!r} is not causal: a token's logits depend on the tokens after it ({why})",
                hint="choose a model that was trained to predict the next token from those before it",
            )
        return truth, next(iter(states), None)

    def _find_head(self, row: Row, truth: Tensor, states: Tensor | None = None) -> BaseModel:
        """The base with its decoder and head, and nothing else that is ours; `states` are the decoder's, if known."""
        base = self.base
        for head in ("linear", "own", "model"):
            base = replace(base, can=replace(base.can, head=head, decoder="" if head == "model" else base.can.decoder))
            # equal to the last bit: a soft cap of small logits makes a small difference
            most = 0.0 if head == "linear" else TOLERANCE
            why = self._find_fault(lambda one: head_logits(one, row, states), base, [truth], most)
            if why is None:
                break
            if head == "own":
                self.reasons["head"] = why
        return base

    def _settle_training(self, rows: Sequence[Row], truth: list[Tensor], states: Tensor | None) -> BaseModel:
        """The base with its head, and with what is right in training."""
        first, alike, other = rows
        names = [name for name in IN_TRAINING if name != "own_attention" or self.can_batch]
        base = self._find_head(first, truth[0], states)
        everything = _with(base, base.can.on(names))
        expected = [row.of_training(truth) for row in (first, alike)] * 2
        if (
            self._find_fault(lambda one: training_logits(one, [[first, alike]], twice=True), everything, expected)
            is None
        ):
            return everything
        base = self._find_head(first, truth[0])  # again, for a model may give its decoder more than we do
        if base.can.head == "model":
            names.remove("shared_prefix")
        groups = [[first, alike], [first, other, alike]]
        truth = truth + self._find_own(lambda one: own_logits(one, [other]))
        expected = [row.of_training(truth) for rows in groups for row in rows]
        return self._settle(base, names, lambda one: training_logits(one, groups), expected)

    def _settle_answers(self, base: BaseModel, rows: Sequence[Row], truth: list[Tensor]) -> BaseModel:
        """The same for answers. Where ours differ, what generate() gives for each row alone is the truth."""
        first, alike, other = rows
        early, late = leaving(first, first.shared + 1), leaving(other, other.prompt)
        names = [name for name in IN_ANSWERS if name != "own_attention" or base.can.own_attention]
        everything = _with(base, base.can.on(names))
        together = [first, early, alike]
        expected = [row.of_answering(truth) for row in (*together, *(replace(row, steps=1) for row in together))]
        if self._find_fault(lambda one: answering_logits(one, [together], twice=True), everything, expected) is None:
            return everything
        groups = [together, [replace(first, steps=2), late, alike]]
        bare = _with(base, base.can.off(("own_attention",)))
        try:
            expected = self._find_own(lambda _: answering_logits(bare, groups))
        except Exception as error:
            _raise_if_memory(error)
            raise UsageError(
                f"base_model={self.base.name!r} cannot answer through transformers' generate(): {_first_line(error)}",
                hint="choose a model that can generate text",
            ) from error
        return self._settle(bare, names, lambda one: answering_logits(one, groups), expected)

    def _settle_rounding(self, base: BaseModel, rows: Sequence[Row], truth: list[Tensor]) -> BaseModel:
        """The base without what rounds worse in its own type than the model's own path does."""
        if base.dtype == torch.float32:
            return base
        rows = [replace(row, steps=2) for row in rows]
        with self._attention_of(self.base):
            own = own_logits(self.base, rows, together=base.can.padding > 0)
        self._require_numbers(own)
        parts = (Row.of_training, Row.of_answering)
        expected, theirs = ([part(row, logits) for part in parts for row in rows] for logits in (truth, own))
        for names in ((), IN_TRAINING[:1], (*IN_TRAINING, *IN_ANSWERS)):
            base = _with(base, base.can.off(names))
            # a shared prefix keeps numbers of this type, as the model itself does
            tried = _with(base, base.can.off(("shared_prefix", "shared_prompts")))
            with self._attention_of(tried):
                found = training_logits(tried, [rows]) + answering_logits(tried, [rows])
            why = find_excess(found, theirs, expected)
            if why is None:
                break
            self.reasons |= dict.fromkeys(names, why)
        return base

    def _settle(self, base: BaseModel, names: Sequence[str], probe: Probe, truth: list[Tensor]) -> BaseModel:
        """Switch on what gives the truth: all at once where that does, else one after the other."""
        everything = _with(base, base.can.on(names))
        if self._find_fault(probe, everything, truth) is None:
            return everything
        for name in names:
            tried = _with(base, base.can.on([name]))
            why = self._find_fault(probe, tried, truth)
            if why is None:
                base = tried
            else:
                self.reasons[name] = why
        return base

    def _try_past(self, base: BaseModel, change: ChangeLength) -> BaseModel:
        """The base with limits where rows past a change of length are not computed right, or cannot be tried."""
        end = change.tokens
        # the cache shows its room to the model, which may count it
        room = max(0, end // BLOCK_TOKENS * BLOCK_TOKENS - 1)
        if change.in_positions:
            base = self._limit(base, IN_POSITIONS, end, f"positions change past {end:,} tokens")
        weights = sum(one.numel() for one in base.model.parameters()) - base.model.get_input_embeddings().weight.numel()
        if weights * end > MOST_WORK[base.device.type]:
            return self._limit(base, IN_CACHE, room, f"rows past {end:,} tokens take too long to try")
        first, alike, other = rows = draw_rows(base, end + 7, prompt=end - 2)
        truth = self._find_own(lambda one: own_logits(one, rows))
        if change.in_positions and (why := self._find_memory(first, truth)):
            return self._limit(base, ("longest",), end, why)
        groups = [[first, alike], [first, other]]
        expected = [row.of_training(truth) for rows in groups for row in rows]
        base = self._limit_faults(base, IN_TRAINING, lambda one: training_logits(one, groups), expected, end)
        bare = _with(base, base.can.off(IN_ANSWERS))
        expected = self._find_own(lambda _: answering_logits(bare, groups))
        return self._limit_faults(base, IN_ANSWERS, lambda one: answering_logits(one, groups), expected, room)

    def _limit_faults(
        self, base: BaseModel, names: Sequence[str], probe: Probe, truth: list[Tensor], limit: int
    ) -> BaseModel:
        """The base with `names` limited where they are at fault; our attention is then off at any length."""
        if self._find_fault(probe, base, truth) is None:
            return base
        tried = _with(base, base.can.off(names))
        for name in names:
            once = replace(tried, can=replace(tried.can, **{name: getattr(base.can, name)}))
            if (why := self._find_fault(probe, once, truth)) is None:
                tried = once
            else:
                base = self._limit(base, (name,), limit, why)
        return base

    def _limit(self, base: BaseModel, names: Sequence[str], limit: int, why: str) -> BaseModel:
        can = base.can.up_to(limit, names)
        self.reasons |= {name: why for name in names if getattr(can, name) != getattr(base.can, name)}
        return _with(base, can)

    def _find_memory(self, row: Row, truth: list[Tensor]) -> str | None:
        """What differs for a row once the model has seen a longer one."""
        own_logits(self.base, [replace(row, ids=row.ids + row.ids[: len(row.ids) // 2])])
        return self._find_fault(lambda one: own_logits(one, [row]), self.base, truth[:1])

    def _find_fault(self, probe: Probe, base: BaseModel, truth: list[Tensor], most: float = TOLERANCE) -> str | None:
        """How what a probe finds differs from the truth; None where it does not."""
        try:
            with self._attention_of(base) as foreign:
                with self.numbers:
                    found = probe(base)
                if foreign:
                    return f"the model gives its attention {' and '.join(sorted(foreign))}"
                return find_difference(found, truth, most)
        except Exception as error:
            _raise_if_memory(error)
            return f"{type(error).__name__}: {_first_line(error)}"

    def _find_own(self, probe: Probe) -> list[Tensor]:
        """What a probe finds with the model's own attention."""
        with self._attention_of(self.base), self.numbers:
            return probe(self.base)

    def _require_numbers(self, logits: Sequence[Tensor]) -> None:
        if not all(bool(one.isfinite().all()) for one in logits):
            raise UsageError(
                f"base_model={self.base.name!r}: its logits in {self.base.dtype_name} are not numbers",
                hint="use --base_dtype float32; if they are not numbers there either, the weights are damaged",
            )

    def _attention_of(self, base: BaseModel) -> AbstractContextManager[set[str]]:
        """Inside, the model runs the attention that this base has."""
        if base.can.own_attention:
            return watched_attention(base.model)
        if self.can_batch:
            choose_attention(base.model, ours=False)
        return nullcontext(set())


def _bare(model: Any) -> Abilities:
    """Nothing that is ours."""
    return Abilities(find_decoder(model)).off((*IN_TRAINING, *IN_ANSWERS))


def _with(base: BaseModel, can: Abilities) -> BaseModel:
    return replace(base, can=can)


def _is_less(base: BaseModel, name: str) -> bool:
    """Whether a way is off, or limited."""
    return getattr(base.can, name) not in (True, ALWAYS, "linear", "own")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _raise_if_memory(error: Exception) -> None:
    if is_out_of_memory(error):
        raise error
