"""Peak memory of a training run: against the number of clients, and against how much of a step is in one pass.

    python benchmarks/memory.py

Runs of `fedlora train` on smollm2-135m that differ in one thing. First in the number of clients (8, 64, 512), each
with a file of 100 short rows; one client trains in each of two rounds, so what may grow is only what is held for
the others. Beside that stands what holding everybody's tokens would have taken. Then in tokens_per_pass and in
local_micro_batch_size, where one optimizer step of 64 rows is cut into smaller passes. Every figure is the most
memory that a process of its own has had resident, interpreter, libraries and base model included; once for all of
it, and once from the loaded model on, since loading is a peak of its own.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from model import model_for
from part import emit, parse_arguments, say
from point import answer_points, forget_peak, peak_megabytes, run_point
from rows import load_rows, write_client_file

CLIENTS = (8, 64, 512)
ROWS_PER_CLIENT = 100
STEP_ROWS = 64
TOKENS_PER_PASS = (512, 1024, 2048, 4096)
MICRO_BATCHES = (1, 8, 64)
COMMON = {"lora_r": 8, "lora_dropout": 0.0, "local_num_epochs": 1, "gradient_checkpointing": "off"}


def write_clients(folder: str, count: int, rows: int) -> dict[str, Any]:
    """Short rows, every client's different from the others', so that no two files share their cached tokens, but
    of the same lengths, so that whoever is drawn trains on the same shapes. In a process of its own: the rows of
    512 clients would leave their mark on the memory that is measured."""
    from dataclasses import replace

    drawn = load_rows(None, rows)
    for client in range(count):
        own = [replace(row, instruction=f"{client:03}. {row.instruction}") for row in drawn]
        write_client_file(own, Path(folder) / str(count) / f"local_training_{client}.json")
    return {}


def train(folder: str, model: str, device: str, count: int, rows: int, hold: bool, **options: Any) -> dict[str, Any]:
    """The peak of a run over `count` clients, of whom one trains in a round; with `hold`, of all tokens beside it."""
    import os

    os.environ["FEDLORA_CACHE"] = _with_models(folder)
    import torch

    from fedlora.config.train import TrainConfig
    from fedlora.stages import train
    from fedlora.training import live_run

    # all rows in one step: its passes do not depend on the order in which a client's seed puts them
    values = {**COMMON, "local_batch_size": rows, "tokens_per_pass": 1024, "num_communication_rounds": 2, **options}
    config = TrainConfig.of(
        exp_name=f"memory-{count}",
        base_model=model,
        data_path=Path(folder),
        model_dir=Path(folder) / "models",
        num_clients=count,
        client_selection_frac=1 / count,
        device=device,
        overwrite=True,
        **values,
    )
    loaded: list[float] = []
    make_workbench = live_run.make_workbench

    def make_and_note(*arguments: Any, **named: Any) -> Any:
        """Loading is a peak of its own, which would hide what training takes: training's peak starts behind it."""
        bench = make_workbench(*arguments, **named)
        loaded.append(peak_megabytes())
        forget_peak()
        return bench

    live_run.make_workbench = make_and_note
    began = time.perf_counter()
    train.run(config)
    seconds = time.perf_counter() - began
    in_training = peak_megabytes()
    found: dict[str, Any] = {
        "peak_mb": round(max(*loaded, in_training), 1),
        "training_peak_mb": round(in_training, 1),
        "seconds": round(seconds, 1),
    }
    if device == "cuda":
        found["device_peak_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    if hold:
        found["all_tokens_mb"] = round(_hold_tokens(config, count), 1)
    return found


def _with_models(folder: str) -> str:
    """A cache of its own for the tokens, with the user's converted models in it."""
    from fedlora.home import cache_folder

    cache = Path(folder) / "cache"
    cache.mkdir(exist_ok=True)
    models = cache_folder() / "models"
    if models.is_dir() and not (cache / "models").exists():
        (cache / "models").symlink_to(models.resolve())
    return str(cache)


def _hold_tokens(config: Any, count: int) -> float:
    """Megabytes that the lists and numbers of all clients' training examples take together."""
    from model import source_of
    from transformers import AutoTokenizer

    from fedlora.data.client_facts import read_client_files
    from fedlora.data.client_files import find_client_files
    from fedlora.engines.client_data import ClientExamples
    from fedlora.home import tokens_folder
    from fedlora.llm.prompts import PromptEncoder
    from fedlora.llm.token_files import TokenFiles

    files = find_client_files(config.data_path, count, chosen=True)
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(source_of(config.base_model)), config.prompt_template)
    clients = read_client_files(dict(enumerate(files)), config)
    examples = ClientExamples(clients, encoder, config, TokenFiles(tokens_folder()))
    size = 0
    for client in examples.clients():
        for example in examples.training(client):
            size += sys.getsizeof(example) + sys.getsizeof(example.ids)
    return size / 1e6


