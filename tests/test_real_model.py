"""The programs and scripts on a real model and real rows: every mode's files, and PEFT's reading of the adapters.

Takes minutes and needs what the repository does not hold: the Dolly file, given by FEDLORA_DOLLY, and the package of
the embedded model. Without them every test is skipped and says how to get them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from judge_server import prefers_a, serve

from fedlora.errors import UsageError
from fedlora.paths import OutputName, RunPaths

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

MODEL = "smollm2-135m"
MODES = ("homo", "seq", "none", "pooled")
CLIENTS = range(8)
CATEGORIES = [
    *("brainstorming", "classification", "closed_qa", "creative_writing"),
    *("general_qa", "information_extraction", "open_qa", "summarization"),
]
ROWS_PER_CLIENT, TEST_ROWS_PER_CATEGORY = 16, 2
CUTOFF = 256
ROUNDS = ("1", "2")

CLIENT_FILES = {"adapter_model.bin", "adapter_config.json", "update.json"}
GLOBAL_FILES = {"global_adapter_model.bin", "adapter_model.safetensors", "adapter_config.json", "manifest.json"}
EVERYONE = ["base", *(f"client_{client}" for client in CLIENTS)]
ANSWERED = {"homo": ["base", "client_3", "global"], "seq": ["global"], "none": EVERYONE, "pooled": ["global"]}


@pytest.fixture(scope="module")
def dolly() -> Path:
    given = os.environ.get("FEDLORA_DOLLY")
    path = Path(given) if given else ROOT.parent / "shared" / "data" / "dolly-15k.jsonl"
    if not path.is_file():
        pytest.skip(
            f"{path}: no such file; set FEDLORA_DOLLY to the databricks-dolly-15k file "
            "(`fedlora data dolly --output_file FILE` fetches it where there is a network)"
        )
    return path.resolve()


@pytest.fixture(scope="module")
def model_folder() -> Path:
    from fedlora.llm import embedded_model

    try:
        return embedded_model.folder()
    except UsageError as error:
        pytest.skip(f"{error}: {error.hint}")


def run(command: list[str], **variables: str) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "api_key": "sk-not-a-key", **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def run_script(name: str, **variables: str) -> None:
    run(["bash", f"script/{name}.sh"], **variables)


def run_program(program: str | list[str], **flags: str) -> None:
    command = [f"{program}.py"] if isinstance(program, str) else ["-m", "fedlora", *program]
    run([sys.executable, *command, *(f"--{name}={value}" for name, value in flags.items())])


@pytest.fixture(scope="module")
def world(dolly: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything the programs leave in one folder: half of the modes by the scripts, half by the programs."""
    world = tmp_path_factory.mktemp("world")
    run_program(
        "client_data_allocation",
        input_file=str(dolly),
        output_root=f"{world}/data",
        train_per_cat=str(ROWS_PER_CLIENT),
        test_per_cat=str(TEST_ROWS_PER_CATEGORY),
    )
    for mode in MODES:
        train(world, mode)
    answer_and_score(world)
    names = {"model_dir": "models", "prediction_dir": "predictions", "rouge_dir": "rouge", "llm_dir": "llm"}
    places = {name: f"{world}/{folder}" for name, folder in names.items()}
    run_program(
        ["report"], exp_names=",".join(MODES), communication_rounds="2", report_dir=f"{world}/reports", **places
    )
    return world


def rows_to_answer(world: Path) -> Path:
    return world / f"data/dataset1/dolly_test_{TEST_ROWS_PER_CATEGORY}.jsonl"


def train(world: Path, mode: str) -> None:
    start = run_script if mode in ("homo", "seq") else run_program
    start(
        "train",
        exp_name=mode,
        federation_mode=mode,
        base_model=MODEL,
        data_path=f"{world}/data/dataset1",
        model_dir=f"{world}/models",
        client_selection_frac="1",
        num_communication_rounds="2",
        num_clients="8",
        local_batch_size="8",
        local_num_epochs="1",
        local_learning_rate="1e-3",
        lora_r="8",
        lora_target_modules="q_proj,v_proj",
        prompt_template="alpaca",
        cutoff_len=str(CUTOFF),
        val_data_path=str(rows_to_answer(world)),
        device="cpu",
    )


