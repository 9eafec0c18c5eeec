"""What OpenMP's spinning costs: training tokens per second, alone and beside a second process on the same cores.

    python benchmarks/spin_count.py

Each figure is a process of its own, since OpenMP reads the variable once. Needs `fedlora model smollm2-135m`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from machine import describe_machine

SETTINGS = {"torch's default": None, "10000 (fedlora)": "10000", "0 (sleep at once)": "0"}
STEPS = 4


def train_for_a_while() -> None:
    """Print tokens per second over a few optimizer steps of 16 short rows."""
    from fedlora.config.train import TrainConfig
    from fedlora.data.skills import make_skill_rows
    from fedlora.federated.adapters import make_adapter
    from fedlora.llm.base_model import load_base_model
    from fedlora.llm.examples import encode_rows
    from fedlora.llm.layout import Layout, LayoutBook
    from fedlora.llm.local_training import Trainer
    from fedlora.llm.lora import LoraModel, LoraSpec
    from fedlora.llm.prompts import PromptEncoder
    from fedlora.rows import Row
    from fedlora.types import Phase

    base = load_base_model("smollm2-135m", device="cpu")
    lora = LoraModel(base.model, LoraSpec(8, 16, 2.0, 0.0, ("all-linear",)))
    config = TrainConfig.of(local_batch_size=16, local_num_epochs=1, lora_dropout=0.0)
    trainer = Trainer(base, lora, config, LayoutBook(Layout(4096)))
    rows = [Row(r["instruction"], r["context"], r["response"], "") for r in make_skill_rows(2 * STEPS, seed=0)]
    examples = encode_rows(rows, PromptEncoder(base.tokenizer, "chat"), cutoff=512).examples[: 16 * STEPS]
    start = make_adapter(lora.shapes(), 0)
    trainer.train(Phase(start), examples[:16], round_number=1, client_id=0)
    done = trainer.train(Phase(start), examples, round_number=1, client_id=0)
    print(json.dumps(done.num_tokens / done.seconds))


def measure(setting: str | None, processes: int, limit: float) -> float | None:
    """Tokens per second of one of `processes` at once; None when they took over `limit` seconds, start-up included."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if setting is not None:
        environment["GOMP_SPINCOUNT"] = setting
    command = [sys.executable, __file__, "--train"]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    deadline = time.monotonic() + limit
    try:
        texts = [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for process in running]
    except subprocess.TimeoutExpired:
        return None
    finally:
        for process in running:
            process.kill()
            process.wait()
    return sum(float(text) for text in texts) / processes


def main() -> None:
    print(describe_machine())
    print("GOMP_SPINCOUNT      alone  two at once   (tokens/s of one process)")
    for name, setting in SETTINGS.items():
        alone, beside = measure(setting, 1, 90), measure(setting, 2, 90)
        cells = [f"{value:.0f}" if value is not None else "too slow" for value in (alone, beside)]
        print(f"{name:18} {cells[0]:>6}  {cells[1]:>11}")


if __name__ == "__main__":
    train_for_a_while() if "--train" in sys.argv else main()
