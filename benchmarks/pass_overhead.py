"""What a forward and backward pass costs: a constant plus so much a token; gives PASS_OVERHEAD_TOKENS.

    python benchmarks/pass_overhead.py

Fits seconds = constant + slope * tokens over batches of 1 to 32 rows of 48 tokens, medians of several passes.
Needs `fedlora model smollm2-135m`.
"""

from __future__ import annotations

import os
import statistics
import time

from machine import describe_machine

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

ROWS = (1, 2, 4, 8, 16, 32)
LENGTH = 48
LABELS = 8
REPEATS = 5


def main() -> None:
    import numpy as np

    from fedlora.federated.adapters import make_adapter
    from fedlora.llm.base_model import load_base_model
    from fedlora.llm.examples import Example, make_batch
    from fedlora.llm.lora import LoraModel, LoraSpec
    from fedlora.llm.loss import backward_loss

    base = load_base_model("smollm2-135m", device="cpu")
    lora = LoraModel(base.model, LoraSpec(8, 16, 2.0, 0.0, ("all-linear",)))
    lora.set_adapter(make_adapter(lora.shapes(), 0))
    print(describe_machine())
    tokens, seconds = [], []
    for rows in ROWS:
        examples = [Example([100 + row + i for i in range(LENGTH)], LENGTH - LABELS) for row in range(rows)]
        batch = make_batch(examples, pad_id=base.pad_id)
        backward_loss(base, batch, scale=1.0)
        times = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            backward_loss(base, batch, scale=1.0)
            times.append(time.perf_counter() - began)
        tokens.append(rows * LENGTH)
        seconds.append(statistics.median(times))
        print(f"{rows:3} rows, {tokens[-1]:5} tokens: {seconds[-1] * 1000:7.0f} ms")
    slope, constant = np.polyfit(tokens, seconds, 1)
    print(f"a pass costs {constant * 1000:.0f} ms, a token {slope * 1000:.2f} ms: {constant / slope:.0f} tokens a pass")


if __name__ == "__main__":
    main()
