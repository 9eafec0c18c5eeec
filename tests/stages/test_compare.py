"""The compare stage on the tiny model: the same budget for all, paired seeds, resumed to the same result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from changed_bases import add_one, change_weights
from installed_method import EXAMPLE
from lost_signals import lose_signal

from fedlora.cli import main
from fedlora.comparing.compared_run import _recording
from fedlora.comparing.scoring import Scorer
from fedlora.config.compare import CompareConfig
from fedlora.config.contenders import Contender
from fedlora.errors import TrainingError, UsageError
from fedlora.llm.base_model import load_base_model
from fedlora.llm.resident_base import ResidentBase
from fedlora.methods.table import find_method
from fedlora.stages import compare, train
from fedlora.stopping import stop_on_signals

CLOCK = ("seconds", "wall_seconds")


def options(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Two methods beside the fixed rows, two seeds, two learning rates, four clients with two rows each."""
    return {
        "name": "tiny",
        "output_dir": folder,
        "modes": ["homo", "seq"],
        "seeds": [1, 2],
        "learning_rates": [1e-3, 1e-2],
        "budget_steps": 8,
        "validation_per_cat": 1,
        "test_per_cat": 1,
        "data": {"train_per_cat": 1, "num_clients": 4},
        "train": {
            "base_model": str(model),
            "base_dtype": "float32",
            "prompt_template": "chat",
            "client_selection_frac": 1.0,
            "local_batch_size": 2,
            "local_num_epochs": 1,
            "lora_r": 2,
            "tokens_per_pass": 512,
            "gradient_checkpointing": "off",
            "device": "cpu",
        },
        **changes,
    }


