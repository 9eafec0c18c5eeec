"""One client's training in one round, and validation.

The user states the mathematics (rows per step, epochs, learning rate); how a step's rows are laid out
in memory is decided here and does not change the gradient: the loss of a step is the sum over its
response tokens divided by their number, and LoRA dropout belongs to the row, whatever the passes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedlora.config.train import TrainConfig
from fedlora.console import say
from fedlora.data.client_names import shown_client
from fedlora.errors import TrainingError
from fedlora.federated.adapters import pick_half
from fedlora.federated.privacy.randomness import Secret
from fedlora.federated.schedule import learning_rate
from fedlora.llm.base_model import BaseModel
from fedlora.llm.examples import Batch, Example, cut_alike, make_batch, order_steps
from fedlora.llm.fast.fast_layers import FastLayers
from fedlora.llm.fast.packed_rows import cut_packs
from fedlora.llm.layout import LayoutBook, Reduction
from fedlora.llm.local_gradient import GradientTerms
from fedlora.llm.local_optimizer import Moments, make_optimizer, read_moments
from fedlora.llm.lora import LoraModel
from fedlora.llm.loss import backward_loss, label_losses
from fedlora.llm.memory import with_less_memory
from fedlora.llm.private_steps import PrivateSteps
from fedlora.seeds import derive_seed
from fedlora.stopping import stop_if_asked
from fedlora.types import AdapterState, Phase, Step, no_step


@dataclass(frozen=True)
class Trained:
    """What local training gives: adapter, optimizer moments, counts and the token-weighted mean loss."""

    adapter: AdapterState
    moments: Moments
    loss: float
    num_tokens: int
    num_labels: int
    num_steps: int
    seconds: float
    mean_gradient: AdapterState | None = None


class Trainer:
    """Trains adapters of one resident base model, one client after another."""

    def __init__(
        self, base: BaseModel, lora: LoraModel, config: TrainConfig, book: LayoutBook, secret: Secret | None = None
    ) -> None:
        self.base = base
        self.lora = lora
        self.config = config
        self.book = book
        # what private lots and their noise are drawn from; a private configuration needs one
        self.secret = secret
        self.fast = FastLayers.of(base) if base.can.fast_layers else None

    def train(
        self,
        phase: Phase,
        examples: Sequence[Example],
        *,
        round_number: int,
        client_id: int,
        moments: Moments | None = None,
        needs_gradient: bool = False,
        on_step: Callable[[Step], None] = no_step,
    ) -> Trained:
        """All local epochs of one client's phase; TrainingError when the loss is no longer a number."""
        config, began = self.config, (started := time.monotonic())
        self.lora.set_background(phase.background)
        self.lora.set_adapter(phase.start, weight=phase.weight)
        factors = pick_half(dict(self.lora.named_factors()), phase.trainable)
        optimizer = make_optimizer(config, factors, moments, self.base.device)
        terms = GradientTerms(phase, factors, needs_mean=needs_gradient)
        private = None
        if config.dp_example_noise_multiplier is not None:
            place = {"round_number": round_number, "client_id": client_id}
            private = PrivateSteps(self.lora, factors, config, self.secret, **place)
        steps = private.draw_lots(examples) if private else self._order_steps(examples, round_number, client_id)
        loss_sum, num_labels, num_tokens = 0.0, 0, 0
        devices = [self.base.device] if self.base.device.type == "cuda" else []
        checkpointing = self.book.layout.gradient_checkpointing
        with torch.random.fork_rng(devices=devices), self.lora.train_mode(checkpointing=checkpointing):
            for index, rows in enumerate(steps):
                loss = self._add_gradients(rows, round_number, client_id, index, private)
                loss_sum += loss
                terms.add()
                self._update(optimizer, terms, list(factors.values()), self._rate(round_number, index, len(steps)))
                if not math.isfinite(loss_sum):
                    raise TrainingError(
                        f"the loss is not a number in step {index + 1} of round {round_number}",
                        hint="lower --local_learning_rate, or use --base_dtype float32",
                    )
                labels, tokens = sum(example.num_labels for example in rows), sum(len(example.ids) for example in rows)
                num_labels, num_tokens = num_labels + labels, num_tokens + tokens
                facts = (loss / labels if labels else None, len(rows), tokens, time.monotonic() - started)
                started += facts[-1]
                on_step(Step(round_number, client_id, index + 1, len(steps), *facts, optimizer.param_groups[0]["lr"]))
        return Trained(
            adapter=self.lora.get_adapter(),
            moments=read_moments(factors, optimizer) if config.optimizer_state == "keep" else {},
            # private lots may all be empty
            loss=loss_sum / max(1, num_labels),
            num_tokens=num_tokens,
            num_labels=num_labels,
            num_steps=len(steps),
            seconds=time.monotonic() - began,
            mean_gradient=terms.mean(),
        )

    def validate(
        self,
        adapter: AdapterState | None,
        examples: Iterable[Sequence[Example]],
        *,
        background: AdapterState | None = None,
    ) -> float:
        """Mean cross-entropy per response token over groups of examples, in evaluation mode; None: the base model."""
        self.lora.set_background(background)
        self.lora.set_adapter(adapter)
        total, num_labels = 0.0, 0
        budget = self.book.layout.tokens_per_pass
        for group in examples:
            stop_if_asked()
            longest = _longest(group)
            loss, budget = with_less_memory(
                lambda tokens, rows=group: self._sum_losses(rows, tokens), budget, longest, "validation"
            )
            total += loss
            num_labels += sum(example.num_labels for example in group)
        return total / num_labels

    def _sum_losses(self, rows: Sequence[Example], tokens_per_pass: int) -> float:
        passes = [[rows[index] for index in group] for group in self.cut_passes(rows, tokens_per_pass)]
        return float(sum(self.label_losses(group).sum() for group in passes))

    def label_losses(self, rows: Sequence[Example]) -> torch.Tensor:
        """The cross-entropy (labels,) at each label of one pass, row by row, in float32, without gradients."""
        if fast := self._fast_for(rows):
            return fast.label_losses(rows)
        return label_losses(self.base, self.make_batch(rows, share_prefix=True))

    def _fast_for(self, rows: Sequence[Example], private: PrivateSteps | None = None) -> FastLayers | None:
        """The fast path where these rows, and what is in force, allow it."""
        is_plain = private is None and self.lora.has_no_background and not self.book.layout.gradient_checkpointing
        return self.fast if is_plain and _longest(rows) <= self.base.can.fast_layers else None

    def _order_steps(self, examples: Sequence[Example], round_number: int, client_id: int) -> list[list[Example]]:
        """All steps of all local epochs."""
        config = self.config
        return [
            step
            for epoch in range(config.local_num_epochs)
            for step in order_steps(
                examples,
                batch_size=config.local_batch_size,
                seed=config.seed,
                round_number=round_number,
                client_id=client_id,
                epoch=epoch,
                by_length=config.group_by_length,
            )
        ]

    def _add_gradients(
        self, rows: Sequence[Example], round_number: int, client_id: int, step: int, private: PrivateSteps | None
    ) -> float:
        """Leave the gradient of one step in the factors; returns the sum of the loss over its labels.

        When memory runs out the step is repeated with half the budget, which the book then keeps.
        """
        loss = self._sum_gradients(rows, round_number, client_id, step, private) if rows else 0.0
        if private:
            private.add_noise(step)
        return loss

    def _sum_gradients(
        self, rows: Sequence[Example], round_number: int, client_id: int, step: int, private: PrivateSteps | None
    ) -> float:
        scale = 1.0 / sum(example.num_labels for example in rows)
        # with dropout every row must draw its own noise, on the tokens it shares as well; and a layer that is
        # computed again has no cache to share
        share = not self.config.lora_dropout and not self.book.layout.gradient_checkpointing
        seeds = self._draw_seeds(len(rows), round_number, client_id, step, private)

        def attempt(tokens_per_pass: int) -> float:
            self._clear_gradients()
            # torch's generator draws only the base's own dropout
            torch.manual_seed(derive_seed(self.config.seed, "dropout", round_number, client_id, step))
            losses = []
            for group in self.cut_passes(rows, tokens_per_pass, private):
                self.lora.noise.begin_pass([seeds[index] for index in group], self.base.device)
                losses.append(self._run_backward([rows[index] for index in group], scale, share, private))
            return float(torch.stack(losses).sum())

        planned = self.book.layout.budget(round_number, client_id, step)
        longest = _longest(rows)
        what = f"step {step + 1} of round {round_number}"
        loss, used = with_less_memory(attempt, planned, longest, what)
        if used < planned:
            name = shown_client(client_id, self.book.files)
            say(f"{name}, {what}: out of memory with {planned} tokens in a pass; continuing with {used}")
            self.book.add(Reduction(round_number, client_id, step, used))
        return loss

    def _draw_seeds(
        self, count: int, round_number: int, client_id: int, step: int, private: PrivateSteps | None
    ) -> list[int]:
        """What the LoRA dropout of each example of a step is drawn from."""
        if private:
            return private.draw_seeds(count, step)
        place = (round_number, client_id, step)
        return [derive_seed(self.config.seed, "dropout", *place, row) for row in range(count)]

    def _run_backward(
        self, group: Sequence[Example], scale: float, share: bool, private: PrivateSteps | None
    ) -> torch.Tensor:
        """One pass, whose gradients are added to the factors'; in a private one each row's are clipped first."""
        stop_if_asked()
        if fast := self._fast_for(group, private):
            return fast.backward_loss(group, scale=scale, share=share)
        if private is None:
            return backward_loss(self.base, self.make_batch(group, share_prefix=share), scale=scale)
        batch = self.make_batch(group, share_prefix=False)
        return private.add_clipped(group, lambda: backward_loss(self.base, batch, scale=1.0))

    def cut_passes(
        self, rows: Sequence[Example], tokens_per_pass: int, private: PrivateSteps | None = None
    ) -> list[list[int]]:
        """The places of `rows` that go through the model together, pass by pass."""
        most_rows = private.most_rows if private else None
        alone = None if self.base.can.equal_rows else 1
        limits = [limit for limit in (self.config.local_micro_batch_size, most_rows, alone) if limit is not None]
        most = min(limits, default=None)
        if self._fast_for(rows, private):
            return cut_packs(rows, token_budget=tokens_per_pass, most_rows=most)
        lengths = [len(example.ids) for example in rows]
        return cut_alike(lengths, self.base.can.padding, token_budget=tokens_per_pass, most_rows=most)

    def make_batch(self, rows: Sequence[Example], *, share_prefix: bool) -> Batch:
        """One pass over `rows`."""
        return make_batch(
            rows,
            pad_id=self.base.pad_id,
            device=self.base.device,
            share_prefix=share_prefix and _longest(rows) <= self.base.can.shared_prefix,
        )

    def _update(
        self, optimizer: torch.optim.Optimizer, terms: GradientTerms, factors: list[nn.Parameter], rate: float
    ) -> None:
        """Clip the gradients of what is trained, step, forget all gradients."""
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(factors, self.config.max_grad_norm)
        terms.count()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        # the fused kernel changes factors without counting it, and the layers cast them anew by that count
        torch.autograd.graph.increment_version(factors)
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        for _, factor in self.lora.named_factors():
            factor.grad = None

    def _rate(self, round_number: int, step: int, steps_per_round: int) -> float:
        config = self.config
        return learning_rate(
            config.lr_schedule,
            config.local_learning_rate,
            round_number=round_number,
            step=step,
            steps_per_round=steps_per_round,
            rounds=config.num_communication_rounds,
            warmup=config.warmup_steps,
        )


def _longest(rows: Sequence[Example]) -> int:
    return max(len(row.ids) for row in rows)
