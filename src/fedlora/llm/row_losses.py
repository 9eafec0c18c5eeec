"""The loss of single rows, as sums over response tokens: for intervals, and for choices by likelihood."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.llm.examples import Example
from fedlora.llm.local_training import Trainer
from fedlora.llm.memory import with_less_memory
from fedlora.stopping import stop_if_asked
from fedlora.types import AdapterState


def measure_rows(
    trainer: Trainer,
    adapter: AdapterState | None,
    examples: Sequence[Example],
    *,
    background: AdapterState | None = None,
) -> list[float]:
    """The cross-entropy of every example, summed over its labels, in nats; None is the base model.

    Their sum is what `Trainer.validate` divides by the labels.
    """
    trainer.lora.set_background(background)
    trainer.lora.set_adapter(adapter)

    def attempt(tokens_per_pass: int) -> list[float]:
        found = [0.0] * len(examples)
        for places in trainer.cut_passes(examples, tokens_per_pass):
            stop_if_asked()
            rows = [examples[place] for place in places]
            each = trainer.label_losses(rows).double().split([row.num_labels for row in rows])
            for place, part in zip(places, each, strict=True):
                found[place] = float(part.sum())
        return found

    longest = max(len(example.ids) for example in examples)
    found, _ = with_less_memory(attempt, trainer.book.layout.tokens_per_pass, longest, "measuring losses")
    return found
