"""Standard tasks of lm-evaluation-harness for a base and its adapters: the library's model class against fedlora.

    python benchmarks/tasks.py --data dolly-15k.jsonl

The usual way: for the base and for every adapter lm-eval's model class loads the base in the type that fedlora computes
in, PEFT puts the adapter on it, and the library's evaluation runs all tasks with batches of eight. fedlora: one call of
its tasks stage for all of them. Both sides have the same task files and rows: choices of four replies without examples
and after three, and answers of up to 24 tokens. Loads count, imports do not. The sides take turns, each in a
process of its own.

Needs the extra `tasks`. The adapters are random and small, as in generation.py.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from generation import NAME, make_run
from model import model_for, source_of
from part import emit, parse_arguments, say, side
from point import answer_points, run_point
from rows import load_rows

BATCH = 8
CLIENTS = 2
"""Adapters besides the global one."""
ROWS = {"cpu": 8, "cuda": 200}
NEW_TOKENS = 24
MOST_LETTERS = 300
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/test.json", train: "{folder}/train.json"}}}}
test_split: test
fewshot_split: train
num_fewshot: {shots}
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
ANSWER = """
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/test.json"}}}}
test_split: test
num_fewshot: 0
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
generation_kwargs: {{until: ["Question:"], max_gen_toks: {tokens}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
TASKS = {"choices": 0, "choices after 3": 3}


def make_tasks(folder: str, model: str, data: str | None, count: int, new_tokens: int) -> dict[str, Any]:
    """A run with adapters, and the task files with their rows."""
    make_run(folder, model, data, count)
    found = load_rows(data, 4 * count)
    rows = [
        {
            "question": f"{row.instruction} {row.input}".strip()[:MOST_LETTERS],
            "choices": [f" {found[(place + other) % len(found)].output[:80]}" for other in range(4)],
            "label": 0,
            "answer": row.output[:80],
        }
        for place, row in enumerate(found)
    ]
    root = Path(folder)
    (root / "test.json").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    (root / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows[count:]))
    for number, (name, shots) in enumerate(TASKS.items()):
        text = CHOICE.format(name=name.replace(" ", "_"), folder=folder, shots=shots)
        (root / f"task{number}.yaml").write_text(text)
    (root / "task9.yaml").write_text(ANSWER.format(folder=folder, tokens=new_tokens))
    return {}


def time_fedlora(folder: str, device: str, dtype: str) -> dict[str, Any]:
    """One call of the stage for the base and every adapter."""
    import fedlora.evaluation.tasks.task_evaluation  # noqa: F401 - imports are no part of the time
    from fedlora.config.tasks import TasksConfig
    from fedlora.stages.tasks import run

    _keep_rows_in(folder)
    root = Path(folder)
    shutil.rmtree(root / "scores", ignore_errors=True)
    began = time.perf_counter()
    results = run(
        TasksConfig.of(
            exp_name=NAME,
            model_dir=root,
            tasks=[str(file) for file in sorted(root.glob("task*.yaml"))],
            of_subjects=["base", "global", f"0-{CLIENTS - 1}"],
            evaluation_dir=root / "scores",
            device=device,
            base_dtype=dtype,
        )
    )
    seconds = time.perf_counter() - began
    parts: dict[str, float] = {}
    for one in results.results:
        spent = json.loads(one.file.read_text())["how"]["seconds"]
        parts[one.task] = parts.get(one.task, 0.0) + spent
    scores = [score.value for one in results.results for score in one.scores]
    return {"seconds": seconds, "parts": parts, "scores": scores}


def time_usual(folder: str, device: str, dtype: str, model: str) -> dict[str, Any]:
    """A fresh model of lm-eval for the base and for every adapter."""
    import logging

    from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    from fedlora.paths import RunPaths, client_name

    make: Any = HFLM
    logging.disable(logging.WARNING)
    _keep_rows_in(folder)
    root = Path(folder)
    place = RunPaths(root, NAME).round_folder(1)
    adapters = [None, place, *(place / client_name(client) for client in range(CLIENTS))]
    parts: dict[str, float] = {}
    scores = []
    began = time.perf_counter()
    manager = TaskManager(include_defaults=False)
    loaded = [manager.load(str(file)) for file in sorted(root.glob("task*.yaml"))]
    for adapter in adapters:
        options: dict[str, Any] = {"device": device, "dtype": dtype, "batch_size": BATCH}
        asked = make(pretrained=source_of(model), **options, **({"peft": str(adapter)} if adapter else {}))
        for one in loaded:
            since = time.perf_counter()
            for task in one["tasks"].values():
                task.set_fewshot_seed(seed=1234)
            found: Any = evaluate(lm=asked, task_dict=one)
            for name, measured in found["results"].items():
                parts[name] = parts.get(name, 0.0) + time.perf_counter() - since
                scores += [value for key, value in measured.items() if key in ("acc,none", "exact_match,none")]
    return {"seconds": time.perf_counter() - began, "parts": parts, "scores": scores}


def _keep_rows_in(folder: str) -> None:
    """The rows that the library reads are kept here, not under the user's home."""
    from datasets import config  # pyright: ignore[reportMissingImports]

    config.HF_DATASETS_CACHE = Path(folder) / "cache"


def main() -> None:
    arguments = parse_arguments(__doc__)
    count = 2 if arguments.quick else ROWS[arguments.device]
    new_tokens = 4 if arguments.quick else NEW_TOKENS
    with (
        model_for(arguments.device, quick=arguments.quick) as model,
        tempfile.TemporaryDirectory(prefix="fedlora-tasks-") as folder,
    ):
        made = {"model": model, "data": arguments.data, "count": count, "new_tokens": new_tokens}
        run_point(__file__, kind="make", folder=folder, **made)
        here = {"folder": folder, "device": arguments.device, "dtype": "bfloat16"}
        results: dict[str, list[dict[str, Any]]] = {"lm-eval with PEFT": [], "fedlora": []}
        for _ in range(1 if arguments.quick else 2):
            results["lm-eval with PEFT"].append(run_point(__file__, kind="usual", model=model, **here))
            results["fedlora"].append(run_point(__file__, kind="fedlora", **here))
            say(", ".join(f"{name}: {found[-1]['seconds']:.1f} s" for name, found in results.items()))
    sides = {name: side([one["seconds"] for one in found], **_parts(found)) for name, found in results.items()}
    usual, ours = sides.values()
    ratios = {"seconds, lm-eval with PEFT over fedlora": usual["seconds"] / ours["seconds"]}
    for name in results["fedlora"][0]["parts"]:
        ratios[f"{name.replace('_', ' ')} alone"] = usual[name] / ours[name]
    notes = [
        f"base, global adapter and {CLIENTS} clients' in bfloat16; {count} "
        f"{'Dolly' if arguments.data else 'short'} rows of each task",
        f"choices of 4, answers of at most {new_tokens} tokens, loads included",
        f"lm-eval's model class with batches of {BATCH}; scores may differ by a row where bfloat16 rounds otherwise",
    ]
    emit("tasks", sides, ratios, notes)


def _parts(found: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each task, over all models, of the turn that was fastest on the whole."""
    return min(found, key=lambda one: one["seconds"])["parts"]


if __name__ == "__main__":
    if not answer_points({"make": make_tasks, "fedlora": time_fedlora, "usual": time_usual}):
        main()