def answer_and_score(world: Path) -> None:
    """Answers and ROUGE of everyone in ANSWERED, and the judge once."""
    shared = {"communication_rounds": "2", "prediction_dir": f"{world}/predictions"}
    target = str(rows_to_answer(world))
    generation = {**shared, "model_dir": f"{world}/models", "test_file_path": target}
    generation |= {"base_model": MODEL, "max_new_tokens": "10", "device": "cpu"}
    rouge = {**shared, "target_file": target, "evaluation_dir": f"{world}/rouge"}
    client = {"is_global_model": "false", "client_id": "3"}
    base = {"is_base_model": "true"}
    for chosen in ({}, client, base):
        run_script("generate", exp_name="homo", **generation, **chosen)
        run_script("evaluate_rouge", exp_name="homo", **rouge, **chosen)
    for mode in ("seq", "pooled"):
        run_program("generate", exp_name=mode, **generation)
        run_program("evaluate_rouge", exp_name=mode, **rouge)
    run_program(["generate", "--all"], exp_name="none", **generation)
    run_script("evaluate_rouge", exp_name="none", is_global_model="false", **rouge)
    run_program("evaluate_rouge", exp_name="none", **rouge, **base)
    with serve(prefers_a) as server:
        judge = {"base_url": server.url, "evaluation_dir": f"{world}/llm", "target_file": target}
        run_script("evaluate_llm", exp_name="homo", proposed_file="homo/2/global_output.jsonl", **shared, **judge)


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts(rows: list[dict]) -> list[tuple[str, str]]:
    return [(row["instruction"], row["input"]) for row in rows]


def test_allocation_leaves_one_client_per_category_and_shares_no_prompt(world):
    files = {f"dataset1/8/local_training_{client}.json" for client in CLIENTS}
    assert tree(world / "data") == files | {"dataset1/8/manifest.json", "dataset1/dolly_test_2.jsonl"}
    test_rows = read_lines(rows_to_answer(world))
    assert [row["category"] for row in test_rows] == [name for name in CATEGORIES for _ in range(2)]
    training_prompts = []
    for client, category in enumerate(CATEGORIES):
        rows = json.loads((world / f"data/dataset1/8/local_training_{client}.json").read_text(encoding="utf-8"))
        assert [row["category"] for row in rows] == [category] * ROWS_PER_CLIENT
        training_prompts += prompts(rows)
    assert len(set(training_prompts)) == len(training_prompts) == 8 * ROWS_PER_CLIENT
    assert not set(training_prompts) & set(prompts(test_rows))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_leaves_exactly_the_documented_files(world, mode):
    folders = ["pooled"] if mode == "pooled" else [f"client_{client}" for client in CLIENTS]
    expected = {"run.json", "metrics.jsonl", "steps.jsonl", ".lock"}
    for number in ROUNDS:
        expected |= {f"{number}/{name}" for name in ({"manifest.json"} if mode == "none" else GLOBAL_FILES)}
        expected |= {f"{number}/{folder}/{name}" for folder in folders for name in CLIENT_FILES}
    assert tree(world / "models" / mode) == expected


def test_every_mode_learns_on_the_same_number_of_tokens(world):
    totals, losses = set(), {}
    for mode in MODES:
        rows = [row for row in read_lines(world / "models" / mode / "metrics.jsonl") if row["kind"] == "round"]
        assert [row["round"] for row in rows] == [0, 1, 2]
        assert all(row["quarantined"] == [] for row in rows[1:])
        totals.add((sum(row["num_steps"] for row in rows[1:]), sum(row["num_tokens"] for row in rows[1:])))
        losses[mode] = [row["val_loss"] for row in rows]
    assert len(totals) == 1
    assert len({values[0] for values in losses.values()}) == 1
    for mode in ("homo", "seq", "pooled"):
        assert losses[mode][2] < losses[mode][0], losses


def test_answers_and_scores_lie_where_they_are_documented(world):
    answers = {f"{mode}/2/{name}_output" for mode, names in ANSWERED.items() for name in names}
    assert tree(world / "predictions") == {f"{name}{end}" for name in answers for end in (".jsonl", ".meta.json")}
    assert tree(world / "rouge") == {f"{name}_rouge.json" for name in answers}
    assert tree(world / "llm") == {"homo/2/base_results.json", "homo/2/base_verdicts.jsonl"}
    test_prompts = prompts(read_lines(rows_to_answer(world)))
    for name in answers:
        rows = read_lines(world / "predictions" / f"{name}.jsonl")
        assert prompts(rows) == test_prompts
        assert all(list(row) == ["instruction", "input", "answer", "category"] for row in rows)
        assert sum(bool(row["answer"].strip()) for row in rows) > len(rows) / 2, name
        scores = json.loads((world / "rouge" / f"{name}_rouge.json").read_text())
        assert scores.keys() == {*CATEGORIES, "overall", "fedlora"}
        assert 0 < scores["overall"]["avg_rougeL"] < 1


