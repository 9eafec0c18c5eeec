"""The allocate stage: the contract's split and files, what is refused, and that nothing is half-written."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedlora.config.data import AllocateConfig
from fedlora.data.records import read_rows
from fedlora.data.skills import make_skill_rows
from fedlora.errors import DataError, FedloraError, UsageError
from fedlora.federated.allocation import clean_rows
from fedlora.rows import Row, Turn
from fedlora.stages import allocate

DOLLY = Path(__file__).parents[3] / "shared" / "data" / "dolly-15k.jsonl"


def _rows(sizes: dict[str, int]) -> list[dict[str, str]]:
    return [
        {"instruction": f"{name} {number}", "context": "", "response": f"answer {number}", "category": name}
        for name, size in sizes.items()
        for number in range(size)
    ]


def _input(folder: Path, rows: list[dict[str, str]], name: str = "input.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows))
    return path


def _run(folder: Path, rows: list[dict[str, str]] | None = None, **values: Any) -> dict[str, Any]:
    return dict(_allocate(folder, rows, **values).manifest)


def _allocate(folder: Path, rows: list[dict[str, str]] | None = None, **values: Any) -> allocate.AllocatedData:
    if rows is not None:
        _input(folder, rows)
    fields = {"input_file": folder / "input.json", "output_root": folder / "data", "train_per_cat": 6} | values
    return allocate.run(AllocateConfig.of(**{"test_per_cat": 4, **fields}))


def _tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_contracts_files_hold_the_contracts_rows(tmp_path: Path) -> None:
    _run(tmp_path, _rows({"b": 12, "a": 10, "c": 11}))
    root = tmp_path / "data" / "dataset1"
    assert set(_tree(root)) == {
        "dolly_test_4.jsonl",
        "3/manifest.json",
        *(f"3/local_training_{client}.json" for client in range(3)),
    }
    lines = [json.loads(line) for line in (root / "dolly_test_4.jsonl").read_text().splitlines()]
    assert [line["category"] for line in lines] == ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    for client, name in enumerate("abc"):
        rows = json.loads((root / "3" / f"local_training_{client}.json").read_text())
        assert [list(row) for row in rows] == [["instruction", "input", "output", "category"]] * 6
        assert {row["category"] for row in rows} == {name}


def test_rows_are_shuffled_before_they_are_split(tmp_path: Path) -> None:
    _run(tmp_path, _rows({"a": 40}))
    rows = read_rows(tmp_path / "data" / "dataset1" / "dolly_test_4.jsonl")
    assert [row.instruction for row in rows] != [f"a {number}" for number in range(4)]


def test_a_prompt_never_stands_in_both_train_and_test(tmp_path: Path) -> None:
    rows = _rows({"a": 20, "b": 20})
    repeated = [{**row, "response": "later", "category": "b"} for row in rows[:10]] + rows[25:30]
    manifest = _run(tmp_path, rows + repeated, train_per_cat=12, test_per_cat=8)
    root = tmp_path / "data" / "dataset1"
    test = read_rows(root / "dolly_test_8.jsonl")
    train = [row for client in range(2) for row in read_rows(root / "2" / f"local_training_{client}.json")]
    assert len({row.prompt for row in test + train}) == len(test) + len(train) == 40
    assert "later" not in {row.output for row in test + train}
    assert manifest["duplicates"] == {"dropped": 15, "under_another_category": 10}


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = _rows({"a": 12})
    unanswered = [{**rows[0], "response": ""}, {**rows[11], "response": " \n"}]
    manifest = _run(tmp_path, unanswered + rows)
    assert manifest["num_empty"] == 2
    assert manifest["duplicates"]["dropped"] == 0
    assert manifest["input"]["num_rows"] == 14


def test_the_manifest_tells_what_was_made(tmp_path: Path) -> None:
    returned = _run(tmp_path, _rows({"a": 12, "b": 12}), seed=3)
    root = tmp_path / "data" / "dataset1"
    manifest = json.loads((root / "2" / "manifest.json").read_text())
    assert manifest == returned
    assert manifest["seed"] == 3
    assert manifest["label_skew"] == 0.5
    assert manifest["input"]["sha256"] == hashlib.sha256((tmp_path / "input.json").read_bytes()).hexdigest()
    assert [client["categories"] for client in manifest["clients"]] == [{"a": 6}, {"b": 6}]
    assert manifest["test"]["categories"] == {"a": 4, "b": 4}
    tree = _tree(root)
    assert tree["dolly_test_4.jsonl"] == manifest["test"]["sha256"]
    assert [tree[f"2/{client['file']}"] for client in manifest["clients"]] == [c["sha256"] for c in manifest["clients"]]
    assert str(tmp_path) not in json.dumps(manifest)


@pytest.mark.parametrize(
    ("values", "num_clients"),
    [
        ({"partition": "iid", "num_clients": 5}, 5),
        ({"partition": "dirichlet", "num_clients": 4, "alpha": 0.1}, 4),
        ({"partition": "shards", "num_clients": 3}, 3),
        ({"num_clients": 6}, 6),
        ({"partition": "iid"}, 3),
    ],
)
def test_other_partitions_deal_out_the_same_pool(tmp_path: Path, values: dict[str, Any], num_clients: int) -> None:
    rows = _rows({"a": 12, "b": 12, "c": 12})
    manifest = _run(tmp_path, rows, **values)
    _run(tmp_path, dataset_name="plain")
    root = tmp_path / "data"
    dealt = Counter(
        row
        for client in range(num_clients)
        for row in read_rows(root / "dataset1" / str(num_clients) / f"local_training_{client}.json")
    )
    plain = Counter(row for c in range(3) for row in read_rows(root / "plain" / "3" / f"local_training_{c}.json"))
    assert dealt == plain
    assert manifest["config"]["num_clients"] == num_clients == len(manifest["clients"])
    assert (root / "dataset1" / "dolly_test_4.jsonl").read_bytes() == (
        root / "plain" / "dolly_test_4.jsonl"
    ).read_bytes()


def test_all_categories_that_are_too_small_are_named_with_their_sizes(tmp_path: Path) -> None:
    rows = [*_rows({"a": 10, "b": 9, "c": 2}), _rows({"a": 1})[0]]
    with pytest.raises(DataError, match=r"4 test and 6 training .*: b \(9\), c \(2\)") as caught:
        _run(tmp_path, rows)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "data").exists()


def test_a_row_without_a_category_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl"
    path.write_text('{"instruction": "a", "output": "b", "category": "c"}\n{"instruction": "a", "output": "b"}\n')
    with pytest.raises(DataError, match=r"input\.jsonl:2:1: the field 'category' is missing"):
        _run(tmp_path, input_file=path)
    assert not (tmp_path / "data").exists()


def test_a_missing_input_names_both_ways_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        _run(tmp_path)
    assert "fedlora data dolly" in caught.value.hint
    assert "fedlora data skills" in caught.value.hint


def test_an_identical_run_writes_nothing_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run(tmp_path, _rows({"a": 12}))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    capsys.readouterr()
    _run(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before
    assert "already holds exactly this data set" in capsys.readouterr().err


@pytest.mark.parametrize(
    "values",
    [{"seed": 7}, {"train_per_cat": 5}, {"test_per_cat": 3}, {"partition": "iid"}, {"num_clients": 3, "seed": 7}],
)
def test_another_data_set_of_the_same_name_is_refused_untouched(tmp_path: Path, values: dict[str, Any]) -> None:
    _run(tmp_path, _rows({"a": 12, "b": 12, "c": 12}), num_clients=3)
    before = _tree(tmp_path)
    with pytest.raises(UsageError, match="dataset1"):
        _run(tmp_path, **({"num_clients": 3} | values))
    assert _tree(tmp_path) == before


def test_overwrite_replaces_a_data_set_and_its_stale_test_file(tmp_path: Path) -> None:
    _run(tmp_path, _rows({"a": 12, "b": 12}))
    _run(tmp_path, test_per_cat=3, overwrite=True)
    _run(tmp_path, test_per_cat=3, dataset_name="fresh")
    assert _tree(tmp_path / "data" / "dataset1") == _tree(tmp_path / "data" / "fresh")


def test_other_numbers_of_clients_share_a_data_set_only_with_the_same_test_prompts(tmp_path: Path) -> None:
    _run(tmp_path, _rows({"a": 12, "b": 12}))
    _run(tmp_path, num_clients=4)
    before = _tree(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="training rows there could be test rows here"):
            _run(tmp_path, num_clients=1, seed=9, overwrite=overwrite)
    assert _tree(tmp_path) == before


def test_a_write_that_fails_leaves_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written = allocate.write_text, []

    def fail_on_third(path: Path, text: str) -> None:
        written.append(path)
        if len(written) == 3:
            raise FedloraError("no space")
        real(path, text)

    monkeypatch.setattr(allocate, "write_text", fail_on_third)
    with pytest.raises(FedloraError, match="no space"):
        _run(tmp_path, _rows({"a": 12, "b": 12}))
    assert not list((tmp_path / "data").rglob("manifest.json"))
    monkeypatch.undo()
    _run(tmp_path)
    assert len(list((tmp_path / "data").rglob("manifest.json"))) == 1


def test_a_folder_is_no_file_of_rows_and_needs_no_allocation(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a folder; allocate divides one file") as caught:
        allocate.run(AllocateConfig.of(input_file=tmp_path))
    assert f"fedlora train --data {tmp_path}" in caught.value.hint
    with pytest.raises(UsageError, match="a folder without a file of rows"):
        read_rows(tmp_path)


def test_rows_without_categories_are_dealt_out_at_random_and_only_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("instruction,output\n" + "".join(f"say {number},{number}\n" for number in range(20)))
    given = {"input_file": path, "output_root": tmp_path, "num_clients": 2, "train_per_cat": 16, "test_per_cat": 4}
    data = allocate.run(AllocateConfig.of(**given, partition="iid"))
    assert [client["num_examples"] for client in data.manifest["clients"]] == [8, 8]
    assert "(none) 8" in data.text()
    with pytest.raises(DataError, match="the column 'category' is missing"):
        allocate.run(AllocateConfig.of(**given, overwrite=True))
    with pytest.raises(DataError, match=r"\(none\) \(20\)"):
        allocate.run(AllocateConfig.of(**{**given, "train_per_cat": 17}, partition="iid", overwrite=True))


def test_the_summary_shows_clients_and_escapes_category_names(tmp_path: Path) -> None:
    shown = _allocate(tmp_path, _rows({"a": 12, "b\x1b[31m": 12})).text()
    assert "\x1b" not in shown
    assert "     0     6  a 6" in shown
    assert "label skew: 0.500" in shown


def test_the_same_seed_gives_the_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    _input(tmp_path, make_skill_rows(12, seed=1))
    code = (
        "import sys; from fedlora.config.data import AllocateConfig; from fedlora.stages import allocate\n"
        "for partition in ('category', 'iid', 'dirichlet', 'shards'): "
        "allocate.run(AllocateConfig.of(input_file='input.json', output_root=sys.argv[1], train_per_cat=8, "
        "test_per_cat=4, partition=partition, dataset_name=partition))"
    )
    for hash_seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, f"data{hash_seed}"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
    assert len(_tree(tmp_path / "data1")) == 40
    assert _tree(tmp_path / "data1") == _tree(tmp_path / "data2")


@pytest.mark.skipif(not DOLLY.is_file(), reason="the full Dolly file is not beside the repository")
def test_dolly_is_split_as_the_contract_says(tmp_path: Path) -> None:
    manifest = allocate.run(AllocateConfig.of(input_file=DOLLY, output_root=tmp_path)).manifest
    assert manifest["input"]["num_rows"] - manifest["duplicates"]["dropped"] - manifest["num_empty"] == 14_824
    assert manifest["duplicates"]["under_another_category"] == 51
    root = tmp_path / "dataset1"
    test = read_rows(root / "dolly_test_200.jsonl")
    train = [row for client in range(8) for row in read_rows(root / "8" / f"local_training_{client}.json")]
    assert (len(test), len(train)) == (1600, 2400)
    assert set(Counter(row.category for row in test).values()) == {200}
    assert set(Counter(row.category for row in train).values()) == {300}
    assert not {row.prompt for row in test} & {row.prompt for row in train}


def test_a_share_uses_every_row(tmp_path: Path) -> None:
    made = _allocate_share(tmp_path, _rows({"a": 20, "b": 3}), test_share=0.1, num_clients=2, partition="iid")
    assert made.paths.test_file(None).name == "test_rows.jsonl"
    test = read_rows(made.paths.test_file(None))
    assert Counter(row.category for row in test) == {"a": 2, "b": 1}
    trained = [row for client in range(2) for row in read_rows(made.paths.client_file(2, client))]
    assert len(trained) == 20
    assert not {row.instruction for row in trained} & {row.instruction for row in test}
    with pytest.raises(UsageError, match="allocated with another"):
        _allocate_share(tmp_path, test_share=0.3, num_clients=3, partition="iid")


def test_a_share_is_instead_of_counts_and_needs_two_rows(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give test_share, or train_per_cat and test_per_cat"):
        AllocateConfig.of(test_share=0.1, test_per_cat=3)
    with pytest.raises(DataError, match="a single prompt cannot be split: b"):
        _allocate_share(tmp_path, _rows({"a": 20, "b": 1}), test_share=0.1)


def test_rows_without_a_category_are_pointed_to_a_partition_that_needs_none(tmp_path: Path) -> None:
    rows = [{"instruction": f"q {number}", "response": "a"} for number in range(9)]
    with pytest.raises(DataError, match="category") as refused:
        _allocate_share(tmp_path, rows, test_share=0.1)
    assert "--partition iid" in refused.value.hint


def test_too_few_rows_for_the_counts_point_to_the_share(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        _run(tmp_path, _rows({"a": 5}))
    assert "--test_share" in refused.value.hint


def _allocate_share(folder: Path, rows: list[dict[str, str]] | None = None, **values: Any) -> allocate.AllocatedData:
    if rows is not None:
        _input(folder, rows)
    return allocate.run(AllocateConfig.of(input_file=folder / "input.json", output_root=folder / "data", **values))


def _talk(*texts: str) -> Row:
    turns = tuple(Turn("assistant" if place % 2 else "user", text) for place, text in enumerate(texts))
    return Row(texts[-2], "", texts[-1], "c", turns[:-2], "conversation")


def test_conversations_are_one_row_per_prompt_and_their_beginnings_are_duplicates() -> None:
    long = _talk("who?", "Ada", "when?", "1815", "where?", "London")
    rows = [_talk("who?", "Ada"), _talk("who?", "Alan", "when?", "1912"), long, long, _talk("when?", "1815")]
    cleaned = clean_rows([*rows, _talk("who?", "Ada", "when?", "1816"), Row("when?", "", "now", "c")])
    # the bare `when?` opens a conversation, and an instruction of the same text is its duplicate
    assert cleaned.rows == (rows[1], long, rows[4])
    assert (cleaned.num_duplicates, cleaned.num_empty) == (4, 0)


def test_every_kind_of_row_is_written_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [
        *(_talk(f"who {n}?", "Ada", "when?", "1815") for n in range(4)),
        *(Row(f"Once {n}", "", "upon", "c", kind="completion") for n in range(4)),
        *(Row("", "", f"text {n}", "c", kind="text") for n in range(4)),
        *(Row(f"say {n}", "", "yes", "c", (Turn("system", "Be short."),)) for n in range(4)),
    ]
    monkeypatch.setattr(allocate, "read_rows", lambda *how, **more: every)
    _allocate(tmp_path, [], train_per_cat=12, num_clients=2, partition="iid")
    root = tmp_path / "data" / "dataset1"
    found = [json.loads(line) for line in (root / "dolly_test_4.jsonl").read_text().splitlines()]
    for client in range(2):
        found += json.loads((root / "2" / f"local_training_{client}.json").read_text())
    assert sorted(map(json.dumps, found)) == sorted(json.dumps(row.as_dict()) for row in every)
    assert {tuple(row) for row in found} == {
        ("messages", "category"),
        ("prompt", "completion", "category"),
        ("text", "category"),
        ("instruction", "input", "system", "output", "category"),
    }
