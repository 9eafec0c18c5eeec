"""The share of a round that the error meter takes: looking at updates as they pass, and measuring the wave.

    python benchmarks/meter.py [--quick]

Real rounds of fedlora with 8 clients, rank 8 on q_proj and v_proj, with timers around the two functions of the meter:
on smollm2-135m with one optimizer step of 16 short rows per client, which is the least that a client can do, and on
the two-layer model of the tests, whose clients take a few hundredths of a second each. FedSVD is the dear case: its
terms cancel, and norms are taken from QR decompositions. Last, 100 synthetic clients on smollm2-135m's shapes, for
the cost grows with the square of the cohort.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

from federation import make_bench, make_config, time_rounds
from model import model_for
from part import emit, parse_arguments, say
from rows import load_rows, write_client_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

NUM_CLIENTS = 8
ROWS_EACH = 16
MANY = 100
CASES = (("homo", 1), ("fedsvd", 1), ("homo", 8))
"""Mode and local epochs, which are optimizer steps here."""


def main() -> None:
    arguments = parse_arguments(__doc__)
    clients, repeats = (2, 1) if arguments.quick else (NUM_CLIENTS, 2)
    sides: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, model_for(arguments.device, quick=arguments.quick) as name:
        rows = load_rows(None, clients * ROWS_EACH)
        files = [
            write_client_file(rows[client * ROWS_EACH : (client + 1) * ROWS_EACH], Path(folder) / f"{client}.json")
            for client in range(clients)
        ]
        tiny = str(import_module("tiny_run").make_tiny_model(Path(folder) / "tiny"))
        models = {"two layers": tiny} if arguments.quick else {"smollm2-135m": name, "two layers": tiny}
        for label, model in models.items():
            config = make_config(model, arguments.device, num_clients=clients, local_batch_size=ROWS_EACH)
            bench = make_bench(config, files)
            time_rounds(bench, config)
            for mode, epochs in CASES:
                if model == name and epochs > 1:
                    continue
                changed = config.model_copy(update={"federation_mode": mode, "local_num_epochs": epochs})
                bench.trainer.config = changed
                key = f"{label}, {mode}, {epochs} step{'s' * (epochs > 1)} each"
                sides[key] = _measure(lambda config=changed, bench=bench: time_rounds(bench, config)[0], repeats)
                say(f"  {key}: {sides[key]['share']:.2%} of {sides[key]['seconds']:.2f} s")
    ratios = {f"share of a round: {key}": entry["share"] for key, entry in sides.items()}
    many = 4 if arguments.quick else MANY
    notes = [
        f"{clients} clients of {ROWS_EACH} short rows; medians of {repeats} rounds after an untimed one, training, "
        "writing and committing included",
        f"{many} synthetic clients on smollm2-135m's shapes, of rank 8: {_time_many(many):.2f} s in all, "
        "and the clients' training comes on top of that",
    ]
    emit("meter", sides, ratios, notes)


def _measure(run: Callable[[], float], repeats: int) -> dict[str, Any]:
    from fedlora.federated.error_meter import ErrorMeter

    rounds, spent = [], []
    for _ in range(repeats):
        total = [0.0]
        with (
            mock.patch.object(ErrorMeter, "_hold", _timed(ErrorMeter._hold, total)),
            mock.patch.object(ErrorMeter, "measure", _timed(ErrorMeter.measure, total)),
        ):
            rounds.append(run())
        spent.append(total[0])
    shares = [meter / seconds for meter, seconds in zip(spent, rounds, strict=True)]
    return {
        "seconds": statistics.median(rounds),
        "meter": statistics.median(spent),
        "share": round(statistics.median(shares), 5),
        "times": [round(value, 4) for value in rounds],
        "meter_times": [round(value, 4) for value in spent],
    }


def _timed(function: Callable[..., Any], total: list[float]) -> Callable[..., Any]:
    def run(*positional: Any) -> Any:
        began = time.perf_counter()
        result = function(*positional)
        total[0] += time.perf_counter() - began
        return result

    return run


def _time_many(count: int) -> float:
    """Seconds to measure a wave of `count` clients."""
    import torch

    from fedlora.federated.error_meter import ErrorMeter
    from fedlora.methods.fedavg import FedAvg
    from fedlora.types import ClientMemory, ClientUpdate, Download

    draw = torch.Generator().manual_seed(0)
    shapes = {}
    for layer in range(30):
        for name, d_out in (("q", 576), ("v", 192)):
            shapes[f"{layer}.{name}.lora_A.weight"] = (8, 576)
            shapes[f"{layer}.{name}.lora_B.weight"] = (d_out, 8)
    start = {key: 0.05 * torch.randn(shape, generator=draw) for key, shape in shapes.items()}
    updates = [
        ClientUpdate(
            "",
            1,
            client,
            {key: value + 0.01 * torch.randn(value.shape, generator=draw) for key, value in start.items()},
            ClientMemory(),
            1,
            1,
            1,
            "",
        )
        for client in range(count)
    ]
    meter = ErrorMeter({client: Download(start) for client in range(count)}, weight_of=FedAvg().weight_of, scaling=2.0)
    made = {key: torch.stack([(one.upload or {})[key] for one in updates]).mean(dim=0) for key in start}
    began = time.perf_counter()
    for _ in meter.watch(updates):  # type: ignore[arg-type]
        pass
    meter.measure(made)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
