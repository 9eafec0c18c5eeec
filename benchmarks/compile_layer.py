"""Whether torch.compile pays: one decoder layer forward and backward, eager against compiled, and what compiling costs.

    python benchmarks/compile_layer.py

The passes of a run have many shapes (length-sorted rows under a token budget), so a layer is compiled for dynamic
shapes once and then met with shapes it has not seen. The first call of each shape is told apart from the later ones.
"""

from __future__ import annotations

import os
import statistics
import time

from machine import describe_machine
from part import say

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
SHAPES = ((8, 256), (4, 500), (16, 120), (7, 290))
REPEATS = 5


def main() -> None:
    import torch

    from fedlora.federated.adapters import make_adapter
    from fedlora.llm.base_model import load_base_model
    from fedlora.llm.lora import LoraModel, LoraSpec

    base = load_base_model("smollm2-135m", device="cpu")
    lora = LoraModel(base.model, LoraSpec(8, 16, 2.0, 0.0, ("q_proj", "v_proj")))
    lora.set_adapter(make_adapter(lora.shapes(), 0))
    layer, rotary = base.model.model.layers[1], base.model.model.rotary_emb
    compiled = torch.compile(layer, dynamic=True)
    print(describe_machine())
    for rows, length in SHAPES:
        hidden = torch.randn(rows, length, base.model.config.hidden_size, dtype=base.dtype, requires_grad=True)
        positions = rotary(hidden, torch.arange(length)[None])

        def run(call, hidden=hidden, positions=positions) -> float:
            began = time.perf_counter()
            output = call(hidden, position_embeddings=positions)
            output = output[0] if isinstance(output, tuple) else output
            output.float().sum().backward()
            return time.perf_counter() - began

        run(layer)
        first = run(compiled)
        times = {"eager": [], "compiled": []}
        for _ in range(REPEATS):
            times["eager"].append(run(layer))
            times["compiled"].append(run(compiled))
        eager, later = (statistics.median(values) for values in times.values())
        say(f"  {rows} x {length}: done")
        print(
            f"{rows:3} x {length}: eager {eager * 1000:.1f} ms, compiled {later * 1000:.1f} ms "
            f"(ratio {eager / later:.2f}), first call {first:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
