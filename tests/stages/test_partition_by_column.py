"""One client per value of a column: natural sizes, test rows of every client, names that stay with the data."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fedlora.config.data import AllocateConfig
from fedlora.data.records import read_rows
from fedlora.errors import DataError, UsageError
from fedlora.rows import ReadRules
from fedlora.stages import allocate

SIZES = {"St. Mary": 20, "ward 10": 5, "ward 2": 11, "Öst": 1}
NAMES = ("St. Mary", "ward 2", "ward 10", "Öst")


def row(number: int, where: str, **more: Any) -> dict[str, Any]:
    return {"instruction": f"{where} {number}", "output": f"o{number}", "category": f"c{number % 2}", **more}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


def deal(file: Path, root: Path, **more: Any) -> allocate.AllocatedData:
    given = {"input_file": file, "output_root": root, "partition": "column", "by": "hospital", **more}
    return allocate.run(AllocateConfig.of(**given))


@pytest.fixture
def wards(tmp_path: Path) -> Path:
    """Rows of four hospitals in turn, each named in the rows."""
    rows = [row(number, name, hospital=name) for name, size in SIZES.items() for number in range(size)]
    return write(tmp_path / "wards.jsonl", sorted(rows, key=lambda one: one["output"]))


def test_every_value_is_a_client_with_all_its_rows_but_a_share_for_testing(wards, tmp_path, capsys):
    made = deal(wards, tmp_path)
    clients = made.manifest["clients"]
    assert [(one["client_id"], one["value"]) for one in clients] == list(enumerate(NAMES))
    assert [one["num_examples"] for one in clients] == [18, 10, 4, 1]
    assert made.manifest["config"] == {
        **{"partition": "column", "by": "hospital", "test_share": 0.1, "seed": 42, "num_clients": 4}
    }
    test = read_rows(made.paths.test_file(None))
    assert Counter(one.instruction.rsplit(" ", 1)[0] for one in test) == {"St. Mary": 2, "ward 2": 1, "ward 10": 1}
    for client, name in enumerate(NAMES):
        rows = read_rows(made.paths.client_file(4, client))
        assert {one.instruction.rsplit(" ", 1)[0] for one in rows} == {name}
        assert not {one.instruction for one in rows} & {one.instruction for one in test}
    assert made.manifest["label_skew"] > 0
    assert "1 client with a single row, which trains" in capsys.readouterr().err
    shown = made.text().splitlines()
    assert shown[0].split() == ["client", "hospital", "rows", "categories"]
    assert shown[1].split()[:4] == ["0", "St.", "Mary", "18"]


def test_the_same_seed_gives_the_same_bytes_and_another_column_never_shares_the_folder(wards, tmp_path, capsys):
    first = deal(wards, tmp_path)
    deal(wards, tmp_path)
    assert "already holds exactly this data set" in capsys.readouterr().err
    assert deal(wards, tmp_path / "other").manifest == first.manifest
    with pytest.raises(UsageError, match="was allocated with another input, seed"):
        deal(wards, tmp_path, by="category")
    assert len(deal(wards, tmp_path, by="category", dataset_name="two").manifest["clients"]) == 2


def test_a_column_may_lie_in_an_object_and_hold_numbers_or_truth(tmp_path):
    rows = [row(number, str(number % 3), site={"id": number % 3, "open": number % 2 == 0}) for number in range(30)]
    file = write(tmp_path / "rows.jsonl", rows)
    made = deal(file, tmp_path, by="site.id")
    assert [one["value"] for one in made.manifest["clients"]] == ["0", "1", "2"]
    made = deal(file, tmp_path, by="site.open", dataset_name="open")
    assert [one["value"] for one in made.manifest["clients"]] == ["false", "true"]


def test_a_column_of_a_table_is_read_beside_those_of_a_row(tmp_path):
    rows = [row(number, str(number % 2), hospital=f"h{number % 2}") for number in range(20)]
    (tmp_path / "rows.csv").write_text(
        "instruction,hospital,output\n" + "".join(f"{one['instruction']},{one['hospital']},o\n" for one in rows)
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in ("rows.csv", "rows.parquet"):
        made = deal(tmp_path / name, tmp_path, dataset_name=Path(name).suffix[1:])
        assert [one["value"] for one in made.manifest["clients"]] == ["h0", "h1"]
    (tmp_path / "less.csv").write_text("instruction,output\ni,o\n")
    with pytest.raises(DataError, match=r"less\.csv:1:1: the column 'hospital' is missing"):
        deal(tmp_path / "less.csv", tmp_path)


BAD = {
    "missing": ({}, "the field 'hospital' is missing"),
    "null": ({"hospital": None}, "the field 'hospital' is empty"),
    "empty": ({"hospital": ""}, "the field 'hospital' is empty"),
    "a list": ({"hospital": ["a"]}, "the field 'hospital' must be text or a number, got a list"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_row_without_the_column_is_named_or_left_out(tmp_path, kind, capsys):
    more, message = BAD[kind]
    rows = [row(number, str(number % 2), hospital=str(number % 2)) for number in range(20)]
    file = write(tmp_path / "rows.jsonl", [*rows[:7], row(99, "x", **more), *rows[7:]])
    with pytest.raises(DataError, match=rf"rows\.jsonl:8:1: {message}"):
        deal(file, tmp_path)
    made = deal(file, tmp_path, skip_bad=1)
    assert made.manifest["num_skipped"] == 1
    assert sum(one["num_examples"] for one in made.manifest["clients"]) == 18
    assert f"rows.jsonl:8:1: {message}" in capsys.readouterr().err


def test_rows_keep_the_column_and_nothing_else_of_what_is_not_theirs(wards):
    first = read_rows(wards, rules=ReadRules(keep=("hospital",)))[0]
    assert first.more == {"hospital": "St. Mary"}
    assert "hospital" not in first.as_dict()
    assert read_rows(wards)[0].more == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"by": ""}, "partition=column takes by=COLUMN"),
        ({"partition": "iid"}, "by applies to partition=column only"),
        ({"num_clients": 3}, "num_clients does not apply to partition=column: the column's values are the clients"),
        ({"train_per_cat": 3}, "train_per_cat does not apply to partition=column"),
        ({"test_per_cat": 3}, "test_per_cat does not apply to partition=column"),
        ({"alpha": 0.3}, "alpha applies to partition=dirichlet only"),
    ],
)
def test_flags_of_other_partitions_are_refused(wards, tmp_path, given, message):
    with pytest.raises(UsageError, match=message):
        deal(wards, tmp_path, **given)


def test_a_column_that_makes_no_federation_or_leaves_no_test_row_is_refused(tmp_path):
    same = write(tmp_path / "same.jsonl", [row(number, "x", hospital="x") for number in range(5)])
    with pytest.raises(DataError, match="only the value 'x' in the column 'hospital'"):
        deal(same, tmp_path)
    single = write(tmp_path / "single.jsonl", [row(number, "x", hospital=str(number)) for number in range(5)])
    with pytest.raises(DataError, match="every value of the column 'hospital' has a single row"):
        deal(single, tmp_path)


def test_thousands_of_values_are_thousands_of_clients(tmp_path):
    count = 3000
    rows = [row(number, f"u{number % count}", hospital=f"u{number % count}") for number in range(2 * count)]
    made = deal(write(tmp_path / "users.jsonl", rows), tmp_path)
    clients = made.manifest["clients"]
    assert [one["value"] for one in clients] == [f"u{number}" for number in range(count)]
    assert {one["num_examples"] for one in clients} == {1}
    assert made.manifest["test"]["num_examples"] == count
    assert "2,968 clients more, see the manifest" in made.text()


def test_the_next_command_takes_the_chat_template_where_rows_have_turns_before_the_last(wards, tmp_path):
    assert "--template" not in deal(wards, tmp_path, dataset_name="plain").next_command
    talks = [row(number, "north", hospital=f"{number % 2}", system="Be brief.") for number in range(8)]
    made = deal(write(tmp_path / "talks.jsonl", talks), tmp_path, dataset_name="talks")
    assert "--template chat" in made.next_command
