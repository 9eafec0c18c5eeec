"""Answers of nine adapters (the global one and eight clients') to the same rows: the usual way against fedlora.

    python benchmarks/generation.py --data dolly-15k.jsonl

The usual way, as published research code answers a test set: for every adapter the base is loaded in fp32 (bf16 on a
GPU), PEFT puts the adapter on it unmerged, and `generate` takes four rows at a time in file order, padded on the left.
fedlora: one call of its generate stage for the same run folder. Greedy, at most 128 new tokens, the same prompts as
token ids, loads included, imports not. The base's own answers, which the stage gives as well, are made before the
clock starts, so they also warm up what is only done once. Every repetition is a process of its own, the sides in turn.

The adapters are random and small: what is written differs a little from adapter to adapter, as it does after training,
and between the sides by the noise of the base's type. Each side's number of new tokens is given. On a CPU the usual
way also runs once on a bf16 base, as fedlora's is, so that precision and method are told apart.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from model import model_for, source_of
from part import emit, parse_arguments, say, side
from point import answer_points, run_point
from rows import CUTOFF, TEMPLATE, load_rows

NAME = "nine"
CLIENTS = 8
BATCH = 4
NEW_TOKENS = 128
ROWS = {"cpu": 8, "cuda": 64}
BUDGET = 420.0
"""Seconds after which the usual way at equal precision is left out, so that the whole stays under nine minutes."""
SPREAD = 0.02
"""Standard deviation of B; A is as in training. A sum over 8 ranks of about a tenth of a typical weight."""


def make_run(folder: str, model: str, data: str | None, count: int) -> dict[str, Any]:
    """Leave a run of one round with nine adapters, and the test file, under `folder`."""
    import torch

    from fedlora.config.train import TrainConfig
    from fedlora.federated.adapters import make_adapter
    from fedlora.files import json_lines, write_text
    from fedlora.llm.adapter_config import make_peft_config
    from fedlora.llm.base_model import load_base_model
    from fedlora.llm.lora import LoraModel, LoraSpec
    from fedlora.paths import RunPaths
    from fedlora.runs.environment import library_versions
    from fedlora.runs.metrics_log import MetricsLog
    from fedlora.runs.reader import RunReader
    from fedlora.runs.run_records import RunRecord
    from fedlora.runs.writer import RunWriter
    from fedlora.types import ClientMemory, ClientUpdate

    config = TrainConfig.of(exp_name=NAME, base_model=model, num_clients=CLIENTS, lora_r=8, lora_dropout=0.0)
    lora = LoraModel(
        load_base_model(model, device="cpu", dtype="bfloat16").model,
        LoraSpec(8, 16.0, config.lora_scaling, 0.0, config.lora_target_modules),
    )
    peft_config = make_peft_config(lora.spec, source_of(model), fan_in_fan_out=False, targets=lora.peft_names)
    paths = RunPaths(Path(folder), NAME)
    log = MetricsLog(paths.metrics_file)
    store = RunWriter(RunReader(paths, lora.shapes()), peft_config=peft_config, header={}, log=log)

    def draw(seed: int) -> dict[str, torch.Tensor]:
        adapter = make_adapter(lora.shapes(), seed)
        generator = torch.Generator().manual_seed(seed)
        for key, value in adapter.items():
            if key.endswith("lora_B.weight"):
                value.normal_(0.0, SPREAD, generator=generator)
        return adapter

    store.begin_round(1)
    for client in range(CLIENTS):
        adapter = draw(client + 1)
        store.keep_update(ClientUpdate("", 1, client, adapter, ClientMemory(), 1, 1, 1, "start"), adapter)
    store.commit_round(1, draw(0), None, {"cohort": [*range(CLIENTS)], "limited": [], "quarantined": []})
    versions = library_versions("none")
    store.write_run(
        RunRecord(
            NAME, "homo", "finished", model, "bfloat16", config.record(), versions, {}, {}, (), has_global_model=True
        )
    )
    rows = [row.as_dict() for row in load_rows(data, count)]
    write_text(Path(folder) / "test.jsonl", json_lines(rows))
    return {}


def answer_base(folder: str, device: str, new_tokens: int) -> dict[str, Any]:
    """The base's own answers, which the timed call then finds."""
    _generate(folder, device, "base", max_new_tokens=new_tokens, is_base_model=True)
    return {}


def time_fedlora(folder: str, device: str, new_tokens: int) -> dict[str, Any]:
    """One call of the stage for all adapters."""
    import torch

    import fedlora.stages.generate  # noqa: F401 - imports are no part of the time

    predictions = Path(folder) / "fedlora"
    shutil.rmtree(predictions, ignore_errors=True)
    shutil.copytree(Path(folder) / "base", predictions)
    if device == "cuda":
        torch.zeros(1, device=device)
    began = time.perf_counter()
    _generate(folder, device, "fedlora", max_new_tokens=new_tokens, all=True)
    seconds = time.perf_counter() - began
    facts = [json.loads(file.read_text()) for file in sorted(predictions.rglob("*.meta.json"))]
    counted = [fact for fact in facts if fact["adapter_sha256"] is not None]
    return _result(seconds, sum(fact["num_new_tokens"] for fact in counted), len(counted), counted[0]["base_dtype"])


