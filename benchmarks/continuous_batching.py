"""transformers' continuous batching against our own batches: the same prompts, model, type and greedy decoding.

    python benchmarks/continuous_batching.py [--device cuda] [--data FILE]

The reason why fedlora has its own decode loop. Continuous batching fills a place as soon as a row ends; ours
lets rows leave and sorts by length, with plain tensors. The base model alone answers, which both can.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from machine import describe_machine
from part import emit, parse_arguments, say, side, take_turns
from rows import TEMPLATE, load_rows

NUM_ROWS, NEW_TOKENS, REPEATS = 32, 64, 2


def main() -> None:
    options = parse_arguments(__doc__)
    from transformers import AutoModelForCausalLM, GenerationConfig

    from fedlora.llm import embedded_model
    from fedlora.llm.base_model import load_base_model
    from fedlora.llm.decoding import Decoding
    from fedlora.llm.generation import Request, generate_answers
    from fedlora.llm.memory import plan_batch
    from fedlora.llm.prompts import PromptEncoder

    count, new = (4, 8) if options.quick else (NUM_ROWS, NEW_TOKENS)
    base = load_base_model("smollm2-135m", device=options.device)
    encoder = PromptEncoder(base.tokenizer, TEMPLATE)
    rows = load_rows(options.data, count)
    prompts = [encoder.question(row, cutoff=512, context=None, max_new_tokens=new).ids for row in rows]
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        embedded_model.folder(), dtype=base.dtype, attn_implementation="sdpa"
    )
    theirs.to(base.device)
    settings = GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=base.tokenizer.eos_token_id, pad_token_id=base.pad_id
    )
    answered: dict[str, list[list[int]]] = {}

    def ours() -> float:
        began = time.perf_counter()
        requests = [Request(prompt, row) for row, prompt in enumerate(prompts)]
        answered["fedlora"] = generate_answers(base, requests, Decoding(new), tokens_per_pass=plan_batch(base))
        return time.perf_counter() - began

    def continuous() -> float:
        began = time.perf_counter()
        done = theirs.generate_batch(inputs=prompts, generation_config=settings, warmup=False)
        seconds = time.perf_counter() - began
        outputs = [done[key].generated_tokens for key in sorted(done, key=lambda key: int(key.rpartition("_")[2]))]
        answered["continuous batching"] = [
            [token for token in output if token != base.tokenizer.eos_token_id] for output in outputs
        ]
        return seconds

    sides = {"continuous batching": continuous, "fedlora": ours}
    times = take_turns(sides, 1 if options.quick else REPEATS)
    entries = {}
    for name, values in times.items():
        tokens = sum(map(len, answered[name]))
        entries[name] = side(values, new_tokens=tokens, new_tokens_per_second=round(tokens / min(values), 1))
    same = sum(mine == other for mine, other in zip(*answered.values(), strict=True))
    notes = [f"{describe_machine()}", f"{same} of {count} answers are the same token for token ({base.dtype_name})"]
    ratio = entries["continuous batching"]["seconds"] / entries["fedlora"]["seconds"]
    for name, entry in entries.items():
        say(f"{name}: {entry['new_tokens_per_second']} new tokens/s")
    emit("continuous_batching", entries, {"fedlora over continuous batching": round(ratio, 2)}, notes)


if __name__ == "__main__":
    sys.exit(main())
