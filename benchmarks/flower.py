"""What it costs to train across machines: SuperLink and three nodes on the loopback, with TLS and node keys.

    python benchmarks/bench.py --only flower        (needs the extra `flower`)

Adapters of about 5 and 50 MB of the embedded model (all seven kinds of layers, rank 4 and 41), one short row a client,
so that next to nothing is trained. A round's overhead is its seconds less those that its clients trained: of the
slowest one where they train at the same time, of all where they train one after another. `afresh` is a worker that is a
new process for every message. The first round, in which models are loaded, is not counted. Bytes are counted between
the nodes and the server, TLS and idle requests included, over a whole run; the formula is `4 * numbers` per adapter and
direction. Memory is the most that any process of a kind has had resident.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from part import emit, parse_arguments, say, side

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from deployment import Deployment
from relay import Relay
from tiny_run import make_client_files, make_tiny_model

RANKS = {"5 MB": 4, "50 MB": 41}
ROUNDS = 6
KINDS = {
    "flower-superlink": "SuperLink",
    "flower-superexec": "SuperExec (one at the server, one at each node)",
    "flwr-serverapp": "server's app",
    "flower-supernode": "SuperNode",
    "flwr-clientapp": "client's app",
    "worker.yaml": "worker",
}
"""A word of the command -> which process it is."""


def main() -> None:
    arguments = parse_arguments(__doc__)
    with tempfile.TemporaryDirectory(prefix="fl-") as folder, contextlib.ExitStack() as stack:
        root = Path(folder)
        model = make_tiny_model(root / "model") if arguments.quick else "smollm2-135m"
        deployment = Deployment(root, model, make_client_files(root / "data", [1, 1, 1]))
        stack.callback(deployment.stop_all)
        measure(deployment, 2 if arguments.quick else ROUNDS)


def measure(deployment: Deployment, rounds: int) -> None:
    """Every side, one after another: what is measured is waiting, which has nothing to take turns with."""
    deployment.start_server()
    sides: dict[str, Any] = {}
    notes: list[str] = []
    peaks: dict[str, float] = {}
    for size, rank in RANKS.items():
        options = {
            **{"num_communication_rounds": rounds, "lora_r": rank, "lora_target_modules": "all-linear"},
            **{"base_dtype": "auto", "prompt_template": "alpaca"},
        }
        file = deployment.config(f"here-{rank}", "homo", **options)
        assert deployment.call("train", "--config", str(file), seconds=600).returncode == 0
        sides[f"{size}, one process"] = overhead(deployment, f"here-{rank}", at_once=False)
        for name, script in {"worker": None, "afresh": Path(__file__).with_name("afresh.py")}.items():
            run = f"{name}-{rank}"
            with nodes(deployment, script) as wire, watch_memory(peaks if script is None else {}):
                few = options if script is None else {**options, "num_communication_rounds": min(rounds, 3)}
                asked = deployment.run_arguments(deployment.config(run, "homo", **few))
                done = deployment.call(*asked, seconds=1200)
                assert done.returncode == 0, done.stderr[-3000:]
                up, down = wire.up, wire.down
            sides[f"{size}, three nodes, {name}"] = overhead(deployment, run, at_once=True)
            if script is None:
                notes.append(describe_bytes(deployment, run, size, up, down))
            say(f"{size} {name}: {sides[f'{size}, three nodes, {name}']}")
    notes += [f"most memory of a {KINDS[word]} process: {peak:.0f} MB" for word, peak in peaks.items()]
    ratios = {
        f"{size}: overhead, afresh over worker": sides[f"{size}, three nodes, afresh"]["seconds"]
        / sides[f"{size}, three nodes, worker"]["seconds"]
        for size in RANKS
    }
    emit("flower", sides, ratios, ["seconds of overhead of the rounds after the first", *notes])


@contextlib.contextmanager
def nodes(deployment: Deployment, worker: Path | None) -> Iterator[Relay]:
    """Three nodes that are connected through a relay that counts."""
    with Relay(deployment.port) as wire:
        server = f"localhost:{wire.port}"
        for client in range(3):
            if worker is None:
                deployment.start_node(client, "--server", server)
            else:
                deployment.start_node_with(worker, client, server=server)
        deployment.wait_until_online()
        wire.up = wire.down = 0
        try:
            yield wire
        finally:
            for name in [name for name in deployment.processes if name != "server"]:
                deployment.stop(name)


@contextlib.contextmanager
def watch_memory(peaks: dict[str, float]) -> Iterator[None]:
    """Kind of process -> the most MB that one has had resident while the block ran (Linux)."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.3):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error, OSError, StopIteration):
                    command = " ".join(child.cmdline())
                    word = next(word for word in KINDS if word in command)
                    peaks[word] = max(peaks.get(word, 0.0), child.memory_info().rss / 1e6)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def overhead(deployment: Deployment, name: str, *, at_once: bool) -> dict[str, Any]:
    """Seconds of a round that nobody trained, and those of a whole round, after the first."""
    rows = read_metrics(deployment, name)
    times, whole = [], []
    for row in rows:
        if row["kind"] == "round" and row["round"] > 1:
            clients = [r["seconds"] for r in rows if r["kind"] == "client" and r["round"] == row["round"]]
            whole.append(row["seconds"])
            times.append(row["seconds"] - (max(clients) if at_once else sum(clients)))
    return side(times, whole_round=round(statistics.median(whole), 2))


def describe_bytes(deployment: Deployment, name: str, size: str, up: int, down: int) -> str:
    """What went over the wire in a run against what the formula says."""
    rows = [row for row in read_metrics(deployment, name) if row["kind"] == "client"]
    counted = {"up": up, "down": down}
    told = {way: sum(row[f"bytes_{way}"] for row in rows) for way in counted}
    parts = [
        f"{way} {counted[way] / 1e6:.1f} MB against {told[way] / 1e6:.1f} ({counted[way] / told[way]:.3f})"
        for way in told
    ]
    return f"{size}: over the wire in the whole run {', '.join(parts)}; {told['up'] // len(rows)} bytes an adapter"


def read_metrics(deployment: Deployment, name: str) -> list[dict[str, Any]]:
    file = deployment.root / "models" / name / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


if __name__ == "__main__":
    main()
