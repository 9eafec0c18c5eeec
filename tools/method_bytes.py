"""What each mode moves per client and round, by a run's own metrics: a table in docs/strategies.md.

    python studies/small_model.py --folder build/small_model
    python tools/method_bytes.py build/small_model

Three rounds of every mode with five clients of rank 4 on the query and value layers, one optimizer step a round. Bytes
do not depend on what is learned, so that is enough.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from machine import describe_machine

from fedlora.config.train import MODE_NAMES, TrainConfig
from fedlora.data.skills import make_skill_rows
from fedlora.files import read_text, write_json, write_text
from fedlora.stages import train

PAGE = Path(__file__).parent.parent / "docs" / "strategies.md"
BEGIN, END = "<!-- measured bytes: tools/method_bytes.py -->\n", "<!-- end of measured bytes -->\n"
CLIENTS = 5


def measure(mode: str, model: str, folder: Path) -> list[tuple[float, float]]:
    """(down, up) of every round, per client that took part."""
    options = {"prune_to": 1.0} if mode == "hetlora" else {}
    config = TrainConfig.of(
        exp_name=mode,
        federation_mode=mode,
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
    run = train.run(config)
    rows = [json.loads(line) for line in run.metrics_file.read_text(encoding="utf-8").splitlines()]
    clients = 1 if mode == "pooled" else CLIENTS
    return [
        (row["bytes_down"] / clients, row["bytes_up"] / clients)
        for row in rows
        if row["kind"] == "round" and row["round"] > 0
    ]


def make_table(found: dict[str, list[tuple[float, float]]]) -> str:
    lines = ["| mode | down, rounds 1, 2, 3 | up, rounds 1, 2, 3 |", "| --- | ---: | ---: |"]
    for mode, rounds in found.items():
        cells = (", ".join(f"{size / 1e3:,.0f}" for size in sizes) for sizes in zip(*rounds, strict=True))
        lines.append(f"| `{mode}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = make_skill_rows(1, seed=0)
        for client in range(CLIENTS):
            write_json(folder / "data" / str(CLIENTS) / f"local_training_{client}.json", rows)
        found = {mode: measure(mode, sys.argv[1], folder) for mode in MODE_NAMES}
    place = (
        "Per client, in kB (1,000 bytes): five clients of rank 4 on the query and value layers of the studies' small "
        f"model, by `python tools/method_bytes.py build/small_model`, {describe_machine()}.\n\n"
    )
    before, rest = read_text(PAGE).split(BEGIN)
    write_text(PAGE, before + BEGIN + place + make_table(found) + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
