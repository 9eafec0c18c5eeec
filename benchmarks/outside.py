"""Part 2, the share of a round that is spent outside forward, backward and optimizer step.

    python benchmarks/outside.py [--device cpu|cuda] [--quick]

A real run of fedlora (federated loop, client pool, store, checksums, manifest, metrics) on 8 clients of 16 short rows,
one optimizer step each: little work per client, so that everything around the work shows. Timers are put around
the functions from outside; where the rest goes is told by function, as far as it is theirs alone.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from federation import make_bench, make_config, time_rounds
from model import model_for
from part import emit, parse_arguments, say
from rows import load_rows, write_client_file

NUM_CLIENTS = 8
ROWS_EACH = 16


def main() -> None:
    arguments = parse_arguments(__doc__)
    clients, repeats = (2, 1) if arguments.quick else (NUM_CLIENTS, 2 if arguments.device == "cpu" else 5)
    rows = load_rows(None, clients * ROWS_EACH)
    runs = []
    with tempfile.TemporaryDirectory() as folder, model_for(arguments.device, quick=arguments.quick) as name:
        files = [
            write_client_file(rows[client * ROWS_EACH : (client + 1) * ROWS_EACH], Path(folder) / f"{client}.json")
            for client in range(clients)
        ]
        config = make_config(name, arguments.device, num_clients=clients, local_batch_size=ROWS_EACH)
        bench = make_bench(config, files)
        time_rounds(bench, config)
        for _ in range(repeats):
            with timers(arguments.device) as spent:
                seconds, _ = time_rounds(bench, config)
            runs.append({"seconds": seconds, **spent})
            say(f"  a round of {seconds:.2f} s, {_share(runs[-1]):.2%} of it outside")
    names = [name for name in runs[0] if name != "seconds"]
    median = {name: statistics.median(run[name] for run in runs) for name in ("seconds", *names)}
    round_entry = {
        "seconds": round(median["seconds"], 3),
        "inside": round(sum(median[name] for name in INSIDE), 3),
        "times": [round(run["seconds"], 3) for run in runs],
        "shares_outside": [round(_share(run), 5) for run in runs],
    }
    profile = {name: round(median[name] / median["seconds"], 5) for name in names}
    share = statistics.median(map(_share, runs))
    profile["the rest"] = round(1 - sum(profile.values()), 5)
    notes = [
        f"{clients} clients of {ROWS_EACH} short rows, one step each; {repeats} timed runs of one round after an "
        "untimed one, from the first task to the committed manifest, run.json and metrics included",
        "inside: forward and backward passes with the loss, clipping and the optimizer step",
    ]
    emit("outside", {"round": round_entry}, {"share outside": round(share, 5)}, notes, profile=profile)


INSIDE = ("forward and backward", "optimizer step")


def _share(run: dict[str, float]) -> float:
    return 1 - sum(run[name] for name in INSIDE) / run["seconds"]


@contextlib.contextmanager
def timers(device: str) -> Iterator[dict[str, float]]:
    """Seconds spent in each of a few functions while the block runs; none of them calls another."""
    from fedlora.engines.client_data import ClientExamples
    from fedlora.llm import local_training
    from fedlora.llm.lora import LoraModel
    from fedlora.runs.metrics_log import MetricsLog
    from fedlora.runs.writer import RunWriter

    places: list[tuple[str, Any, str]] = [
        ("forward and backward", local_training, "backward_loss"),
        ("optimizer step", local_training.Trainer, "_update"),
        ("making batches", local_training, "make_batch"),
        ("reading rows", ClientExamples, "training"),
        ("adapter in and out", LoraModel, "set_adapter"),
        ("adapter in and out", LoraModel, "get_adapter"),
        ("writing updates", RunWriter, "keep_update"),
        ("committing the round", RunWriter, "commit_round"),
        ("metrics and run.json", MetricsLog, "append"),
        ("metrics and run.json", RunWriter, "write_run"),
    ]
    spent: dict[str, float] = defaultdict(float)
    with contextlib.ExitStack() as stack:
        for name, place, attribute in places:
            timed = _timed(getattr(place, attribute), name, spent, device)
            stack.enter_context(mock.patch.object(place, attribute, timed))
        spent.update(dict.fromkeys((name for name, _, _ in places), 0.0))
        yield spent


def _timed(function: Callable[..., Any], name: str, spent: dict[str, float], device: str) -> Callable[..., Any]:
    def run(*positional: Any, **named: Any) -> Any:
        began = time.perf_counter()
        result = function(*positional, **named)
        if device == "cuda":
            # without it a pass would be timed as the launching of its kernels
            import torch

            torch.cuda.synchronize()
        spent[name] += time.perf_counter() - began
        return result

    return run


if __name__ == "__main__":
    main()
