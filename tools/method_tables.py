"""Two tables of docs/strategies.md: what each mode can be combined with, and what it moves per client and round.

    python studies/small_model.py --folder build/small_model
    python tools/method_tables.py build/small_model

What can be combined is asked of the code that refuses; a test compares. Bytes are those of a run's own metrics: three
rounds of every mode with five clients of rank 4 on the query and value layers, one optimizer step a round. They do not
depend on what is learned, so that is enough.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from machine import describe_machine

from fedlora.config.train import TrainConfig
from fedlora.data.skills import make_skill_rows
from fedlora.errors import UsageError
from fedlora.files import read_text, write_json, write_text
from fedlora.methods.choosing import choose_method
from fedlora.methods.combinations import why_not_reaggregated
from fedlora.methods.table import METHODS
from fedlora.stages import train

PAGE = Path(__file__).parent.parent / "docs" / "strategies.md"
BEGIN, END = "<!-- measured bytes: tools/method_tables.py -->\n", "<!-- end of measured bytes -->\n"
COMBINED = ("<!-- combinations: tools/method_tables.py -->\n", "<!-- end of combinations -->\n")
CLIENTS = 5

OPTIONS: dict[str, dict[str, object]] = {
    "`client_ranks`": {"client_ranks": "8,4x7"},
    "privacy by client": {"dp_noise_multiplier": 1.0, "dp_clip": 1.0},
    "privacy by example": {"dp_example_noise_multiplier": 1.0, "dp_example_clip": 1.0},
    "limits on norms": {"max_update_norm": 1.0},
    "`max_client_weight`": {"max_client_weight": 0.5},
    "`optimizer_state=keep`": {"optimizer_state": "keep"},
    "`local_optimizer=sgd`": {"local_optimizer": "sgd"},
    "`reaggregate`": {},
}
"""Option of docs/strategies.md -> the flags that ask for it; all go with a quantised base and with several devices."""


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


def make_combinations() -> str:
    """Mode by option: `yes` where `choose_method` takes both."""
    lines = ["| mode | " + " | ".join(OPTIONS) + " |", "| --- |" + " :---: |" * len(OPTIONS)]
    for mode in METHODS:
        cells = ["yes" if is_taken(mode, options) else "-" for options in OPTIONS.values()]
        cells[-1] = "yes" if why_not_reaggregated(METHODS[mode]) is None else "-"
        lines.append(f"| `{mode}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def is_taken(mode: str, options: dict[str, object]) -> bool:
    """Whether a configuration can be."""
    try:
        choose_method(TrainConfig.of(federation_mode=mode, num_clients=8, lora_r=8, **options))
    except UsageError:
        return False
    return True


def put(page: str, begin: str, end: str, text: str) -> str:
    """The page with `text` between two marks."""
    before, rest = page.split(begin)
    return before + begin + text + end + rest.split(end)[1]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = make_skill_rows(1, seed=0)
        for client in range(CLIENTS):
            write_json(folder / "data" / str(CLIENTS) / f"local_training_{client}.json", rows)
        found = {mode: measure(mode, sys.argv[1], folder) for mode in METHODS}
    place = (
        "Per client, in kB (1,000 bytes): five clients of rank 4 on the query and value layers of the studies' small "
        f"model, by `python tools/method_tables.py build/small_model`, {describe_machine()}.\n\n"
    )
    page = put(read_text(PAGE), BEGIN, END, place + make_table(found))
    write_text(PAGE, put(page, *COMBINED, make_combinations()))


if __name__ == "__main__":
    main()