def measure(folder: str, model: str, device: str, *, quick: bool) -> dict[str, dict[str, Any]]:
    """Name of a point -> what was found there."""
    here = {"kind": "train", "folder": folder, "model": model, "device": device}
    sizes = CLIENTS[:2] if quick else CLIENTS
    rows = 8 if quick else ROWS_PER_CLIENT
    # one client trains on one step of many rows
    step = {"count": 1, "rows": STEP_ROWS, "hold": False, "local_batch_size": STEP_ROWS, "num_communication_rounds": 1}
    points: dict[str, dict[str, Any]] = {}
    for count in sizes:
        points[f"{count} clients"] = {"count": count, "rows": rows, "hold": count == sizes[-1]}
    for tokens in TOKENS_PER_PASS[:2] if quick else TOKENS_PER_PASS:
        points[f"tokens_per_pass {tokens}"] = {**step, "tokens_per_pass": tokens}
    for most in MICRO_BATCHES[:1] if quick else MICRO_BATCHES:
        points[f"micro-batch {most}"] = {**step, "tokens_per_pass": 1 << 20, "local_micro_batch_size": most}
    found = {}
    for name, options in points.items():
        run_point(__file__, kind="write", folder=folder, count=options["count"], rows=options["rows"])
        found[name] = run_point(__file__, **here, **options)
        peak, training, seconds = (found[name][key] for key in ("peak_mb", "training_peak_mb", "seconds"))
        say(f"  {name}: {peak:.0f} MB, {training:.0f} MB in training, {seconds:.0f} s")
    return found


def main() -> None:
    arguments = parse_arguments(__doc__)
    with (
        model_for(arguments.device, quick=arguments.quick) as model,
        tempfile.TemporaryDirectory(prefix="fedlora-memory-") as folder,
    ):
        sides = measure(folder, model, arguments.device, quick=arguments.quick)
    counts = [name for name in sides if name.endswith("clients")]
    first, last = counts[0], counts[-1]
    ratios = {
        f"{what}, {last} over {first}": sides[last][name] / sides[first][name]
        for what, name in (("peak memory", "peak_mb"), ("peak memory of training", "training_peak_mb"))
    }
    held = sides[last].pop("all_tokens_mb")
    notes = [
        "peak_mb: the whole process, loading included; training_peak_mb: from the loaded model on",
        f"{last}: the tokens of all of them held at once would take {held:.0f} MB more, "
        f"{held / sides[first]['training_peak_mb']:.0%} of training's peak with {first}",
        "client points: 100 short rows a client, one client per round, two rounds of one step, passes of 1,024 tokens",
        f"pass points: one optimizer step of {STEP_ROWS} short rows, no gradient checkpointing",
    ]
    emit("memory", sides, ratios, notes)


if __name__ == "__main__":
    if not answer_points({"train": train, "write": write_clients}):
        main()
