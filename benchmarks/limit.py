"""Part 5, how close training comes to the machine: its FLOP/s over the rate of plain matrix products, same run.

    python benchmarks/limit.py [--device cpu|cuda] [--data FILE] [--quick]

The numerator is products.py's count for what is trained over the seconds of a client's training, optimizer included.
The denominator is the best rate of one matrix product in the base's type over the shapes of this model's layers at
2048 and 4096 rows, measured before and after. The profile says which kind of operation the time goes to.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import products
from federation import make_bench, make_config
from model import model_for
from part import emit, parse_arguments, say
from products import Pass, count_operations
from rows import load_rows, write_client_file
from usual import ALL_SEVEN, QUERY_VALUE

KINDS = {
    "matrix products": ("mm", "addmm", "addmm_", "linear"),
    "attention products": ("bmm", "baddbmm", "matmul", "scaled_dot_product", "flash_attention", "efficient_attention"),
    "softmax and masks": ("softmax", "masked_fill", "where", "triu", "log_softmax", "bitwise"),
    "copies": ("copy_", "clone", "contiguous", "cat", "index", "gather", "scatter", "fill_", "zero_", "embedding"),
    "elementwise": ("mul", "add", "sub", "div", "silu", "gelu", "neg", "pow", "rsqrt", "mean", "sum", "exp", "adam"),
}
"""Kind -> beginnings of operator names after `aten::_`; the first kind that fits, exact names for the products."""


def main() -> None:
    arguments = parse_arguments(__doc__)
    on_cpu = arguments.device == "cpu"
    count, repeats = (4, 1) if arguments.quick else (24, 2 if on_cpu else 5)
    adapted = {"q,v": QUERY_VALUE} if on_cpu else {"q,v": QUERY_VALUE, "all seven": ALL_SEVEN}
    kind = "dolly" if arguments.data else "short"
    rows = load_rows(arguments.data, count)
    table, ratios, profiles, notes = {}, {}, {}, []
    with tempfile.TemporaryDirectory() as folder, model_for(arguments.device, quick=arguments.quick) as name:
        file = write_client_file(rows, Path(folder) / "rows.json")
        for label, targets in adapted.items():
            config = make_config(name, arguments.device, targets=targets, num_clients=1, local_batch_size=count)
            bench = make_bench(config, [file])
            entry, profiles[label], operations = _measure(bench, repeats)
            table[f"{kind}, {label}"] = entry
            ratios[f"{kind}, {label}: of the matrix rate"] = round(entry["tflops"] / entry["matrix_tflops"], 4)
            told = ", ".join(f"{part} {value:g}" for part, value in operations.items())
            notes.append(f"{label}: operations counted in a step of {count} rows, in 10^12: {told}")
            say(f"  {label}: {entry['tflops']:.3f} of {entry['matrix_tflops']:.3f} TFLOP/s")
            del bench
    notes.append(" ".join((products.__doc__ or "").split()))
    emit("limit", table, ratios, notes, profile=profiles)


def _measure(bench: Any, repeats: int) -> tuple[dict[str, Any], dict[str, float], dict[str, float]]:
    """A side's entry, its profile (kind -> share of the time) and the operations by kind in 10^12."""
    from fedlora.federated.adapters import make_adapter
    from fedlora.types import Phase

    examples = bench.examples.training(0)
    start = make_adapter(bench.lora.shapes(), 0)

    def train() -> float:
        began = time.perf_counter()
        bench.trainer.train(Phase(start), examples, round_number=1, client_id=0)
        return time.perf_counter() - began

    with record_passes() as passes:
        train()
    operations = count_operations(bench.base.model, bench.lora, passes)
    rates = [measure_products(bench.base)]
    times = [train() for _ in range(repeats)]
    rates.append(measure_products(bench.base))
    seconds = statistics.median(times)
    tokens = sum(len(example.ids) for example in examples)
    entry = {
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "tflops": round(sum(operations.values()) / seconds / 1e12, 4),
        "matrix_tflops": round(max(rates), 4),
        "dtype": bench.base.dtype_name,
        "passes": len(passes),
        "times": [round(value, 3) for value in times],
    }
    return (
        entry,
        _profile(train, bench.base.device.type),
        {kind: round(value / 1e12, 3) for kind, value in operations.items()},
    )


@contextmanager
def record_passes() -> Iterator[list[Pass]]:
    """The passes that are laid out while the block runs."""
    from fedlora.llm import local_training

    passes: list[Pass] = []
    make = local_training.make_batch

    def watch(rows: Sequence[Any], **options: Any) -> Any:
        batch = make(rows, **options)
        lengths = tuple(len(row.ids) for row in rows)
        passes.append(Pass(lengths, len(batch.prefix), len(batch.targets)))
        return batch

    with mock.patch.object(local_training, "make_batch", watch):
        yield passes


def measure_products(base: Any) -> float:
    """The best rate of a matrix product, in 10^12 operations a second, over this model's shapes and two row counts."""
    import torch

    shapes = {
        (layer.in_features, layer.out_features)
        for name, layer in base.model.named_modules()
        if isinstance(layer, torch.nn.Linear) and ".layers." in name
    }
    best = 0.0
    for rows in (2048, 4096):
        for into, out in sorted(shapes):
            x = torch.randn(rows, into, device=base.device, dtype=base.dtype)
            weight = torch.randn(out, into, device=base.device, dtype=base.dtype)
            best = max(best, 2 * rows * into * out / _fastest(x, weight) / 1e12)
    return best


def _fastest(x: Any, weight: Any, attempts: int = 5) -> float:
    """Seconds of one product: the fastest of a few groups."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    repeats = 50 if x.device.type == "cuda" else 4
    times = []
    with torch.no_grad():
        for _ in range(attempts + 1):
            began = time.perf_counter()
            for _ in range(repeats):
                F.linear(x, weight)
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - began) / repeats)
    return min(times[1:])


def _profile(train: Any, device: str) -> dict[str, float]:
    """Kind of operation -> share of the operators' own time, on the device they ran on."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        train()
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if not event.key.startswith("aten::"):
            continue
        spent[_kind(event.key)] += event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: round(value / total, 4) for kind, value in sorted(spent.items(), key=lambda pair: -pair[1])}


def _kind(operator: str) -> str:
    name = operator.removeprefix("aten::").lstrip("_")
    for kind in ("matrix products", "attention products"):
        if name in KINDS[kind]:
            return kind
    for kind, beginnings in KINDS.items():
        if kind != "matrix products" and name.startswith(beginnings):
            return kind
    return "other"


if __name__ == "__main__":
    main()
