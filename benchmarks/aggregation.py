"""Aggregation of 1,000 adapters of Llama-3.2-1B's size, r=16 on q_proj and v_proj: seconds and peak memory.

    python benchmarks/aggregation.py

The adapters are the files of a round as a run leaves them (50 clients, each read 20 times, so that no disk is
measured), taken one after another through the round store into FedAvg's mean, as a server does that holds only one
of them. Robust methods compare clients with each other; they are measured over fewer. The other side reads the same
bytes once, file by file into one buffer, and does nothing with them: no aggregation can be faster. Beside both stands
the machine's copy bandwidth, for what a byte in memory costs. Every figure is a process of its own.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from part import emit, parse_arguments, say, side
from point import answer_points, forget_peak, peak_megabytes, resident_megabytes, run_point

CLIENTS = 50
READS = 20
ROBUST = {"median": 4, "krum": 1, "geometric_median": 1}
"""Robust method -> how often all clients are read; Krum compares each with each, and the geometric median 32 times."""
LAYERS, HIDDEN, VALUES, RANK = 16, 2048, 512, 16
COPY_BYTES = 512 << 20


def adapter_shapes() -> dict[str, tuple[int, ...]]:
    """PEFT keys and shapes of Llama-3.2-1B's adapter: 1.7 million numbers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(LAYERS):
        for name, d_out in (("q_proj", HIDDEN), ("v_proj", VALUES)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            shapes[f"{stem}.lora_A.weight"] = (RANK, HIDDEN)
            shapes[f"{stem}.lora_B.weight"] = (d_out, RANK)
    return shapes


def open_store(folder: str) -> Any:
    """The writer whose open round 1 holds the updates."""
    from fedlora.paths import RunPaths
    from fedlora.runs.metrics_log import MetricsLog
    from fedlora.runs.reader import RunReader
    from fedlora.runs.writer import RunWriter

    paths = RunPaths(Path(folder), "aggregation")
    log = MetricsLog(paths.metrics_file)
    settings = json.dumps({"r": RANK, "lora_alpha": RANK})
    return RunWriter(RunReader(paths, adapter_shapes()), peft_config=settings, header={}, log=log)


def write_updates(folder: str) -> dict[str, Any]:
    """One update per client, of random numbers."""
    import torch

    from fedlora.types import ClientMemory, ClientUpdate

    store = open_store(folder)
    store.begin_round(1)
    for client in range(CLIENTS):
        draw = torch.Generator().manual_seed(client)
        adapter = {key: torch.randn(shape, generator=draw) for key, shape in store.reader.shapes.items()}
        store.keep_update(ClientUpdate("", 1, client, adapter, ClientMemory(), 10 + client, 1, 1, "start"), adapter)
    return {}


def aggregate(folder: str, reads: int) -> dict[str, Any]:
    """Seconds and memory of the mean over `reads` times all clients."""
    from fedlora.methods.fedavg import FedAvg
    from fedlora.runs.reader import StoredUpdates
    from fedlora.types import RoundContext, ServerState

    store = open_store(folder)
    opened = store.paths.partial_folder(1)
    clients = range(CLIENTS)
    FedAvg().aggregate(ServerState({}), StoredUpdates(store.reader, opened, [0]), RoundContext(1, 0, clients, clients))
    updates = StoredUpdates(store.reader, opened, [*clients] * reads)
    before = resident_megabytes()
    forget_peak()
    began = time.perf_counter()
    FedAvg().aggregate(ServerState({}), updates, RoundContext(1, 0, clients, clients))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_mb": peak_megabytes(), "growth_mb": peak_megabytes() - before}


def aggregate_robustly(folder: str, reads: int, method: str) -> dict[str, Any]:
    """Seconds and memory of a robust method, which compares the clients, over `reads` times all clients."""
    import torch

    from fedlora.methods.choosing import load_method
    from fedlora.runs.reader import StoredUpdates
    from fedlora.types import RoundContext, ServerState

    store = open_store(folder)
    updates = StoredUpdates(store.reader, store.paths.partial_folder(1), [*range(CLIENTS)] * reads)
    start = ServerState({key: torch.zeros(shape) for key, shape in store.reader.shapes.items()})
    clients = range(CLIENTS * reads)
    before = resident_megabytes()
    forget_peak()
    began = time.perf_counter()
    load_method(method).server.aggregate(start, updates, RoundContext(1, 0, clients, clients))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "growth_mb": peak_megabytes() - before, "clients": len(clients)}