def without_clock(value: Any) -> Any:
    """The result without what the clock said."""
    if isinstance(value, dict):
        return {key: without_clock(each) for key, each in value.items() if key not in CLOCK}
    return [without_clock(each) for each in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("comparisons")
    return folder / "tiny", compare.run(CompareConfig.of(**options(tiny_model, folder))).record


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures, where they are not what is looked at."""
    monkeypatch.setattr(compare, "draw_comparison", lambda result: {})


def runs_of(root: Path, mode: str) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((root / "scores").glob(f"{mode}-*.json"))]


def test_a_comparison_has_base_pooled_and_none_beside_what_was_asked_for(finished):
    _, result = finished
    assert [row["label"] for row in result["rows"]] == ["base", "homo", "seq", "pooled", "none"]
    assert all(row["metrics"]["loss_own"]["n"] == 2 for row in result["rows"])


def test_a_comparison_leaves_a_page_beside_its_markdown(finished):
    root, result = finished
    page = (root / "report.html").read_text(encoding="utf-8")
    assert "Of 2 federated methods" in page
    assert f"{result['rows'][1]['metrics']['loss_own']['mean']:.3f}" in page
    assert 'id="answers"' not in page


def test_every_method_spends_the_same_steps_and_no_more_than_the_budget(finished):
    _, result = finished
    spent = [row["metrics"]["num_steps"]["values"] for row in result["rows"] if row["method"] != "base"]
    assert spent == [{"1": 8, "2": 8}] * 4


def test_only_what_travels_costs_bytes(finished):
    _, result = finished
    up = {row["label"]: row["metrics"]["bytes_up"]["mean"] for row in result["rows"] if row["method"] != "base"}
    assert up["homo"] == up["seq"] > 0
    assert up["pooled"] == up["none"] == 0


def test_methods_are_paired_under_one_seed_they_share_adapter_cohorts_and_data(finished):
    root, _ = finished
    homo, seq = (next(r for r in runs_of(root, mode) if r["seed"] == 2) for mode in ("homo", "seq"))
    manifests = [json.loads((root / "runs" / one["run"] / "1" / "manifest.json").read_text()) for one in (homo, seq)]
    assert manifests[0]["cohort"] == manifests[1]["cohort"]
    clients = [json.loads((root / "runs" / one["run"] / "run.json").read_text())["clients"] for one in (homo, seq)]
    assert clients[0] == clients[1]
    # the first client of seq starts from the untrained adapter, as every client of homo does
    begun = [
        json.loads((root / "runs" / one["run"] / "1" / "client_0" / "update.json").read_text())["started_from"]
        for one in (homo, seq)
    ]
    assert begun[0] == begun[1]


def test_the_learning_rate_is_chosen_on_validation_rows_which_are_no_test_rows(finished):
    root, result = finished
    for sweep in result["sweeps"]:
        best = min(sweep["tried"], key=lambda entry: entry["loss"])
        assert sweep["chosen"] == best["learning_rate"]
    parts = {
        name: {line for file in root.glob(f"data/*-s1/{name}.jsonl") for line in file.read_text().splitlines()}
        for name in ("validation", "test")
    }
    assert len(parts["validation"]) == len(parts["test"]) == 8
    assert not parts["validation"] & parts["test"]
    trained = "".join(file.read_text() for file in root.glob("data/*-s1/4/local_training_*.json"))
    held_out = [json.loads(line) for line in parts["validation"] | parts["test"]]
    assert not [row for row in held_out if row["input"] and row["input"] in trained]


def test_a_learning_rate_that_was_not_chosen_never_meets_the_test_rows(finished):
    root, result = finished
    chosen = next(sweep["chosen"] for sweep in result["sweeps"] if sweep["method"] == "homo")
    for record in runs_of(root, "homo"):
        assert (record["test"] is not None) == (record["learning_rate"] == chosen)


def test_seq_is_measured_behind_every_hop(finished):
    _, result = finished
    (curve,) = result["curves"]
    points = curve["seeds"]["1"]
    assert curve["method"] == "seq"
    assert [(point["round"], point["client"]) for point in points] == [(r, c) for r in (1, 2) for c in range(4)]
    assert [point["steps"] for point in points] == list(range(1, 9))
    assert all(value >= 0 for value in curve["forgotten"].values())


def test_the_clients_table_compares_each_client_with_itself_alone(finished):
    _, result = finished
    (table,) = result["clients"]
    assert table["same_clients"]
    assert set(table["methods"]) == {"base", "homo", "seq", "pooled", "none"}
    assert all(value == 0 for value in table["methods"]["none"]["gain"].values())
    homo, alone = table["methods"]["homo"], table["methods"]["none"]
    assert homo["gain"]["0"] == pytest.approx(alone["own"]["0"] - homo["own"]["0"])


def test_the_result_is_written_as_markdown_json_latex_and_pictures(finished):
    root, result = finished
    assert json.loads((root / "comparison.json").read_text()) == json.loads(json.dumps(result))
    text = (root / "comparison.md").read_text()
    assert "| homo |" in text
    assert "Who gains from joining" in text
    assert "What is forgotten on the way" in text
    for name in ("losses.png", "bytes.png", "clients.png", "forgetting.png"):
        assert (root / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text
    latex = (root / "comparison.tex").read_text()
    assert latex.count("\\\\\n") == 1 + len(result["rows"])
    assert "\\toprule" in latex


def test_a_second_call_does_nothing_again_and_writes_the_same_bytes(finished, tiny_model, monkeypatch, capsys):
    root, _ = finished
    before = {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
    monkeypatch.setattr(train, "run", lambda *args, **options: pytest.fail("a finished run is trained again"))
    compare.run(CompareConfig.of(**options(tiny_model, root.parent)))
    assert "12 runs of at most 8 steps each, 12 of them done" in capsys.readouterr().err
    after = {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
    assert {name: after[name] for name in before if not name.startswith(".")} == {
        name: content for name, content in before.items() if not name.startswith(".")
    }


@pytest.mark.thorough
@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_comparison_goes_on_to_the_same_result(finished, tiny_model, tmp_path, monkeypatch):
    _, unbroken = finished
    config = CompareConfig.of(**options(tiny_model, tmp_path))
    whole, begun = train.run, []

    def interrupted(run: Any, **loading: Any) -> Any:
        begun.append(run.exp_name)
        if len(begun) == 5:
            # half of a run, then the kill
            whole(run.model_copy(update={"num_communication_rounds": 1}), **loading)
            raise KeyboardInterrupt
        return whole(run, **loading)

    monkeypatch.setattr(train, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare.run(config)
    monkeypatch.setattr(train, "run", lambda run, **loading: begun.append(run.exp_name) or whole(run, **loading))
    result = compare.run(config).record
    assert begun.count(begun[4]) == 2
    assert begun.count(begun[0]) == 1
    assert without_clock(result) == without_clock(unbroken)


@pytest.mark.usefixtures("handlers")
def test_a_signal_that_a_run_loses_is_no_failure_of_the_run():
    record: dict[str, Any] = {}
    with pytest.raises(SystemExit), stop_on_signals(), _recording(record):
        lose_signal(ValueError("a library's own way to say so"))
    assert not record


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_fails_is_told_of_and_ends_no_other(tiny_model, tmp_path, monkeypatch):
    whole = train.run

    def failing(run: Any, **loading: Any) -> Any:
        if run.federation_mode == "seq" and run.seed == 2:
            raise TrainingError("it went wrong")
        return whole(run, **loading)

    monkeypatch.setattr(train, "run", failing)
    given = options(tiny_model, tmp_path, learning_rates=[1e-3], curves=[])
    result = compare.run(CompareConfig.of(**given)).record
    rows = {row["label"]: row for row in result["rows"]}
    assert rows["seq"]["metrics"]["loss_own"]["n"] == 1
    assert rows["homo"]["metrics"]["loss_own"]["n"] == rows["none"]["metrics"]["loss_own"]["n"] == 2
    assert "seq, seed 2 failed: it went wrong" in result["remarks"]
    # remembered, until it is to be tried again
    monkeypatch.setattr(train, "run", whole)
    again = compare.run(CompareConfig.of(**given)).record
    assert {row["label"]: row for row in again["rows"]}["seq"]["metrics"]["loss_own"]["n"] == 1
    tried = compare.run(CompareConfig.of(**given, retry=True)).record
    assert {row["label"]: row for row in tried["rows"]}["seq"]["metrics"]["loss_own"]["n"] == 2
    assert not tried["remarks"]


@pytest.mark.usefixtures("undrawn")
def test_a_loss_that_is_no_number_and_a_fault_nobody_foresaw_are_failures_of_their_run(
    tiny_model, tmp_path, monkeypatch
):
    from fedlora.comparing.scoring import Scorer

    score = Scorer.score_run

    def scored(self: Any, paths: Any, rows: Path) -> Any:
        if "homo" in paths.exp_name:
            raise RuntimeError("nobody foresaw this")
        found = score(self, paths, rows)
        if "seq" in paths.exp_name and rows.stem == "test":
            found["global"]["sums"] = float("nan")
        return found

    monkeypatch.setattr(Scorer, "score_run", scored)
    given = options(tiny_model, tmp_path, learning_rates=[1e-3], seeds=[1], curves=[])
    result = compare.run(CompareConfig.of(**given)).record
    assert {row["label"]: bool(row["metrics"]) for row in result["rows"]} == {
        "base": True, "homo": False, "seq": False, "pooled": True, "none": True
    }  # fmt: skip
    assert "homo, seed 1 failed: RuntimeError: nobody foresaw this" in result["remarks"]
    assert "seq, seed 1 failed: the loss on the test rows is not a number" in result["remarks"]


@pytest.mark.usefixtures("undrawn")
def test_a_method_that_takes_more_than_its_rows_say_gets_fewer_rounds(tiny_model, tmp_path, monkeypatch):
    from fedlora.comparing import compared_run

    measured = compared_run.measure_spending

    def doubled(paths: Any) -> dict[str, Any]:
        spent = measured(paths)
        return {**spent, "num_steps": spent["num_steps"] * (2 if "seq" in paths.exp_name else 1)}

    monkeypatch.setattr(compared_run, "measure_spending", doubled)
    given = options(tiny_model, tmp_path, learning_rates=[1e-3], seeds=[1], curves=[])
    result = compare.run(CompareConfig.of(**given)).record
    rows = {row["label"]: row for row in result["rows"]}
    assert rows["homo"]["rounds"] == [2]
    assert rows["seq"]["rounds"] == [1]
    assert rows["seq"]["metrics"]["num_steps"]["mean"] == 8


def test_a_plan_says_what_would_be_done_and_writes_nothing(tiny_model, tmp_path):
    plan = compare.run(CompareConfig.of(**options(tiny_model, tmp_path / "out"), plan=True))
    assert plan.record["runs"] == 4 * (2 + 1)
    assert not (tmp_path / "out").exists()
    assert "12 runs of at most 8 steps each, 0 of them done" in plan.text()


@pytest.mark.usefixtures("undrawn")
def test_settings_are_the_product_of_the_axes_and_refusals_are_rows_without_numbers(tiny_model, tmp_path):
    axes = {"trimmed_share": [0.1, 0.2], "skew": [{"partition": "shards", "shards_per_client": 1}]}
    given = options(tiny_model, tmp_path, learning_rates=[1e-3], seeds=[1], modes=["krum"], axes=axes, curves=[])
    result = compare.run(CompareConfig.of(**given)).record
    assert result["settings"] == [
        "trimmed_share 0.1, partition shards, shards_per_client 1",
        "trimmed_share 0.2, partition shards, shards_per_client 1",
    ]
    refused = [row for row in result["rows"] if row["label"] == "krum"]
    assert len(refused) == 2
    assert not any(row["metrics"] for row in refused)
    assert any(text.startswith("krum (trimmed_share 0.1, partition shards") for text in result["remarks"])
    # the fixed rows combine nothing: how updates are combined cannot matter to them, and they are run once
    assert len(list((tmp_path / "tiny" / "runs").iterdir())) == 2


@pytest.mark.usefixtures("undrawn")
def test_answers_are_scored_where_asked_for_and_runs_go_when_they_need_not_stay(tiny_model, tmp_path):
    given = options(
        tiny_model, tmp_path, learning_rates=[1e-3], seeds=[1], modes=["homo"], answers_per_cat=1, max_new_tokens=2
    )
    result = compare.run(CompareConfig.of(**given, keep_runs=False)).record
    for row in result["rows"]:
        assert 0 <= row["metrics"]["exact_own"]["mean"] <= 1
        assert 0 <= row["metrics"]["rouge_l_own"]["mean"] <= 1
    assert not list((tmp_path / "tiny" / "runs").iterdir())
    page = (tmp_path / "tiny/report.html").read_text(encoding="utf-8")
    found = json.loads(page.split('id="texts">')[1].split("</script>")[0])
    labels = [model["label"] for model in found["models"]]
    assert labels == ["base", "homo", "pooled", *(f"none client {number}" for number in range(4))]
    assert all(row["reference"] for row in found["rows"])
    # what is asked for only afterwards needs the run, which comes back
    given |= {"answers_per_cat": 0, "curves": ["homo"]}
    (curve,) = compare.run(CompareConfig.of(**given, keep_runs=False)).record["curves"]
    assert [point["round"] for point in curve["seeds"]["1"]] == [1, 2]


@pytest.mark.usefixtures("undrawn")
def test_noise_reaches_the_methods_and_not_the_fixed_rows_and_is_remarked(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_SECRETS", str(tmp_path / "secrets"))
    axes = {"dp_noise_multiplier": [0.5, 1.0]}
    given = options(tiny_model, tmp_path, learning_rates=[1e-3], seeds=[1], modes=["homo"], axes=axes, curves=[])
    given["train"] |= {"dp_clip": 1.0}
    result = compare.run(CompareConfig.of(**given)).record
    spent = {(row["setting"], row["label"]): row["metrics"].get("epsilon") for row in result["rows"]}
    assert spent["dp_noise_multiplier 0.5", "homo"]["mean"] > spent["dp_noise_multiplier 1.0", "homo"]["mean"] > 0
    assert spent["dp_noise_multiplier 0.5", "none"] is spent["dp_noise_multiplier 0.5", "pooled"] is None
    assert len(list((tmp_path / "tiny" / "runs").iterdir())) == 4
    assert any(text.startswith("private runs draw cohorts and noise from a secret") for text in result["remarks"])


@pytest.mark.usefixtures("undrawn")
def test_personal_methods_have_two_rows_and_bases_with_additions_are_scored(tiny_model, tmp_path):
    given = options(tiny_model, tmp_path, learning_rates=[1e-2], seeds=[1], curves=[])
    given["modes"] = ["ditto", "feddpa", "finetune", "fedsa", "fedex", "flora"]
    rows = {row["label"]: row["metrics"] for row in compare.run(CompareConfig.of(**given)).record["rows"]}
    both = {f"{mode} ({kind})" for mode in ("ditto", "feddpa", "finetune") for kind in ("global", "personal")}
    assert rows.keys() >= both | {"fedsa", "fedex", "flora"}
    assert all(metrics["num_steps"]["mean"] <= 8 for metrics in rows.values() if "num_steps" in metrics)
    assert rows["ditto (global)"]["loss_own"] != rows["ditto (personal)"]["loss_own"]


def test_a_stack_of_two_adapters_scores_what_it_scores_in_layers_of_twice_the_rank(tiny_model, make_clients, tmp_path):
    from tiny_run import options_of

    data = make_clients([2, 3])
    given = {**options_of("feddpa", tiny_model, data, tmp_path), "num_clients": 2, "num_communication_rounds": 1}
    config = train.TrainConfig.of(**{**given, "client_selection_frac": 1.0})
    paths = train.run(config).paths
    rows_file = data / "2" / "local_training_0.json"
    file = paths.round_folder(1) / "client_0" / "adapter_model.bin"
    wide = config.model_copy(update={"lora_r": 2 * config.lora_r, "lora_alpha": 2 * config.lora_alpha})
    losses = []
    for scored in (config, wide):
        base = load_base_model(str(tiny_model), device="cpu", dtype="float32")
        losses.append(Scorer(base, scored).score_file(file, rows_file))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    base = load_base_model(str(tiny_model), device="cpu", dtype="float32")
    assert Scorer(base, config).losses(None, rows_file) != pytest.approx(losses[0], rel=1e-5)


def test_one_base_serves_several_runs_and_changes_no_byte(tiny_model, make_clients, tmp_path):
    from tiny_run import file_hashes, options_of

    data = make_clients([2, 3, 2, 2])
    base = ResidentBase()
    for number, load in enumerate((None, base.load, base.load)):
        given = options_of("homo", tiny_model, data, tmp_path / str(number))
        train.run(train.TrainConfig.of(**{**given, "num_communication_rounds": 1}), load=load)
    first, second, third = (file_hashes(tmp_path / str(number) / "run") for number in range(3))
    assert first == second == third


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budget: 3", "unknown field 'budget'"),
        ("modes: [homo]", "give budget_steps or budget_tokens, and not both"),
        ("{budget_steps: 1, budget_tokens: 1}", "give budget_steps or budget_tokens, and not both"),
        ("{budget_steps: 1, modes: [homoo]}", "'homoo' is not a method"),
        ("{budget_steps: 1, modes: [homo, homo]}", "none twice"),
        ("{budget_steps: 1, modes: [{mode: homo, name: ../x}]}", "cannot be a folder name"),
        ("{budget_steps: 1, modes: [{mode: homo, lora: 3}]}", "unknown field 'lora' of homo"),
        ("{budget_steps: 1, train: {lora: 4}}", "unknown field 'lora' in train"),
        ("{budget_steps: 1, train: {seed: 4}}", "seed in train: compare decides it"),
        ("{budget_steps: 1, train: {trust_remote_code: true}}", "only the flag can set it"),
        ("{budget_steps: 1, data: {test_per_cat: 4}}", "test_per_cat in data: compare decides it"),
        ("{budget_steps: 1, axes: {lora_r: 4}}", "lora_r: a list of values"),
        ("{budget_steps: 1, axes: {skew: [1]}}", "unknown field 'skew' in axis skew"),
        ("{budget_steps: 1, axes: {lora_r: [4, 4]}}", "the same setting comes twice"),
        ("{budget_steps: 1, seeds: [1, 1]}", "different numbers"),
        ("{budget_steps: 1, learning_rates: [0]}", "learning rates are positive numbers"),
        ("{budget_steps: 1, learning_rates: [fast]}", "a list of numbers"),
        ("{budget_steps: 1, sweep_seeds: 4}", "sweep_seeds=4, but there are 3 seeds"),
        ("{budget_steps: 1, answers_per_cat: 40}", "is more than test_per_cat"),
        ("{budget_steps: 1, name: a/b}", "cannot be a folder name"),
    ],
)
def test_a_wrong_experiment_is_refused_with_the_field_that_is_wrong(text, message, tmp_path, capsys):
    file = tmp_path / "experiment.yaml"
    file.write_text(text)
    assert main(["compare", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_an_experiment_none_of_whose_runs_can_be_is_an_error(tiny_model, tmp_path):
    given = options(tiny_model, tmp_path, budget_steps=1)
    with pytest.raises(Exception, match="this experiment has no run: a budget of 1 steps is less than one round"):
        compare.run(CompareConfig.of(**given))
    shutil.rmtree(tmp_path / "tiny")


@pytest.mark.usefixtures("undrawn")
def test_a_method_in_a_file_is_compared_by_its_source(tiny_model, tmp_path, monkeypatch):
    code = Path(shutil.copy(EXAMPLE, tmp_path / "part_way.py"))
    yaml, place = tmp_path / "study.yaml", f"{code}:part_way"
    given = options(tiny_model, tmp_path, seeds=[1], learning_rates=[1e-2], budget_steps=4)
    del given["modes"]
    yaml.write_text(
        json.dumps({**given, "output_dir": str(tmp_path), "methods": [{"method": "part_way", "step": 0.5}]})
    )
    with pytest.raises(UsageError, match="part_way"):
        CompareConfig.make({}, file=yaml)
    config = CompareConfig.make({"federation_mode": place}, file=yaml)
    result = compare.run(config).record
    assert [row["label"] for row in result["rows"]] == ["base", "part_way", "pooled", "none"]
    (described, *_) = result["experiment"]["modes"]
    assert (described["step"], described["source"]["from"]) == (0.5, "file")
    names = [one["run"] for one in runs_of(tmp_path / "tiny", "part_way")]
    monkeypatch.setattr(train, "run", lambda *run, **loading: pytest.fail("trained again"))
    assert without_clock(compare.run(config).record) == without_clock(result)
    code.write_text(code.read_text() + "# another version\n")
    changed = CompareConfig.make({"federation_mode": place}, file=yaml)
    plan = compare.run(changed.model_copy(update={"plan": True})).record
    assert plan["runs"] - plan["done"] == len(names) == 1


def test_methods_from_outside_are_rows_by_name_or_as_they_are(tmp_path):
    place = f"{EXAMPLE}:part_way"
    alone = CompareConfig.of(budget_steps=1, method=place)
    assert [one.mode for one in alone.modes] == ["homo", "part_way"]
    named = CompareConfig.of(budget_steps=1, method=place, methods=[{"method": "part_way", "step": 0.3}])
    assert [(one.name, dict(one.fields), one.row.name) for one in named.modes] == [
        ("part_way", {"step": 0.3}, "part_way")
    ]
    assert isinstance(CompareConfig.of(budget_steps=1, method=find_method(place)).modes[1], Contender)
    yaml = tmp_path / "study.yaml"
    for line in ("methods: [homo, a.py:b]", "methods: [{method: a.py:b}]", "method: a.py:b"):
        yaml.write_text(f"budget_steps: 1\n{line}\n")
        with pytest.raises(UsageError, match="names code"):
            CompareConfig.make({}, file=yaml)
    with pytest.raises(UsageError, match="step='much'"):
        CompareConfig.of(budget_steps=1, modes=[{"mode": place, "step": "much"}])


def test_a_comparison_finds_its_runs_wherever_their_base_lies_and_refuses_another(tiny_model, tmp_path, undrawn):
    changes = {"modes": ["homo"], "seeds": [1], "learning_rates": [1e-3], "budget_steps": 4}
    here, there = tmp_path / "base", tmp_path / "moved"
    shutil.copytree(tiny_model, here)
    first = compare.run(CompareConfig.of(**options(here, tmp_path, **changes))).record
    names = {path.name: path.read_bytes() for path in (tmp_path / "tiny" / "scores").iterdir()}
    assert all(json.loads(content)["base_model"]["identity"]["weights"] for content in names.values())
    here.rename(there)
    planned = compare.run(CompareConfig.of(**options(there, tmp_path, plan=True, **changes))).record
    assert planned["done"] == planned["runs"]
    again = compare.run(CompareConfig.of(**options(there, tmp_path, **changes))).record
    assert {path.name: path.read_bytes() for path in (tmp_path / "tiny" / "scores").iterdir()} == names
    assert again["rows"] == first["rows"]
    # one more seed trains on the base where it lies now, under the name that the records have
    compare.run(CompareConfig.of(**options(there, tmp_path, **{**changes, "seeds": [1, 2]})))
    told = [json.loads(path.read_text())["base_model"]["name"] for path in (tmp_path / "tiny" / "scores").iterdir()]
    assert set(told) == {str(here)}
    shutil.copytree(there, here)
    change_weights(here, "model.norm.weight", add_one)
    with pytest.raises(UsageError, match=r"is not the base that was measured under this name.*different: weights"):
        compare.run(CompareConfig.of(**options(here, tmp_path, **changes)))