def test_both_runs_of_the_base_model_answer_alike(world):
    first, second = (world / f"predictions/{mode}/2/base_output.jsonl" for mode in ("homo", "none"))
    assert first.read_bytes() == second.read_bytes()


def test_the_report_shows_every_model_and_misses_nothing(world):
    assert tree(world / "reports") == {f"report/{name}" for name in ("report.md", "report.json")} | {
        f"report/{name}.png" for name in ("rounds", "clients")
    }
    report = json.loads((world / "reports/report/report.json").read_text())
    assert report["gaps"] == []
    subjects = [(row["mode"], row["subject"]) for row in report["rows"]]
    alone = [("none", "client")] * 8 + [("none", "mean")]
    assert subjects == [("base", "base"), *alone, ("seq", "global"), ("homo", "global"), ("pooled", "global")]
    assert all(row["rouge_l"] is not None and row["held_out_loss"] is not None for row in report["rows"])
    (judgement,) = report["judgements"]
    assert (judgement["tie"], judgement["num_samples"]) == (16, 16)


@pytest.fixture(scope="module")
def our_model(world):
    """The float32 base with our LoRA layers in it, and the ids of a few test prompts."""
    from fedlora.data.records import read_rows
    from fedlora.llm.base_model import load_base_model
    from fedlora.llm.lora import LoraModel
    from fedlora.llm.prompts import PromptEncoder
    from fedlora.runs.saved_adapters import adapter_spec

    base = load_base_model(MODEL, device="cpu", dtype="float32")
    encoder = PromptEncoder(base.tokenizer, "alpaca")
    rows = read_rows(rows_to_answer(world))[::5]
    ids = [encoder.question(row, cutoff=CUTOFF, context=None, max_new_tokens=10).ids for row in rows]
    spec = adapter_spec(RunPaths(world / "models", "homo"), 2, OutputName("global"))
    return LoraModel(base.model, spec), ids


@pytest.mark.parametrize(
    ("mode", "folder", "name"),
    [
        ("homo", "2", OutputName("global")),
        ("seq", "2", OutputName("global")),
        ("pooled", "2", OutputName("global")),
        ("homo", "2/client_3", OutputName("client", 3)),
        ("none", "2/client_3", OutputName("client", 3)),
    ],
    ids=["homo-global", "seq-global", "pooled-global", "homo-client", "none-client"],
)
def test_peft_loads_an_adapter_to_the_logits_of_our_own_loader(world, model_folder, our_model, mode, folder, name):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from fedlora.llm.adapter_files import load_adapter
    from fedlora.runs.saved_adapters import adapter_file, adapter_spec

    lora, prompt_ids = our_model
    paths = RunPaths(world / "models", mode)
    assert adapter_spec(paths, 2, name) == lora.spec
    state = load_adapter(adapter_file(paths, 2, name), lora.shapes())
    plain = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, str(paths.root / folder)).eval()
    for ids in prompt_ids:
        batch = torch.tensor([ids])
        with torch.no_grad():
            lora.set_adapter(state)
            ours, expected = lora.model(batch).logits, theirs(batch).logits
            lora.set_adapter(None)
            untrained = lora.model(batch).logits
        # logits reach 40, and two orders of float32 sums differ by 1e-4 there; the adapters change them by more than 1
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)
        assert (expected - untrained).abs().max() > 0.5


@pytest.mark.parametrize("mode", ["homo", "seq", "pooled"])
def test_both_files_of_a_global_adapter_hold_the_same_tensors(world, our_model, mode):
    import torch

    from fedlora.llm.adapter_files import load_adapter

    shapes = our_model[0].shapes()
    for number in ROUNDS:
        folder = world / "models" / mode / number
        first = load_adapter(folder / "adapter_model.safetensors", shapes)
        second = load_adapter(folder / "global_adapter_model.bin", shapes)
        assert all(torch.equal(first[key], second[key]) for key in shapes)