def read_once(folder: str, reads: int) -> dict[str, Any]:
    """Seconds to read the same files into one buffer, and how many bytes they have."""
    from fedlora.llm.adapter_files import BIN_NAME
    from fedlora.paths import client_name

    store = open_store(folder)
    files = [store.paths.partial_folder(1) / client_name(client) / BIN_NAME for client in range(CLIENTS)]
    buffer = memoryview(bytearray(files[0].stat().st_size))
    count = 0
    began = time.perf_counter()
    for file in files * reads:
        with file.open("rb", buffering=0) as handle:
            count += handle.readinto(buffer)
    return {"seconds": time.perf_counter() - began, "bytes": count}


def copy_memory() -> dict[str, Any]:
    """Bytes per second that all cores copy from one place in memory to another."""
    import torch

    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    target.copy_(source)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return {"bytes_per_second": COPY_BYTES / statistics.median(times)}


def main() -> None:
    arguments = parse_arguments(__doc__)
    reads, repeats = (2, 1) if arguments.quick else (READS, 3)
    times: dict[str, list[float]] = {"reading once": [], "fedlora": []}
    read: dict[str, Any] = {}
    done: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fedlora-aggregation-") as folder:
        run_point(__file__, kind="write", folder=folder)
        few = run_point(__file__, kind="aggregate", folder=folder, reads=1)
        for _ in range(repeats):
            read = run_point(__file__, kind="read", folder=folder, reads=reads)
            done = run_point(__file__, kind="aggregate", folder=folder, reads=reads)
            times["reading once"].append(read["seconds"])
            times["fedlora"].append(done["seconds"])
            say(f"  reading once: {read['seconds']:.2f} s, fedlora: {done['seconds']:.2f} s")
        robust = {
            name: run_point(__file__, kind="robust", folder=folder, reads=1 if arguments.quick else count, method=name)
            for name, count in ROBUST.items()
        }
    copying = run_point(__file__, kind="copy")["bytes_per_second"]
    count = CLIENTS * reads
    gigabytes = read["bytes"] / 1e9
    sides = {
        "reading once": side(times["reading once"]),
        "fedlora": side(times["fedlora"], peak_mb=round(done["peak_mb"]), growth_mb=round(done["growth_mb"], 1)),
    }
    medians = {name: value["seconds"] for name, value in sides.items()}
    ratios = {
        "fedlora over reading once": medians["fedlora"] / medians["reading once"],
        # a copy reads and writes: as many bytes copied take this long
        "fedlora over copying in memory": medians["fedlora"] / (read["bytes"] / copying),
        f"peak memory of {count} over {CLIENTS} adapters": done["peak_mb"] / few["peak_mb"],
    }
    doubles = 8 * CLIENTS * sum(math.prod(shape) for shape in adapter_shapes().values())
    notes = [
        f"{count} adapters ({CLIENTS} files read {reads} times), {gigabytes:.1f} GB in all, from the page cache",
        f"copying in memory runs at {copying / 1e9:.1f} GB/s (bytes copied, so twice that in traffic)",
        f"while aggregating memory grows by {done['growth_mb']:.0f} MB at most, by {few['growth_mb']:.0f} MB for "
        f"{CLIENTS} adapters",
        f"robust methods, where {CLIENTS} updates in float64 are {doubles / 1e6:,.0f} MB: "
        + "; ".join(
            f"{name} over {one['clients']}: memory grows by {one['growth_mb']:,.0f} MB, {one['seconds']:.0f} s"
            for name, one in robust.items()
        ),
    ]
    emit("aggregation", sides, ratios, notes)


if __name__ == "__main__":
    measures = {
        "write": write_updates,
        "aggregate": aggregate,
        "robust": aggregate_robustly,
        "read": read_once,
        "copy": copy_memory,
    }
    if not answer_points(measures):
        main()
