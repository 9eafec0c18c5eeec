"""Two optimizer steps of one client, trained for the clock and forgotten.

Both steps count: the first is slower than most of a run's, as memory is taken for the first time, the second may be
faster, as passes of its shape were seen before. A step of the probe holds no more than a few full passes, since further
passes would only repeat what these say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.config.train import TrainConfig
from fedlora.engines.workbench import Workbench
from fedlora.federated.privacy.randomness import Secret
from fedlora.llm.examples import Example, order_steps
from fedlora.llm.layout import LayoutBook
from fedlora.llm.local_training import Trainer
from fedlora.planning.forecast import count_units, cut_step
from fedlora.types import AdapterState, ClientId, Phase

PASSES = 4
"""Full passes that a step of the probe holds at most."""


@dataclass(frozen=True)
class Probe:
    """What both steps held and took; `tokens_per_pass` is the budget that was left of the layout's."""

    client_id: ClientId
    num_rows: int
    num_tokens: int
    units: int
    seconds: float
    tokens_per_pass: int


def run_probe(bench: Workbench, config: TrainConfig, client_id: ClientId, start: AdapterState) -> Probe:
    """Train two steps of a client's rows from `start`, in the run's layout; raises what training would raise."""
    examples, size = _choose_rows(bench, config, client_id)
    epochs = 1 if len(examples) > size else 2
    shortened = config.model_copy(update={"local_batch_size": size, "local_num_epochs": epochs})
    book = LayoutBook(bench.book.layout)
    # nothing of the probe is kept, so a secret that nobody keeps will do
    secret = Secret.draw() if config.is_private else None
    trainer = Trainer(bench.base, bench.lora, shortened, book, secret)
    trained = trainer.train(Phase(start), examples, round_number=1, client_id=client_id)
    steps = [step for epoch in range(epochs) for step in _steps(examples, shortened, client_id, epoch)]
    return Probe(
        client_id=client_id,
        num_rows=sum(map(len, steps)),
        num_tokens=trained.num_tokens,
        units=sum(count_units(cut_step(step, shortened, book.layout, bench.base.can)) for step in steps),
        seconds=trained.seconds,
        tokens_per_pass=book.layout.budget(1, client_id, len(steps) - 1),
    )


def _choose_rows(bench: Workbench, config: TrainConfig, client_id: ClientId) -> tuple[list[Example], int]:
    """Examples for two steps, or for one that is taken twice, and the examples per step."""
    every = bench.examples.training(client_id)
    rows = [example for step in _steps(every, config, client_id, 0) for example in step]
    room, size = PASSES * bench.book.layout.tokens_per_pass, 0
    while size < min(len(rows), config.local_batch_size) and (not size or room >= len(rows[size].ids)):
        room -= len(rows[size].ids)
        size += 1
    return (rows[: 2 * size] if len(rows) >= 2 * size else rows[:size]), size


def _steps(rows: Sequence[Example], config: TrainConfig, client_id: ClientId, epoch: int) -> list[list[Example]]:
    return order_steps(
        rows,
        batch_size=config.local_batch_size,
        seed=config.seed,
        round_number=1,
        client_id=client_id,
        epoch=epoch,
        by_length=config.group_by_length,
    )
