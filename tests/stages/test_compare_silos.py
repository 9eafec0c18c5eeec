"""Comparing on a folder of silos: rows divided per client, alike for every method, and results by client's name."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora import cli
from fedlora.comparing.data_sets import DataSets
from fedlora.comparing.experiment import cells_of, rows_to_answer, train_config_of, train_fields_of
from fedlora.comparing.known_bases import KnownBases
from fedlora.comparing.silo_data import make_silo_data
from fedlora.config.compare import CompareConfig
from fedlora.data.records import read_rows
from fedlora.errors import DataError, UsageError
from fedlora.paths import ComparisonPaths
from fedlora.rows import MIXED, Row
from fedlora.stages import compare, train

CLIENTS = ("north", "south", "west")
SMALL = {"methods": ["homo"], "seeds": [1], "test_share": 0.2}


def write_rows(path: Path, prompts: list[str], **more: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"instruction": prompt, "output": f"{prompt[0]}{prompt[-1]}", **more} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_silos(folder: Path, count: int = 10, **more: str) -> Path:
    for name in CLIENTS:
        write_rows(folder / f"{name}.jsonl", [f"{name} {number}" for number in range(count)], **more)
    return folder


def options(folder: Path, silos: Path, model: Path | str = "none", **changes: Any) -> dict[str, Any]:
    return {
        "name": "own",
        "output_dir": folder,
        "methods": ["homo", {"method": "fedprox", "proximal_mu": 0.1}],
        "seeds": [1, 2],
        "learning_rates": [1e-3, 1e-2],
        "budget_steps": 6,
        "data": silos,
        "train": {
            "model": str(model),
            "base_dtype": "float32",
            "template": "chat",
            "client_fraction": 1.0,
            "batch_size": 8,
            "epochs": 1,
            "rank": 2,
            "tokens_per_pass": 512,
            "gradient_checkpointing": "off",
            "device": "cpu",
        },
        **changes,
    }


def parts_of(folder: Path, silos: Path, seed: int = 1, **changes: Any) -> tuple[Any, dict[str, list[str]]]:
    """A data set, and the prompts of each of its parts."""
    config = CompareConfig.of(**options(folder, silos, **changes))
    data = make_silo_data(config, seed, ComparisonPaths(folder, "own"))
    files = {"train": sorted(data.folder.iterdir()), "validation": [data.validation], "test": [data.test]}
    return data, {
        part: [json.loads(line)["instruction"] for file in found for line in file.read_text().splitlines()]
        for part, found in files.items()
    }


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, compare.Comparison]:
    root = tmp_path_factory.mktemp("comparisons")
    result = compare.run(CompareConfig.of(**options(root, make_silos(root / "silos"), tiny_model, **SMALL)))
    assert isinstance(result, compare.Comparison)
    return root / "own", result


def test_every_method_is_measured_on_every_client_s_rows(finished):
    _, result = finished
    record = result.record
    assert [row["label"] for row in record["rows"]] == ["base", "homo", "pooled", "none"]
    assert all(row["metrics"]["loss_own"]["n"] == 1 for row in record["rows"])
    (table,) = record["clients"]
    assert table["names"] == dict(zip("012", CLIENTS, strict=True))
    assert table["shares"] == {str(number): {name: 1.0} for number, name in enumerate(CLIENTS)}
    assert set(table["methods"]["homo"]["less_than_alone"]["1"]) == set(CLIENTS)
    assert record["silos"]["rows"] == {name: [7, 1, 2] for name in CLIENTS}
    assert record["experiment"]["data"].endswith("silos")


def test_clients_keep_their_names_in_every_table_and_in_the_runs(finished):
    root, result = finished
    text, page = result.text(), (root / "comparison.md").read_text()
    assert [line.split()[0] for line in text.splitlines() if line.split()[:1] and line.split()[0] in CLIENTS] == [
        *CLIENTS
    ]
    assert "| north |" in page
    assert "client 0" not in page + text
    assert "on each client's test rows" in page
    assert "validation rows of the 3 clients, everything here is measured on 6 other rows of the clients" in page
    run = next((root / "runs").glob("homo-*/run.json"))
    assert [client["file"] for client in json.loads(run.read_text())["clients"]] == [
        f"{name}.jsonl" for name in CLIENTS
    ]


def test_every_client_has_its_gain_on_its_own_test_rows(finished):
    root, result = finished
    (found,) = result.record["own_rows"]
    assert [one["client"] for one in found["clients"]] == list(CLIENTS)
    rows = {row["label"]: row["metrics"]["loss_own"]["mean"] for row in result.record["rows"]}
    for label in ("base", "homo", "pooled", "none"):
        losses = [one["scores"]["loss"][label]["mean"] for one in found["clients"]]
        # the same adapters on the same rows as the losses of the main table
        assert sum(losses) / len(losses) == pytest.approx(rows[label], rel=1e-4)
    for one in found["clients"]:
        assert (one["reference"], one["num_rows"]) == ("none", 2)
        assert set(one["gains"]["loss"]) == {"homo", "pooled"}
        low, high = one["gains"]["loss"]["homo"]["interval"]
        assert low <= one["gains"]["loss"]["homo"]["mean"] <= high
    markdown = (root / "comparison.md").read_text(encoding="utf-8")
    assert "## Who gains on its own test rows" in markdown
    assert "gain of homo" in markdown
    page = (root / "report.html").read_text(encoding="utf-8")
    assert "Test loss of every model on each client" in page
    assert "Clients whose gain or loss has an interval" in page


def test_a_comparison_of_an_earlier_version_is_measured_again_only_where_its_runs_are_there(
    finished, tiny_model, tmp_path, monkeypatch
):
    root, result = finished
    shutil.copytree(root.parent, tmp_path / "old")
    for file in (tmp_path / "old/own/scores").iterdir():
        record = json.loads(file.read_text())
        record.pop("own_rows", None)
        file.write_text(json.dumps(record))
    (gone,) = (one for one in (tmp_path / "old/own/runs").iterdir() if one.name == run_of(root, "homo"))
    shutil.rmtree(gone)
    monkeypatch.setattr(compare, "draw_comparison", lambda record: {})
    monkeypatch.setattr(train, "run", lambda *args, **options: pytest.fail("a finished run is trained again"))
    again = compare.run(CompareConfig.of(**options(tmp_path / "old", root.parent / "silos", tiny_model, **SMALL)))
    assert isinstance(again, compare.Comparison)
    (found,) = again.record["own_rows"]
    assert all(set(one["gains"]["loss"]) == {"pooled"} for one in found["clients"])
    assert any(f"scores/{gone.name}.json" in remark for remark in again.record["remarks"])
    assert again.record["rows"] == result.record["rows"]


def run_of(root: Path, mode: str) -> str:
    """The run of a method that was scored on the test rows."""
    records = [json.loads(file.read_text()) for file in (root / "scores").iterdir()]
    (found,) = (one["run"] for one in records if one["mode"] == mode and one["test"] is not None)
    return found


def test_one_seed_divides_the_rows_alike_for_all_and_the_parts_are_disjoint(tmp_path):
    silos = make_silos(tmp_path / "silos", 20)
    first, parts = parts_of(tmp_path, silos, test_share=0.2)
    assert {part: len(prompts) for part, prompts in parts.items()} == {"train": 39, "validation": 9, "test": 12}
    assert len({prompt for prompts in parts.values() for prompt in prompts}) == 60
    assert parts_of(tmp_path, silos, test_share=0.2, validation_per_cat=1)[1]["test"] == parts["test"]
    other, another = parts_of(tmp_path, silos, 2, test_share=0.2)
    assert set(another["test"]) != set(parts["test"])
    assert first.digest != other.digest


def test_test_rows_beside_the_clients_are_the_test_rows_and_a_client_without_is_named(tmp_path):
    silos = make_silos(tmp_path / "silos")
    write_rows(silos / "north.test.jsonl", ["north 88", "north 3"])
    write_rows(silos / "west.test.jsonl", ["west 88"])
    data, parts = parts_of(tmp_path, silos)
    assert sorted(parts["test"]) == ["north 3", "north 88", "west 88"]
    assert data.shares == {"0": {"north": 1.0}, "2": {"west": 1.0}}
    assert set(data.validation_shares) == {"0", "1", "2"}
    assert data.silos.num_leaks == ("north 3" in parts["train"])
    with pytest.raises(UsageError, match=r"test_share=0.2, but .* holds test rows already: north.test.jsonl"):
        parts_of(tmp_path, silos, test_share=0.2)


def test_rows_are_read_as_the_fields_of_train_say(tmp_path):
    silos = make_silos(tmp_path / "silos")
    with (silos / "north.jsonl").open("a") as file:
        file.write("no row\n")
    with pytest.raises(DataError, match=r"north.jsonl:11:1: not valid JSON"):
        parts_of(tmp_path, silos, test_share=0.2)
    lenient = {**options(tmp_path, silos)["train"], "skip_bad": "1"}
    assert parts_of(tmp_path, silos, test_share=0.2, train=lenient)[0].silos.rows["north"] == [7, 1, 2]
    with pytest.raises(UsageError, match="skip_bad"):
        parts_of(tmp_path, silos, test_share=0.2, train={**lenient, "skip_bad": "many"})


def test_one_test_file_for_all_is_measured_by_category_where_it_has_all_of_the_clients(tmp_path):
    silos = make_silos(tmp_path / "silos", category="a")
    write_rows(tmp_path / "test.jsonl", ["x 1", "x 2"], category="a")
    data, parts = parts_of(tmp_path, silos, test=tmp_path / "test.jsonl")
    assert parts["test"] == ["x 1", "x 2"]
    assert (data.silos.grouped_by, data.shares["1"]) == ("category", {"a": 1.0})
    write_rows(tmp_path / "test.jsonl", ["x 1", "x 2"], category="b")
    data, _ = parts_of(tmp_path, silos, test=tmp_path / "test.jsonl")
    assert (data.silos.grouped_by, data.shares["1"]) == ("file", {"all test rows": 1.0})
    with pytest.raises(UsageError, match="its folder takes this file for a client"):
        parts_of(tmp_path, silos, test=silos / "north.jsonl")
    with pytest.raises(UsageError, match="test_share or test_file_path, and not both"):
        CompareConfig.of(**options(tmp_path, silos, test=tmp_path / "test.jsonl", test_share=0.1))


def test_silos_without_test_rows_and_experiments_without_a_run_are_errors(tmp_path, tiny_model, capsys):
    silos = make_silos(tmp_path / "silos")
    file = tmp_path / "own.yaml"
    given = {**options(tmp_path, silos, tiny_model), "data": str(silos), "output_dir": str(tmp_path / "out")}
    file.write_text(json.dumps(given))
    for more in ([], ["--plan"]):
        assert cli.main(["compare", str(file), *more]) == 2
        said = capsys.readouterr().err
        assert "holds no test rows" in said
        assert "--test_share 0.2" in said
    file.write_text(json.dumps({**given, "data": {"input_file": str(silos)}}))
    assert cli.main(["compare", str(file), "--plan"]) == 2
    assert f"give data={silos}" in capsys.readouterr().err
    for nowhere in ("nowhere", "nowhere.csv"):
        assert cli.main(["compare", str(file), "--data", nowhere, "--plan"]) == 2
        assert re.search(f"no run: {nowhere}: no such (folder|file)", capsys.readouterr().err)
    assert cli.main(["compare", str(file), "--data", str(silos), "--test_share", "0.2", "--plan"]) == 0
    out = capsys.readouterr().out
    assert "north 7 + 1 + 2" in out
    assert "runs of at most 6 steps each" in out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"data": "silos"}}, "data in train: compare decides it; give data of the comparison"),
        ({"train": {"data_path": "silos"}}, "data_path in train: compare decides it; give data"),
        ({"train": {"test": "x"}}, "test in train: compare decides it; give test of"),
        ({"train": {"seed": 1}}, "seed in train: compare decides it; give seeds"),
        ({"train": {"rank": 2, "lora_r": 4}}, "rank and lora_r are the same field"),
        ({"train": {"rang": 2}}, "unknown field 'rang' in train"),
        ({"methods": [{"method": "homo", "mode": "seq"}]}, "mode and method are the same field"),
        ({"axes": {"partition": ["iid"]}}, "partition has no effect"),
        ({"test_per_cat": 3}, "test_per_cat has no effect"),
        (
            {"data": {"num_clients": 3}, "test_share": 0.1, "test_per_cat": 3},
            "test_share or test_per_cat, and not both",
        ),
        ({"data": {"num_clients": 3}, "test": "test.jsonl"}, "test_file_path has no effect"),
        ({"data": {"test_share": 0.1}}, "test_share in data: compare decides it; give test_share of"),
        ({"data": {"num_clients": 3}, "train": {"skip_bad": 1}}, "skip_bad has no effect"),
    ],
)
def test_what_has_no_place_is_refused_with_the_place_that_it_has(tmp_path, changes, words):
    silos = make_silos(tmp_path / "silos", 1)
    with pytest.raises(UsageError, match=words):
        CompareConfig.of(**options(tmp_path, silos, **changes))


def test_short_names_are_those_of_train_and_axes_are_called_as_they_are_typed(tmp_path):
    silos = make_silos(tmp_path / "silos", 1)
    config = CompareConfig.of(**options(tmp_path, silos, axes={"rank": [2, 4]}))
    assert config.train["base_model"] == "none"
    assert config.train["local_batch_size"] == 8
    assert [(one.label, one.values) for one in config.settings()] == [
        ("rank 2", {"lora_r": 2}),
        ("rank 4", {"lora_r": 4}),
    ]
    assert [(one.mode, dict(one.fields)) for one in config.modes] == [("homo", {}), ("fedprox", {"proximal_mu": 0.1})]


def test_one_file_of_rows_is_divided_by_allocate_with_a_share_held_out(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [f"say {number}" for number in range(60)])
    changes = {"data": {"input_file": str(tmp_path / "rows.jsonl"), "partition": "iid", "num_clients": 3}}
    config = CompareConfig.of(**options(tmp_path, tmp_path, **changes, test_share=0.2))
    data = DataSets(config, ComparisonPaths(tmp_path, "own")).find(config.settings()[0], 1)
    parts = [
        {json.loads(line)["instruction"] for line in file.read_text().splitlines()}
        for file in (data.validation, data.test)
    ]
    assert [len(part) for part in parts] == [6, 6]
    assert not parts[0] & parts[1]
    assert CompareConfig.of(**options(tmp_path, tmp_path / "rows.jsonl")).silos is None
    config = CompareConfig.of(**options(tmp_path, tmp_path, **changes, test_share=0.01))
    with pytest.raises(DataError, match="holds out one row of a category"):
        DataSets(config, ComparisonPaths(tmp_path, "own")).find(config.settings()[0], 1)


def test_a_second_call_trains_nothing_and_gives_the_same_result(finished, tiny_model, monkeypatch):
    root, result = finished
    monkeypatch.setattr(compare, "draw_comparison", lambda record: {})
    monkeypatch.setattr(train, "run", lambda *args, **options: pytest.fail("a finished run is trained again"))
    given = options(root.parent, root.parent / "silos", tiny_model, **SMALL)
    again = compare.run(CompareConfig.of(**given))
    assert json.loads(json.dumps(again.as_dict())) == json.loads(json.dumps(result.as_dict()))


def test_texts_are_compared_by_their_loss_alone(tmp_path):
    texts = [Row("", "", f"text {number}", "c", kind="text") for number in range(3)]
    config = CompareConfig.of(**options(tmp_path, tmp_path, answers_per_cat=2, test_share=0.2))
    with pytest.raises(UsageError, match="answers_per_cat=2: some test rows are plain text"):
        rows_to_answer(texts, config)
    assert rows_to_answer(texts, config.model_copy(update={"answers_per_cat": 0})) == []


def test_runs_read_the_rows_of_a_comparison_under_the_fields_own_names(tmp_path):
    more = {"columns": {"instruction": "question"}, "row_kind": "instruction", "skip_bad": 2}
    fields = {**options(tmp_path, tmp_path)["train"], **more}
    config = CompareConfig.of(**options(tmp_path, tmp_path, test_share=0.2, train=fields))
    found = train_fields_of(config, cells_of(config)[0])
    assert {name: found[name] for name in more if name in found} == {"skip_bad": 2}


def make_mixed_silos(folder: Path) -> Path:
    """North has instructions, south conversations of two exchanges, west prompts with completions."""
    silos = make_silos(folder)
    replies = {"role": "assistant", "content": "yes"}, {"role": "user", "content": "more"}
    talks = [{"messages": [{"role": "user", "content": f"talk {n}"}, *replies, replies[0]]} for n in range(10)]
    completions = [{"prompt": f"west {n}", "completion": " is west"} for n in range(10)]
    for name, rows in (("south", talks), ("west", completions)):
        (silos / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return silos


def test_silos_of_several_kinds_keep_their_rows_and_leaks_are_found_across_them(tmp_path, tiny_model):
    silos = make_mixed_silos(tmp_path / "silos")
    for name, question in (("north", "north 1"), ("west", "talk 3")):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "no"}]
        (silos / f"{name}.test.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    config, paths = CompareConfig.of(**options(tmp_path, silos, tiny_model)), ComparisonPaths(tmp_path, "own")
    data = make_silo_data(config, 1, paths)
    assert {row.question for row in read_rows(data.test)} == {"talk 3", "north 1"}
    trained = [row for file in data.folder.iterdir() for row in read_rows(file)]
    assert {row.kind for row in trained} == {"instruction", "conversation", "completion"}
    both = {row.before[0].content if row.before else row.question for row in trained}
    assert data.silos.num_leaks == len(both & {"talk 3", "north 1"})
    assert len({row.kind for row in read_rows(data.validation, rules=MIXED)}) == 3
    for is_mixed, row_kind in ((data.is_mixed, "any"), (False, "auto")):
        how = {"seed": 1, "rate": 1e-3, "rounds": 1, "bases": KnownBases(paths)}
        run = train_config_of(config, cells_of(config)[0], data=replace(data, is_mixed=is_mixed), **how)
        assert run.row_kind == row_kind


@pytest.mark.thorough
def test_a_comparison_of_silos_of_several_kinds_measures_and_scores_all_of_them(tmp_path, tiny_model):
    silos = make_mixed_silos(tmp_path / "silos")
    more = {**SMALL, "answers_per_cat": 1, "curves": ["homo"]}
    result = compare.run(CompareConfig.of(**options(tmp_path / "root", silos, tiny_model, **more)))
    (row,) = (row for row in result.record["rows"] if row["label"] == "homo")
    assert row["metrics"]["loss_own"]["n"] == 1
    files = (tmp_path / "root").rglob("global_output.jsonl")
    answers = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert {tuple(sorted(set(answer) & {"instruction", "messages", "prompt"})) for answer in answers} == {
        ("instruction",),
        ("messages",),
        ("prompt",),
    }
