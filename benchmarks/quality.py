"""Is quality traded for speed? The held-out loss after the same steps, fedlora against the usual way, 3 seeds.

    python benchmarks/quality.py --data dolly-15k.jsonl      (`make bench-quality` takes it from FEDLORA_DOLLY)

homo with 8 clients of 16 rows each, q and v with r=8, on `skills` and, with --data, on Dolly (cutoff 256). Rows and
held-out rows stay; the seed changes the untrained adapter and the order of the rows. In each seed both sides start from
the same adapter and take the same optimizer steps of 8 rows in the same order, with AdamW at the same constant rate.
The usual way is transformers' Trainer around PEFT in fp32, on padded batches, and a mean over the adapters; fedlora is
its train stage as it comes, so on the base's type that the device is fast at. One evaluator measures both: fp32,
mean cross-entropy per response token. The figure is the paired difference, beside how far seeds lie apart.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import describe_machine
from model import model_for
from part import emit, parse_arguments, say
from point import answer_points, run_point
from rows import TEMPLATE, load_rows, write_client_file

CLIENTS = 8
ROWS_PER_CLIENT = 16
BATCH = 8
ROUNDS = 2
CUTOFF = 256
HELD_OUT = 64
SEEDS = (0, 1, 2)
RATE = 1e-3
RESULT = Path(__file__).parents[1] / "docs" / "benchmarks" / "quality.json"


class Comparison:
    """Both sides on one data set; the models of the usual way and of the evaluator are loaded once."""

    def __init__(self, data: str | None, model: str, device: str, folder: Path, *, quick: bool) -> None:
        import usual

        from fedlora.config.train import TrainConfig
        from fedlora.llm.base_model import load_base_model
        from fedlora.llm.examples import encode_rows
        from fedlora.llm.layout import Layout, LayoutBook
        from fedlora.llm.local_training import Trainer
        from fedlora.llm.lora import LoraModel, LoraSpec
        from fedlora.llm.prompts import PromptEncoder

        self.folder = folder
        self.rounds = 1 if quick else ROUNDS
        self.clients = 2 if quick else CLIENTS
        rows = load_rows(data, CLIENTS * ROWS_PER_CLIENT + HELD_OUT)
        held_out = rows[CLIENTS * ROWS_PER_CLIENT :][: 8 if quick else HELD_OUT]
        self.config = TrainConfig.of(
            base_model=model,
            data_path=folder,
            model_dir=folder / "models",
            num_clients=self.clients,
            client_selection_strategy="all",
            num_communication_rounds=self.rounds,
            local_batch_size=BATCH,
            local_num_epochs=1,
            local_learning_rate=RATE,
            lora_r=8,
            lora_dropout=0.0,
            cutoff_len=CUTOFF,
            device=device,
            token_cache=False,
        )
        base = load_base_model(model, device=device, dtype="float32")
        lora = LoraModel(base.model, LoraSpec(8, 16.0, self.config.lora_scaling, 0.0, usual.QUERY_VALUE))
        self.evaluator = Trainer(base, lora, self.config, LayoutBook(Layout(2048)))
        self.peft, self.tokenizer = usual.load_model(name=model, device=device, r=8, alpha=16)
        encoder = PromptEncoder(base.tokenizer, TEMPLATE)
        self.examples = []
        for client in range(self.clients):
            own = rows[client * ROWS_PER_CLIENT :][:ROWS_PER_CLIENT]
            write_client_file(own, folder / str(self.clients) / f"local_training_{client}.json")
            self.examples.append(encode_rows(own, encoder, cutoff=CUTOFF).examples)
        self.held_out = encode_rows(held_out, encoder, cutoff=CUTOFF).examples

    def run_seed(self, seed: int) -> dict[str, float]:
        """Held-out losses: untrained, after the usual way, after fedlora."""
        from fedlora.federated.adapters import make_adapter

        start = make_adapter(self.evaluator.lora.shapes(), seed)
        losses = {"untrained": self._evaluate(start)}
        for name, train in (("usual", self._train_usual), ("fedlora", self._train_fedlora)):
            began = time.monotonic()
            losses[name] = self._evaluate(train(start, seed))
            say(f"  seed {seed}, {name}: held-out loss {losses[name]:.4f}, {time.monotonic() - began:.0f} s")
        return losses

    def _evaluate(self, adapter: Mapping[str, Any]) -> float:
        return self.evaluator.validate(adapter, [self.held_out])

    def _train_usual(self, start: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Rounds of Trainers over adapter files, then their mean weighted by rows, in the adapters' own type."""
        import torch
        import usual

        adapter = {key: value.clone() for key, value in start.items()}
        sent = self.folder / "usual" / "global.bin"
        sent.parent.mkdir(exist_ok=True)
        total = sum(len(rows) for rows in self.examples)
        for number in range(1, self.rounds + 1):
            torch.save(adapter, sent)
            mean = {key: torch.zeros_like(value) for key, value in adapter.items()}
            for client, rows in enumerate(self.examples):
                back = self.folder / "usual" / f"{client}.bin"
                ordered = self._order(rows, seed, number, client)
                usual.train_client(
                    self.peft,
                    ordered,
                    sent,
                    back,
                    tokenizer=self.tokenizer,
                    local_batch_size=BATCH,
                    learning_rate=RATE,
                )
                for key, value in torch.load(back, weights_only=True).items():
                    mean[key] += value * (len(rows) / total)
            adapter = mean
        return adapter

    def _order(self, rows: Sequence[Any], seed: int, number: int, client: int) -> list[Any]:
        """The rows in the order in which fedlora's client sees them."""
        from fedlora.llm.examples import order_steps

        steps = order_steps(rows, batch_size=BATCH, seed=seed, round_number=number, client_id=client, epoch=0)
        return [row for step in steps for row in step]

    def _train_fedlora(self, start: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """The train stage; the seed gives it the same untrained adapter and the same order of rows."""
        from fedlora.llm.adapter_files import SAFETENSORS_NAME, load_adapter
        from fedlora.stages.train import run

        name = f"seed-{seed}"
        paths = run(self.config.model_copy(update={"exp_name": name, "seed": seed})).paths
        return load_adapter(paths.round_folder(self.rounds) / SAFETENSORS_NAME, self.evaluator.lora.shapes())


def compare(data: str | None, model: str, device: str, quick: bool) -> dict[str, Any]:
    """All seeds on one data set; in a process of its own, as every measurement."""
    with tempfile.TemporaryDirectory(prefix="fedlora-quality-") as folder, contextlib.redirect_stdout(sys.stderr):
        comparison = Comparison(data, model, device, Path(folder), quick=quick)
        return summarise([comparison.run_seed(seed) for seed in (SEEDS[:1] if quick else SEEDS)])


def summarise(losses: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean and sample standard deviation of each side over the seeds, and of their paired difference."""
    summary: dict[str, Any] = {"losses": [{key: round(value, 5) for key, value in one.items()} for one in losses]}
    columns = {name: [one[name] for one in losses] for name in ("untrained", "usual", "fedlora")}
    columns["difference"] = [one["fedlora"] - one["usual"] for one in losses]
    for name, values in columns.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        summary[name] = {"mean": statistics.mean(values), "deviation": spread}
    summary["within_noise"] = abs(summary["difference"]["mean"]) <= summary["usual"]["deviation"]
    return summary


def table(result: Mapping[str, Any]) -> str:
    """The result as a section of Markdown."""
    lines = [
        "| rows | untrained | usual way | fedlora | difference (paired) | within noise |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, found in result["sides"].items():
        cells = [f"{found[side]['mean']:.4f} ± {found[side]['deviation']:.4f}" for side in ("usual", "fedlora")]
        difference = f"{found['difference']['mean']:+.4f} ± {found['difference']['deviation']:.4f}"
        verdict = "yes" if found["within_noise"] else "no"
        lines.append(f"| {name} | {found['untrained']['mean']:.4f} | {' | '.join(cells)} | {difference} | {verdict} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in result["notes"])]) + "\n"


def main() -> None:
    arguments = parse_arguments(__doc__)
    sides: dict[str, Any] = {}
    sources = {"skills": None, **({"dolly": arguments.data} if arguments.data else {})}
    with model_for(arguments.device, quick=arguments.quick) as model:
        for name, data in sources.items():
            say(name)
            options = {"data": data, "model": model, "device": arguments.device, "quick": arguments.quick}
            sides[name] = run_point(__file__, kind="compare", **options)
    notes = [
        "held-out loss: mean cross-entropy per response token, fp32; mean ± sample standard deviation over the seeds",
        f"homo, {CLIENTS} clients of {ROWS_PER_CLIENT} rows, {ROUNDS} rounds of 1 epoch in steps of {BATCH} rows, "
        f"r=8 on q and v, learning rate {RATE}, cutoff {CUTOFF}, {HELD_OUT} held-out rows",
        "within noise: the mean paired difference is no larger than the usual way's deviation between seeds",
    ]
    gain = {
        f"{name}: share of the gain in loss that differs": found["difference"]["mean"]
        / (found["untrained"]["mean"] - found["usual"]["mean"])
        for name, found in sides.items()
    }
    machine = describe_machine()
    if not arguments.quick:
        result = {"part": "quality", "sides": sides, "ratios": gain, "notes": notes, "machine": machine}
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
        from bench import write_page

        write_page(RESULT.parent)
        say(table(result))
    emit("quality", sides, gain, notes, machine=machine)


if __name__ == "__main__" and not answer_points({"compare": compare}):
    main()
