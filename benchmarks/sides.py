"""The sides of the training benchmark, each in a process of its own that trains when it is asked to.

A process of its own because fedlora's settings of the allocator would help the usual way too. On a CPU a side is
warm from its turn before; on a GPU it hands its memory back after each turn, so that the sides fit beside each
other, and takes it again in an untimed round.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Side:
    """One way to train: by whom, the base's type, the adapted layers, rows of an optimizer step, and where."""

    who: str
    dtype: str
    targets: tuple[str, ...]
    batch_size: int
    device: str
    name: str
    autocast: bool = False


@dataclass(frozen=True)
class Turn:
    """One timed round: seconds, real tokens, padded tokens (0: not known), the loss, and the process's peak memory."""

    seconds: float
    tokens: int
    padded: int
    loss: float
    peak_gib: float


@contextlib.contextmanager
def open_side(side: Side) -> Iterator[Connection]:
    """A side's process; send it a file of rows and it answers with a Turn."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, side), daemon=True)
    process.start()
    theirs.close()
    try:
        yield pipe
    finally:
        process.terminate()
        process.join()


def _serve(pipe: Connection, side: Side) -> None:
    import logging
    import sys
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    # the libraries' own lines and bars; a traceback still goes to the real stderr
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - for as long as the process lives
    run = (_make_usual if side.who == "usual" else _make_fedlora)(side)
    while True:
        file = pipe.recv()
        if side.device == "cuda":
            run(file)
        pipe.send(run(file))
        if side.device == "cuda":
            _hand_back()


def _hand_back() -> None:
    import torch

    torch.cuda.empty_cache()


def _make_usual(side: Side) -> Callable[[Path], Turn]:
    import torch
    from peft import get_peft_model_state_dict
    from rows import encode
    from usual import load_model, train_client

    from fedlora.data.records import read_rows
    from fedlora.federated.adapters import make_adapter

    model, tokenizer = load_model(side.dtype, side.targets, name=side.name, device=side.device)
    shapes = {key: tuple(value.shape) for key, value in get_peft_model_state_dict(model).items()}

    def run(file: Path) -> Turn:
        rows = encode(read_rows(file), tokenizer)
        start, end = (file.parent / f"{os.getpid()}-{when}.bin" for when in ("start", "end"))
        # the adapter that fedlora starts from, so that both sides must find the same loss
        torch.save(make_adapter(shapes, 0), start)
        began = time.perf_counter()
        done = train_client(
            model, rows, start, end, tokenizer=tokenizer, local_batch_size=side.batch_size, autocast=side.autocast
        )
        seconds = time.perf_counter() - began
        return Turn(seconds, done.num_tokens, done.num_padded_tokens, done.loss, _peak_gib(side))

    return run


def _make_fedlora(side: Side) -> Callable[[Path], Turn]:
    from federation import make_bench, make_config, time_rounds, with_files

    config = make_config(
        side.name,
        side.device,
        dtype=side.dtype,
        targets=side.targets,
        num_clients=1,
        local_batch_size=side.batch_size,
    )
    benches: dict[Path, Any] = {}

    def run(file: Path) -> Turn:
        if file not in benches:
            first = next(iter(benches.values()), None)
            benches[file] = with_files(first, config, [file]) if first else make_bench(config, [file])
        seconds, lines = time_rounds(benches[file], config)
        line = next(line for line in lines if line["kind"] == "round")
        return Turn(seconds, line["num_tokens"], 0, line["loss"], _peak_gib(side))

    return run


def _peak_gib(side: Side) -> float:
    """Peak memory since the process began: of the device, or resident on a CPU."""
    if side.device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
