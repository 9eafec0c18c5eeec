"""The table of measured bytes in docs/methods.md: what each method moves per client and round.

    make method-bytes

Bytes are those of a run's own metrics: three rounds of every method with five clients of rank 4 on the query and value
layers, one optimizer step a round. But for the rank of what `fedex` adds, they depend on shapes alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from machine import describe_machine
from make_docs import make_table, put

from fedlora.config.train import TrainConfig
from fedlora.data.skills import make_skill_rows
from fedlora.files import read_text, write_json, write_text
from fedlora.methods.table import METHODS
from fedlora.stages import train

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
BEGIN, END = "<!-- measured bytes: make method-bytes -->\n", "<!-- end of measured bytes -->\n"
CLIENTS = 5


def measure(method: str, model: str, folder: Path) -> list[tuple[float, float]]:
    """(down, up) of every round, per client that took part."""
    row = METHODS[method]
    # a rank that is pruned would send less for what it learned, not for what it is
    options = {"prune_to": 1.0} if row.option("prune_to") else {}
    config = TrainConfig.of(
        exp_name=method,
        federation_mode=method,
        base_model=model,
        data_path=folder / "data",
        model_dir=folder / "models",
        num_clients=CLIENTS,
        num_communication_rounds=3,
        client_selection_frac=1.0,
        local_batch_size=8,
        local_num_epochs=1,
        lora_r=4,
        prompt_template="chat",
        **options,
    )
    run = train.run(config).paths
    rows = [json.loads(line) for line in run.metrics_file.read_text(encoding="utf-8").splitlines()]
    clients = 1 if row.pools_rows else CLIENTS
    return [
        (row["bytes_down"] / clients, row["bytes_up"] / clients)
        for row in rows
        if row["kind"] == "round" and row["round"] > 0
    ]


def make_bytes(found: dict[str, list[tuple[float, float]]]) -> str:
    rows = []
    for method, rounds in found.items():
        cells = (", ".join(f"{size / 1e3:,.0f}" for size in sizes) for sizes in zip(*rounds, strict=True))
        rows.append((f"`{method}`", *cells))
    return make_table(("method", "down, rounds 1, 2, 3", "up, rounds 1, 2, 3"), rows, "---:")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = make_skill_rows(1, seed=0)
        for client in range(CLIENTS):
            write_json(folder / "data" / str(CLIENTS) / f"local_training_{client}.json", rows)
        found = {method: measure(method, sys.argv[1], folder) for method in METHODS}
    place = (
        "Per client, in kB (1,000 bytes): five clients of rank 4 on the query and value layers of the studies' small "
        f"model, by `make method-bytes`, {describe_machine()}.\n\n"
    )
    write_text(PAGE, put(read_text(PAGE), BEGIN, END, place + make_bytes(found)))


if __name__ == "__main__":
    main()
