"""Silos written from rows and from files: names, bytes, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedlora as fl
from fedlora.data.client_files import find_client_files
from fedlora.data.records import read_rows
from fedlora.errors import DataError, UsageError

ROWS = [{"instruction": "Capital of France?", "response": "Paris", "source": ["a", "list"]}]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_rows_files_and_anything_that_iterates_over_rows_become_a_folder_that_train_reads(tmp_path):
    Path("towns.csv").write_text("instruction,output\nCapital of Peru?,Lima\n")
    folder = fl.silos({"north": ROWS, "south": "towns.csv", "west": iter(ROWS), "north.test": tuple(ROWS)}, "own")
    assert folder == Path("own")
    assert {file.name for file in folder.iterdir()} == {"north.jsonl", "south.csv", "west.jsonl", "north.test.jsonl"}
    assert (folder / "south.csv").read_bytes() == Path("towns.csv").read_bytes()
    clients = find_client_files(folder, 8, chosen=False)
    assert [file.name for file in clients] == ["north.jsonl", "south.csv", "west.jsonl"]
    assert [row.output for file in clients for row in read_rows(file)] == ["Paris", "Lima", "Paris"]
    assert json.loads((folder / "north.jsonl").read_text()) == {
        name: value for name, value in ROWS[0].items() if name != "source"
    }


def test_the_same_rows_write_nothing_and_others_need_overwrite():
    fl.silos({"a": ROWS, "b": ROWS})
    before = Path("silos/a.jsonl").stat().st_mtime_ns
    fl.silos({"a": ROWS, "b": ROWS})
    assert Path("silos/a.jsonl").stat().st_mtime_ns == before
    Path("silos/notes.txt").write_text("mine")
    with pytest.raises(UsageError):
        fl.silos({"a": ROWS, "c": ROWS})
    fl.silos({"a": ROWS, "c": ROWS}, overwrite=True)
    assert {file.name for file in Path("silos").iterdir()} == {"a.jsonl", "c.jsonl", "notes.txt"}


@pytest.mark.parametrize(
    ("clients", "error", "words"),
    [
        ({}, UsageError, "no clients"),
        (ROWS, UsageError, "no clients"),
        ({"a/b": ROWS}, UsageError, "a/b"),
        ({".a": ROWS}, UsageError, ".a"),
        ({"a,b": ROWS}, UsageError, "a,b"),
        ({"global": ROWS}, UsageError, "global"),
        ({"7": ROWS}, UsageError, "7"),
        ({"lost.test": ROWS}, UsageError, "lost"),
        ({"a": "missing.csv"}, UsageError, "missing.csv"),
        ({"a": 7}, UsageError, "int"),
        ({"a": []}, DataError, "no rows"),
        ({"a": [*ROWS, {"instruction": "x"}]}, DataError, "a: row 2"),
        ({"a": [{"instruction": 3, "output": "x"}]}, DataError, "number"),
        ({"a": [{"instruction": b"x", "output": "x"}]}, DataError, "bytes"),
        ({"a": ["text"]}, DataError, "a: row 1"),
    ],
)
def test_what_is_no_silo_is_refused_by_name_and_nothing_is_written(clients, error, words):
    with pytest.raises(error) as caught:
        fl.silos(clients)
    assert words in str(caught.value)
    assert not Path("silos").exists()
