"""What LoRA dropout costs: no dropout, noise from torch's generator, and noise that belongs to the row.

    python benchmarks/dropout.py [--device cuda] [--data FILE] [--quick]

One resident model, rank 8 on q and v, one optimizer step of 24 rows, at the default dropout. Noise from torch's
generator depends on how a step is cut into passes; it is drawn here in the place of ours, in the same layer, so that
nothing else differs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from model import model_for
from part import emit, parse_arguments, side, take_turns
from rows import encode, load_rows
from usual import QUERY_VALUE

from fedlora.config.train import TrainConfig
from fedlora.federated.adapters import make_adapter
from fedlora.llm.base_model import BaseModel, load_base_model
from fedlora.llm.dropout import DropoutNoise
from fedlora.llm.examples import Example
from fedlora.llm.layout import Layout, LayoutBook
from fedlora.llm.local_training import Trainer
from fedlora.llm.lora import LoraModel, LoraSpec
from fedlora.llm.memory import USEFUL_TOKENS
from fedlora.types import Phase

NUM_ROWS, REPEATS = 24, 7


class TorchNoise(DropoutNoise):
    """The same share of entries, from torch's generator."""

    def draw(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """True where an entry is kept."""
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(self.kept_share)


def main() -> None:
    options = parse_arguments(__doc__)
    with model_for(options.device, quick=options.quick) as name:
        base = load_base_model(name, device=options.device)
        rows = encode(load_rows(options.data, 4 if options.quick else NUM_ROWS), base.tokenizer)
        default = TrainConfig.of().lora_dropout
        sides = {
            "no dropout": make_side(base, rows, 0.0, DropoutNoise),
            "torch's generator": make_side(base, rows, default, TorchNoise),
            "noise of the row": make_side(base, rows, default, DropoutNoise),
        }
        take_turns(sides, 1)  # untimed
        times = take_turns(sides, 1 if options.quick else REPEATS)
    tokens = sum(len(row.ids) for row in rows)
    entries = {name: side(values) for name, values in times.items()}
    for entry in entries.values():
        entry["tokens_per_second"] = round(tokens / entry["seconds"], 1)
    ours = entries["noise of the row"]["seconds"]
    ratios = {
        "seconds, noise of the row over torch's generator": round(ours / entries["torch's generator"]["seconds"], 3),
        "seconds, noise of the row over no dropout": round(ours / entries["no dropout"]["seconds"], 3),
    }
    kind = "Dolly" if options.data else "short"
    notes = [
        f"one step of {len(rows)} {kind} rows, {tokens} tokens, dropout {default}, {base.dtype_name}, "
        f"{torch.get_num_threads()} thread(s); without dropout, rows share what they all begin with"
    ]
    emit("dropout", entries, ratios, notes)


def make_side(base: BaseModel, rows: list[Example], p: float, noise: type[DropoutNoise]) -> Callable[[], float]:
    """Seconds of one optimizer step over `rows` with dropout `p`."""
    config = TrainConfig.of(local_batch_size=len(rows), local_num_epochs=1, lora_dropout=p)
    book = LayoutBook(Layout(USEFUL_TOKENS[base.device.type]))

    def run() -> float:
        # layers of its own for each side, on the one base
        lora = LoraModel(base.model, LoraSpec(8, 16, 2.0, p, QUERY_VALUE))
        lora.noise = noise(p, len(lora.layers))
        for layer in lora.layers.values():
            layer.noise = lora.noise
        start = make_adapter(lora.shapes(), 0)
        trained = Trainer(base, lora, config, book).train(Phase(start), rows, round_number=1, client_id=0)
        for name, layer in lora.layers.items():
            parent, _, child = name.rpartition(".")
            setattr(base.model.get_submodule(parent), child, layer.base)
        return trained.seconds

    return run


if __name__ == "__main__":
    sys.exit(main())
