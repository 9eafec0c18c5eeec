"""What it is worth that freed memory stays with the process (llm/allocator.py): with it and without, in turn.

    python benchmarks/allocator.py

Two things are timed, each in a process of its own: a forward and backward pass of 2,048 tokens, and the first pass
of 128 prompts of 100 to 227 tokens, whose tensors are above the size at which glibc hands memory back.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

from machine import describe_machine
from part import say

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
ROUNDS, REPEATS = 2, 3


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(keep=sys.argv[1] == "keep")))
        return
    times: dict[str, list[dict[str, float]]] = {"keep": [], "hand back": []}
    for _ in range(ROUNDS):
        for side in times:
            done = subprocess.run([sys.executable, __file__, side], capture_output=True, text=True, check=True)
            times[side].append(json.loads(done.stdout.splitlines()[-1]))
            say(f"{side}: {times[side][-1]}")
    print(describe_machine())
    for what in ("training pass", "prompts"):
        keep, back = (statistics.median(one[what] for one in times[side]) for side in ("keep", "hand back"))
        print(f"{what}: {keep:.2f} s when memory is kept, {back:.2f} s when it is handed back, ratio {back / keep:.2f}")


def measure(*, keep: bool) -> dict[str, float]:
    """Median seconds of both, after one untimed run of each."""
    import torch

    from fedlora.federated.adapters import make_adapter
    from fedlora.llm import base_model
    from fedlora.llm.decoding import Decoding
    from fedlora.llm.examples import Example, make_batch
    from fedlora.llm.generation import Request, generate_answers
    from fedlora.llm.lora import LoraModel, LoraSpec
    from fedlora.llm.loss import backward_loss

    if not keep:
        base_model.keep_freed_memory = lambda: False  # type: ignore[assignment]
    base = base_model.load_base_model("smollm2-135m", device="cpu")
    lora = LoraModel(base.model, LoraSpec(8, 16, 2.0, 0.0, ("q_proj", "v_proj")))
    lora.set_adapter(make_adapter(lora.shapes(), 0))
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(10, 40000, (128, 256), generator=draw).tolist()
    batch = make_batch([Example(row, 128) for row in rows[:8]], pad_id=0)
    requests = [Request(row[: 100 + number], number) for number, row in enumerate(rows)]

    def prompts() -> object:
        return generate_answers(base, requests, Decoding(1), tokens_per_pass=32768)

    seconds = {}
    for name, run in {"training pass": lambda: backward_loss(base, batch, scale=1.0), "prompts": prompts}.items():
        times = []
        for _ in range(1 + REPEATS):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        seconds[name] = statistics.median(times[1:])
    return seconds


if __name__ == "__main__":
    main()
