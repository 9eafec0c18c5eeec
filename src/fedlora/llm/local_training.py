"""One client's training in one round, and validation.

The user states the mathematics (rows per step, epochs, learning rate); how a step's rows are laid out
in memory is decided here and does not change the gradient: the loss of a step is the sum over its
response tokens divided by their number, whatever the passes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.config.train import TrainConfig
from fedlora.errors import TrainingError
from fedlora.federated.schedule import learning_rate
from fedlora.llm.base_model import BaseModel
from fedlora.llm.examples import Batch, Example, cut_passes, make_batch, order_steps
from fedlora.llm.lora import LoraModel
from fedlora.llm.loss import backward_loss, sum_loss
from fedlora.seeds import derive_seed
from fedlora.types import AdapterState

Moments = Mapping[str, Tensor]


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


class Trainer:
    """Trains adapters of one resident base model, one client after another."""

    def __init__(self, base: BaseModel, lora: LoraModel, config: TrainConfig) -> None:
        self.base = base
        self.lora = lora
        self.config = config

    def train(
        self,
        start: AdapterState,
        examples: Sequence[Example],
        *,
        round_number: int,
        client_id: int,
        moments: Moments | None = None,
        on_rows: Callable[[int], None] = lambda rows: None,
    ) -> Trained:
        """All local epochs of one client from `start`; TrainingError when the loss is no longer a number."""
        config, began = self.config, time.monotonic()
        self.lora.set_adapter(start)
        optimizer = self._make_optimizer(moments)
        steps = [
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
        loss_sum, num_labels, num_tokens = 0.0, 0, 0
        devices = [self.base.device] if self.base.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self.lora.train_mode():
            torch.manual_seed(derive_seed(config.seed, "dropout", round_number, client_id))
            for index, rows in enumerate(steps):
                rate = self._rate(round_number, index, len(steps))
                loss_sum += self._step(optimizer, rows, rate)
                if not math.isfinite(loss_sum):
                    raise TrainingError(
                        f"client {client_id}: the loss is not a number in step {index + 1} of round {round_number}",
                        hint="lower --local_learning_rate, or use --base_dtype float32",
                    )
                num_labels += sum(example.num_labels for example in rows)
                num_tokens += sum(len(example.ids) for example in rows)
                on_rows(len(rows))
        return Trained(
            adapter=self.lora.get_adapter(),
            moments=self._read_moments(optimizer) if config.optimizer_state == "keep" else {},
            loss=loss_sum / num_labels,
            num_tokens=num_tokens,
            num_labels=num_labels,
            num_steps=len(steps),
            seconds=time.monotonic() - began,
        )

    def validate(self, adapter: AdapterState | None, examples: Sequence[Example]) -> float:
        """Mean cross-entropy per response token in evaluation mode; None validates the base model."""
        self.lora.set_adapter(adapter)
        total = 0.0
        for group in self._passes(examples):
            total += sum_loss(self.base, self._make_batch(group, share_prefix=True))
        return total / sum(example.num_labels for example in examples)

    def _passes(self, rows: Sequence[Example]) -> list[list[Example]]:
        passes = cut_passes(
            [len(example.ids) for example in rows],
            token_budget=self.config.tokens_per_pass,
            most_rows=self.config.local_micro_batch_size,
        )
        return [[rows[index] for index in group] for group in passes]

    def _make_batch(self, rows: Sequence[Example], *, share_prefix: bool) -> Batch:
        return make_batch(
            rows,
            pad_id=self.base.pad_id,
            device=self.base.device,
            share_prefix=share_prefix and self.base.can_share_prefix,
        )

    def _step(self, optimizer: torch.optim.Optimizer, rows: Sequence[Example], rate: float) -> float:
        """One optimizer step; returns the sum of the loss over its labels."""
        scale = 1.0 / sum(example.num_labels for example in rows)
        total = 0.0
        for group in self._passes(rows):
            # with dropout every row must draw its own noise, on the tokens it shares as well
            batch = self._make_batch(group, share_prefix=not self.config.lora_dropout)
            total += backward_loss(self.base, batch, scale=scale)
        if self.config.max_grad_norm:
            factors = [factor for _, factor in self.lora.named_factors()]
            torch.nn.utils.clip_grad_norm_(factors, self.config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

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

    def _make_optimizer(self, moments: Moments | None) -> torch.optim.Optimizer:
        config = self.config
        factors = dict(self.lora.named_factors())
        optimizer = torch.optim.AdamW(
            factors.values(),
            lr=config.local_learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        if not moments:
            return optimizer
        for key, factor in factors.items():
            optimizer.state[factor] = {
                name: moments[f"{key}:{name}"].to(self.base.device, copy=True)
                for name in ("step", "exp_avg", "exp_avg_sq")
            }
        return optimizer

    def _read_moments(self, optimizer: torch.optim.Optimizer) -> Moments:
        return {
            f"{key}:{name}": optimizer.state[factor][name].detach().to("cpu", copy=True)
            for key, factor in self.lora.named_factors()
            for name in ("step", "exp_avg", "exp_avg_sq")
        }