def _generate(folder: str, device: str, where: str, **options: Any) -> None:
    from fedlora.config.generate import GenerateConfig
    from fedlora.stages.generate import run

    root = Path(folder)
    run(
        GenerateConfig.of(
            exp_name=NAME,
            model_dir=root,
            communication_rounds=1,
            test_file_path=root / "test.jsonl",
            prediction_dir=root / where,
            device=device,
            **options,
        )
    )


def time_usual(folder: str, device: str, new_tokens: int, model: str, dtype: str) -> dict[str, Any]:
    """A fresh base and PEFT model per adapter, rows in batches of four as they come."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    from fedlora.data.records import read_rows
    from fedlora.llm.prompts import PromptEncoder
    from fedlora.paths import RunPaths, client_name

    logging.disable_progress_bar()
    source, place = source_of(model), RunPaths(Path(folder), NAME).round_folder(1)
    if device == "cuda":
        torch.zeros(1, device=device)
    adapters = [place, *(place / client_name(client) for client in range(CLIENTS))]
    count = 0
    began = time.perf_counter()
    for adapter in adapters:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        encoder = PromptEncoder(tokenizer, TEMPLATE)
        rows = read_rows(Path(folder) / "test.jsonl")
        prompts = [encoder.question(row, cutoff=CUTOFF, context=None, max_new_tokens=new_tokens).ids for row in rows]
        base: Any = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
        peft = PeftModel.from_pretrained(base.to(device), str(adapter)).eval()
        for start in range(0, len(prompts), BATCH):
            group = prompts[start : start + BATCH]
            inputs = tokenizer.pad({"input_ids": group}, padding=True, return_tensors="pt").to(device)
            longest = inputs["input_ids"].shape[1]
            with torch.no_grad():
                made = peft.generate(
                    **inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
                )
            answers = [_cut(answer, tokenizer.eos_token_id) for answer in made[:, longest:].tolist()]
            tokenizer.batch_decode(answers, skip_special_tokens=True)
            count += sum(len(answer) for answer in answers)
    return _result(time.perf_counter() - began, count, len(adapters), dtype)


def _cut(answer: list[int], end: int) -> list[int]:
    """An answer up to its end token, which fedlora does not count either."""
    return answer[: answer.index(end)] if end in answer else answer


def _result(seconds: float, tokens: int, adapters: int, dtype: str) -> dict[str, Any]:
    return {"seconds": seconds, "tokens": tokens, "adapters": adapters, "dtype": dtype}


def compare(folder: str, model: str, device: str, *, quick: bool) -> dict[str, list[dict[str, Any]]]:
    """Every result of every side, the sides in turn; the usual way at equal precision comes once, at the end."""
    usual = "float32" if device == "cpu" else "bfloat16"
    here = {"folder": folder, "device": device, "new_tokens": 8 if quick else NEW_TOKENS}
    run_point(__file__, kind="base", **here)
    began = time.monotonic()
    results: dict[str, list[dict[str, Any]]] = {"usual": [], "fedlora": []}
    for _ in range(1 if quick else 2):
        results["usual"].append(run_point(__file__, kind="usual", model=model, dtype=usual, **here))
        results["fedlora"].append(run_point(__file__, kind="fedlora", **here))
        say(", ".join(f"{name}: {found[-1]['seconds']:.1f} s" for name, found in results.items()))
    precision = results["fedlora"][0]["dtype"]
    if precision != usual and (quick or time.monotonic() - began < BUDGET):
        results[f"usual in {precision}"] = [run_point(__file__, kind="usual", model=model, dtype=precision, **here)]
    return results


def main() -> None:
    arguments = parse_arguments(__doc__)
    count = BATCH if arguments.quick else ROWS[arguments.device]
    with (
        model_for(arguments.device, quick=arguments.quick) as model,
        tempfile.TemporaryDirectory(prefix="fedlora-generation-") as folder,
    ):
        run_point(__file__, kind="make", folder=folder, model=model, data=arguments.data, count=count)
        results = compare(folder, model, arguments.device, quick=arguments.quick)
    sides, ratios = {}, {}
    for name, found in results.items():
        sides[name] = side([one["seconds"] for one in found], new_tokens=found[0]["tokens"], base=found[0]["dtype"])
        sides[name]["new_tokens_per_second"] = found[0]["tokens"] / sides[name]["seconds"]
    for name in results.keys() - {"fedlora"}:
        ratios[f"seconds, {name} over fedlora"] = sides[name]["seconds"] / sides["fedlora"]["seconds"]
        ratios[f"new tokens/s, fedlora over {name}"] = (
            sides["fedlora"]["new_tokens_per_second"] / sides[name]["new_tokens_per_second"]
        )
    notes = [
        f"{count} {'Dolly' if arguments.data else 'short'} rows for each of {results['fedlora'][0]['adapters']} "
        f"adapters, at most {8 if arguments.quick else NEW_TOKENS} new tokens, greedy, loads included",
        "new tokens differ between the sides where the base's type does",
    ]
    if results["fedlora"][0]["dtype"] != results["usual"][0]["dtype"] and len(results) == 2:
        notes.append(f"the usual way at equal precision was left out: the rest took over {BUDGET:.0f} s")
    emit("generation", sides, dict(sorted(ratios.items(), reverse=True)), notes)


if __name__ == "__main__":
    measures = {"make": make_run, "base": answer_base, "fedlora": time_fedlora, "usual": time_usual}
    if not answer_points(measures):
        main()
