"""Standard tasks: the scores of lm-eval with transformers and PEFT, on local rows, kept where they are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra `tasks` is not installed")

import datasets
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_run import WORDS, make_client_files

from fedlora import cli
from fedlora.config.tasks import TasksConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import DataError, UsageError
from fedlora.llm import base_model
from fedlora.stages import report, tasks, train

pytestmark = pytest.mark.filterwarnings("ignore")

HEAD = """
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl, train: shots.jsonl}}
test_split: test
fewshot_split: train
"""
CHOICE = f"""
task: colours{HEAD}
output_type: multiple_choice
doc_to_text: "Which one is {{{{word}}}}?"
doc_to_target: label
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = f"""
task: texts{HEAD}
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
ANSWERS = f"""
task: answers{HEAD}
output_type: generate_until
doc_to_text: !function functions.question
doc_to_target: word
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
num_fewshot: 0
"""
GROUP = """
group: both
task: [colours, answers]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


def write_rows(file: Path, count: int, first: int = 0) -> None:
    rows = []
    for number in range(first, first + count):
        word = WORDS[number % 8]
        choices = [word, WORDS[(number + 3) % 8], word[::-1]]
        text = f"{word} and {WORDS[(number + 1) % 8]} " * (1 + number % 3)
        rows.append({"word": word, "choices": choices, "label": number % 2, "text": text})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory) -> Path:
    """A trained run of two clients, and a folder of task files with rows beside them."""
    root = tmp_path_factory.mktemp("tasks")
    make_client_files(root / "data", [4, 4])
    options: dict[str, Any] = {"data_path": root / "data", "model_dir": root / "models", "base_model": str(tiny_model)}
    train.run(
        TrainConfig.of(
            exp_name="run",
            base_dtype="float32",
            client_selection_strategy="all",
            num_communication_rounds=1,
            num_clients=2,
            local_num_epochs=4,
            local_learning_rate=3e-2,
            prompt_template="chat",
            device="cpu",
            **options,
        )
    )
    folder = root / "own"
    folder.mkdir()
    write_rows(folder / "rows.jsonl", 12)
    write_rows(folder / "shots.jsonl", 5, first=20)
    (folder / "functions.py").write_text("def question(row):\n    return 'say ' + row['word']\n")
    by_place = ROLLING.replace("test: rows.jsonl", f'test: "{folder}/*ws.jsonl"')
    for name, text in {"colours": CHOICE, "texts": by_place, "answers": ANSWERS}.items():
        (folder / f"{name}.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        # the library keeps rows under the user's home
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        yield root


def measure(root: Path, names: str, **fields: Any) -> tasks.TaskResults:
    options = {"exp_name": "run", "model_dir": root / "models", "base_dtype": "float32", "device": "cpu", **fields}
    return tasks.run(TasksConfig.of(tasks=names, **{"evaluation_dir": root / "scores", **options}))


def values_of(results: tasks.TaskResults) -> dict[tuple[str, str, str], tuple[float, float | None]]:
    return {
        (one.subject.name, score.task, score.called): (score.value, score.stderr)
        for one in results.results
        for score in one.scores
    }


def with_transformers(root: Path, model: Path, adapter: Path | None, **how: Any) -> dict[str, dict[str, Any]]:
    """The scores of lm-eval's own model, by task and measure."""
    peft = {"peft": str(adapter)} if adapter else {}
    asked = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=2, **peft)
    specs = []
    for file in sorted((root / "own").glob("*.yaml")):
        if file.stem != "both":
            text = file.read_text().replace("test: rows.jsonl", f"test: {root / 'own' / 'rows.jsonl'}")
            place = root / f"theirs-{file.name}"
            place.write_text(text.replace("shots.jsonl", str(root / "own" / "shots.jsonl")))
            (root / "functions.py").write_text((root / "own" / "functions.py").read_text())
            specs.append(str(place))
    manager = TaskManager(include_defaults=False)
    how = {{"chat_template": "apply_chat_template"}.get(name, name): value for name, value in how.items()}
    return simple_evaluate(asked, tasks=specs, task_manager=manager, bootstrap_iters=1000, **how)["results"]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_fewshot": 2},
        {"limit": 5, "num_fewshot": 2, "chat_template": True, "system_instruction": "be brief"},
        {"limit": 5, "num_fewshot": 2, "chat_template": True, "fewshot_as_multiturn": False},
    ],
    ids=str,
)
def test_scores_and_errors_are_those_of_lm_eval_with_transformers_and_peft(place, tiny_model, how, monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    found = values_of(measure(place, str(place / "own"), of_subjects="base,global,0-1", overwrite=True, **how))
    run = place / "models" / "run" / "1"
    folders = {"base": None, "global": run, "client 0": run / "client_0", "client 1": run / "client_1"}
    for name, folder in folders.items():
        expected = with_transformers(place, tiny_model, folder, **how)
        for task, measured in expected.items():
            for key, value in measured.items():
                measure_name, comma, _ = key.partition(",")
                if comma and not measure_name.endswith("_stderr"):
                    value_found, error_found = found.pop((name, task, measure_name))
                    assert value_found == pytest.approx(value, rel=1e-4), (name, task, key)
                    error = measured[key.replace(",", "_stderr,")]
                    assert error_found == (None if error == "N/A" else pytest.approx(error, rel=1e-4))
    assert not found


def test_a_second_run_computes_nothing_that_is_there_and_says_so(place, monkeypatch, capsys):
    first = measure(place, f"{place}/own/colours.yaml", of_subjects="base,global", evaluation_dir=place / "again")
    assert [one.is_new for one in first.results] == [True, True]
    rows = first.results[1].file.with_suffix(".jsonl").read_text().splitlines()
    assert len(rows) == 12
    assert {"doc_id", "filtered_resps", "acc", "task"} <= json.loads(rows[0]).keys()
    capsys.readouterr()
    load = base_model.load_base_model
    monkeypatch.setattr("fedlora.llm.resident_base.load_base_model", None)
    again = measure(place, f"{place}/own/colours.yaml", of_subjects="base,global", evaluation_dir=place / "again")
    assert values_of(again) == values_of(first)
    assert "2 results with these settings are there, and kept" in capsys.readouterr().err
    monkeypatch.setattr("fedlora.llm.resident_base.load_base_model", load)
    more = measure(place, f"{place}/own/colours.yaml", of_subjects="base,1,global", evaluation_dir=place / "again")
    assert [one.is_new for one in more.results] == [False, True, False]
    with pytest.raises(UsageError, match=r"measured with other settings \(different: num_fewshot"):
        measure(place, f"{place}/own/colours.yaml", evaluation_dir=place / "again", num_fewshot=1)
    write_rows(place / "own" / "rows.jsonl", 13)
    with pytest.raises(UsageError, match=r"\(different: task_sha256\)"):
        measure(place, f"{place}/own/colours.yaml", evaluation_dir=place / "again")
    write_rows(place / "own" / "rows.jsonl", 12)


def test_a_base_needs_no_run(place, tiny_model):
    file = f"{place}/own/colours.yaml"
    options = {"exp_name": "nothing", "of_subjects": "base", "evaluation_dir": place / "bases"}
    found = measure(place, file, base_model=str(tiny_model), **options)
    assert found.results[0].file == place / "bases" / "nothing" / "20" / "base" / "colours.json"
    assert found.next_command == ""
    beside = measure(place, file, of_subjects="base", evaluation_dir=place / "bases")
    assert [one.value for one in beside.results[0].scores] == [one.value for one in found.results[0].scores]
    with pytest.raises(UsageError, match="no such run, so it is not known which base is meant"):
        measure(place, file, **options)


def test_a_group_has_its_own_score_and_those_of_its_tasks(place):
    (place / "own" / "both.yaml").write_text(GROUP)
    try:
        found = measure(place, str(place / "own"), of_subjects="base", evaluation_dir=place / "groups")
        assert [one.task for one in found.results] == ["both", "texts"]
        scores = {(one.task, one.measure): one for one in found.results[0].scores}
        assert scores["both", "acc"].is_group
        assert scores["both", "acc"].value == scores["colours", "acc"].value
        assert ("answers", "exact_match") in scores
    finally:
        (place / "own" / "both.yaml").unlink()


def test_the_report_shows_what_tasks_measured_with_its_errors(place):
    where = place / "reported"
    measured = measure(place, f"{place}/own/colours.yaml", of_subjects="base,global,1", evaluation_dir=where)
    options = {"exp_names": ("run",), "model_dir": place / "models", "tasks_dir": where}
    folders = {"prediction_dir": place, "rouge_dir": place, "llm_dir": place, "report_dir": place / "report"}
    made = report.run(report.ReportConfig.of(**options, **folders))
    recorded = json.loads(made.file.with_suffix(".json").read_text())["tasks"]
    found = {(one["of"], one["measure"]): (one["value"], one["stderr"]) for one in recorded if one["task"] == "colours"}
    assert found == {(who, name): value for (who, task, name), value in values_of(measured).items()}
    page = made.file.read_text()
    assert "## Standard tasks" in page
    assert page.count("| colours |") == 6


def test_the_command_prints_a_table_and_json(place, capsys):
    arguments = ["tasks", "run", "--tasks", f"{place}/own/colours.yaml", "--of", "global", "--device", "cpu"]
    where = ["--model_dir", str(place / "models"), "--evaluation_dir", str(place / "printed"), "--limit", "3"]
    assert cli.main([*arguments, *where, "--base_dtype", "float32"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0].split("  ")[0] == "task"
    assert "tqdm" not in shown.err
    assert "it/s" not in shown.err
    assert cli.main([*arguments, *where, "--base_dtype", "float32", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    score = made["results"][0]["scores"][0]
    low, high = score["interval"]
    assert (low + high) / 2 == pytest.approx(score["value"])
    assert high - low == pytest.approx(2 * 1.959964 * score["stderr"])
    assert score["num_rows"] == 3


@pytest.mark.parametrize(
    ("names", "said", "hint"),
    [
        # the library's own list takes ten seconds to read
        pytest.param("arc_eazy", "'arc_eazy' is not a task", "did you mean arc_easy?", marks=pytest.mark.thorough),
        ("nowhere.yaml", "nowhere.yaml: no such task file", "a folder of them"),
        ("{own}/remote.yaml", "its rows \\(allenai/ai2_arc\\) are neither here nor to be had from the hub", "HF_HOME"),
        ("{own}/broken.yaml", "broken.yaml: not a task file", ""),
        ("{own}/template.yaml", "template.yaml: names no task", ""),
        ("{own}/lost.yaml", "lost.yaml", "data_files"),
        ("", "tasks: name at least one", ""),
    ],
)
def test_a_task_that_cannot_be_had_is_one_message(place, names, said, hint):
    own = place / "faulty"
    own.mkdir(exist_ok=True)
    (own / "broken.yaml").write_text("task: [a")
    (own / "remote.yaml").write_text(CHOICE.replace("path: json", "path: allenai/ai2_arc").split("dataset_kwargs")[0])
    (own / "template.yaml").write_text("dataset_path: json\n")
    (own / "lost.yaml").write_text(CHOICE.replace("rows.jsonl", "lost.jsonl"))
    with pytest.raises(UsageError, match=said) as caught:
        measure(place, names.format(own=own), of_subjects="base")
    assert hint in caught.value.hint


def test_a_task_whose_own_code_fails_is_named(place):
    own = place / "failing"
    own.mkdir()
    write_rows(own / "rows.jsonl", 2)
    write_rows(own / "shots.jsonl", 2)
    (own / "functions.py").write_text("def question(row):\n    return row['nothing']\n")
    (own / "answers.yaml").write_text(ANSWERS)
    with pytest.raises(DataError, match=r"answers\.yaml: KeyError: 'nothing'"):
        measure(place, str(own / "answers.yaml"), of_subjects="base")


@pytest.mark.slow
def test_smollm2_scores_on_the_example_s_tasks_as_lm_eval_scores_it(tmp_path, monkeypatch):
    from fedlora.llm import embedded_model

    try:
        model = embedded_model.folder()
    except UsageError as error:
        pytest.skip(f"{error}: {error.hint}")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    make_client_files(tmp_path / "data", [4, 4])
    options = {"data_path": tmp_path / "data", "model_dir": tmp_path / "models", "base_model": "smollm2-135m"}
    options |= {"exp_name": "run", "base_dtype": "float32", "num_clients": 2, "client_selection_strategy": "all"}
    train.run(TrainConfig.of(num_communication_rounds=1, local_learning_rate=3e-3, prompt_template="chat", **options))
    examples = Path(__file__).parents[2] / "examples" / "flowertune_tasks"
    own = tmp_path / "own"
    own.mkdir()
    for file in (*examples.glob("*.yaml"), examples / "rows.jsonl"):
        (own / file.name).write_text(file.read_text())
    (own / "functions.py").write_text("")
    write_rows(own / "shots.jsonl", 1)
    how = {"limit": 6}
    found = values_of(measure(tmp_path, str(own), of_subjects="base,global", chat_template=True, **how))
    for name, folder in {"base": None, "global": tmp_path / "models" / "run" / "1"}.items():
        for task, measured in with_transformers(tmp_path, model, folder, chat_template=True, **how).items():
            for key in ("acc,none", "acc_norm,none", "exact_match,none"):
                if key in measured:
                    value, error = found.pop((name, task, key.split(",")[0]))
                    assert value == pytest.approx(measured[key])
                    assert error == pytest.approx(measured[key.replace(",", "_stderr,")])
    assert not found
