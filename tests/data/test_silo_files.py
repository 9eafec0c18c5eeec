"""Silos written from rows and from files: names, bytes, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from saved_data import save

import fedlora as fl
from fedlora.data.client_files import find_client_files
from fedlora.data.records import read_rows
from fedlora.data.row_parts import sha256_of_rows
from fedlora.errors import DataError, UsageError
from fedlora.rows import MIXED

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


def test_folders_of_files_and_saved_data_sets_are_copied_and_replaced(tmp_path):
    save(tmp_path / "saved", ["a"], ["b"])
    (tmp_path / "parts" / "old").mkdir(parents=True)
    for name in ("p2.csv", "p10.csv"):
        (tmp_path / "parts" / name).write_text(f"instruction,output\n{name},o\n")
    (tmp_path / "parts" / "notes.txt").write_text("mine")
    folder = fl.silos({"north": tmp_path / "saved", "south": tmp_path / "parts", "west": ROWS}, "own")
    assert sha256_of_rows(folder / "north") == sha256_of_rows(tmp_path / "saved")
    assert sorted(file.name for file in (folder / "south").iterdir()) == ["p10.csv", "p2.csv"]
    said = [[row.instruction for row in read_rows(file)] for file in find_client_files(folder, 8, chosen=False)]
    assert said == [["a", "b"], ["p2.csv", "p10.csv"], ["Capital of France?"]]
    (folder / "south" / "p3.csv").write_text("instruction,output\nc,o\n")
    with pytest.raises(UsageError, match=r"own: holds other files"):
        fl.silos({"north": ROWS, "south": tmp_path / "parts"}, "own")
    fl.silos({"north": ROWS, "south": tmp_path / "parts"}, "own", overwrite=True)
    assert [file.name for file in find_client_files(folder, 8, chosen=False)] == ["north.jsonl", "south"]
    assert sorted(file.name for file in (folder / "south").iterdir()) == ["p10.csv", "p2.csv"]


class Dataset:
    """As much of a `datasets.Dataset` as is used: it iterates over dictionaries."""

    def __init__(self, rows):
        self._rows = rows

    def __iter__(self):
        return iter(self._rows)


class DatasetDict(dict):
    """What the library returns where no split is named."""


def test_a_data_set_of_the_library_gives_its_rows_and_its_splits_are_not_taken_for_clients():
    folder = fl.silos({"north": Dataset(ROWS), "south": Dataset(ROWS)})
    assert [row.output for row in read_rows(folder / "south.jsonl")] == ["Paris"]
    splits = DatasetDict(train=Dataset(ROWS), validation=Dataset(ROWS))
    for given in (splits, {"north": splits}):
        with pytest.raises(UsageError, match="a DatasetDict with the splits train, validation") as caught:
            fl.silos(given, "other")
        assert 'dataset["train"]' in caught.value.hint
    with pytest.raises(UsageError, match="neither rows nor a file, but dict"):
        fl.silos({"north": {"instruction": "i"}}, "other")


def test_the_library_s_own_data_sets_give_their_rows():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    assert [row.output for row in read_rows(fl.silos({"a": rows, "b": rows}) / "a.jsonl")] == ["Paris"]
    with pytest.raises(UsageError, match="a DatasetDict with the splits train"):
        fl.silos(datasets.DatasetDict(train=rows), "other")


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


def test_columns_of_any_names_are_written_under_the_usual_ones_and_the_others_are_named(capsys):
    rows = [{"q": f"{n}?", "answers": {"text": [str(n)]}, "source": "s"} for n in range(2)]
    columns = {"instruction": "q", "output": "answers.text.0"}
    fl.silos({"a": rows, "b": pyarrow.Table.from_pylist(rows)}, columns=columns)
    assert capsys.readouterr().err.count("not used: source") == 1
    for name in "ab":
        assert [(row.instruction, row.output) for row in read_rows(Path(f"silos/{name}.jsonl"))] == [
            ("0?", "0"),
            ("1?", "1"),
        ]
    assert fl.silos({"a": rows, "b": rows}, columns="instruction=q,output=answers.text.0") == Path("silos")
    with pytest.raises(DataError, match=r"a: no row has the column 'topic'"):
        fl.silos({"a": rows}, "other", columns={**columns, "category": "topic"})
    with pytest.raises(UsageError, match="did you mean output"):
        fl.silos({"a": rows}, "other", columns={"instruction": "q", "outputs": "answers.text.0"})


def test_rows_of_several_kinds_are_taken_where_they_are_asked_for():
    fl.silos({"a": [{"text": "t"}, {"messages": TALK, "n": 1}]}, row_kind="any")
    assert [row.kind for row in read_rows(Path("silos/a.jsonl"), rules=MIXED)] == ["text", "conversation"]


def test_a_table_gives_its_rows_with_nulls_as_empty_fields_and_one_that_is_none_is_refused():
    class Frame:
        """What pandas and polars have; this one holds what Arrow cannot."""

        def __arrow_c_stream__(self, requested_schema: object = None) -> object:
            raise pyarrow.ArrowInvalid("mixed types")

    table = pyarrow.table({"instruction": ["a", "b"], "input": [None, "i"], "output": ["c", "d"], "when": [1, 2]})
    fl.silos({"north": table})
    assert [row.input for row in read_rows(Path("silos/north.jsonl"))] == ["", "i"]
    with pytest.raises(UsageError, match=r"client 'south': Frame is not a table .*mixed types"):
        fl.silos({"south": Frame()}, "other")


TALK = [{"role": "user", "content": "Capital of Peru?"}, {"role": "assistant", "content": "Lima"}]
OF_EVERY_KIND = {
    "instruction": {
        "instruction": "Of Chile?",
        "response": "Santiago",
        "history": (("Of Peru?", "Lima"),),
        "system": "s",
    },
    "messages": {"messages": TALK},
    "parts": {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TALK]},
    "conversations": {"conversations": [{"from": "human", "value": "Of Peru?"}, {"from": "gpt", "value": "Lima"}]},
    "completion": {"prompt": "Lima is in", "completion": " Peru", "category": None},
    "messages beside": {"prompt": tuple(TALK[:1]), "completion": TALK[1:]},
    "text": {"text": "Lima is in Peru."},
}


@pytest.mark.parametrize("kind", OF_EVERY_KIND)
def test_rows_of_every_kind_are_written_as_they_were_given(kind):
    row = OF_EVERY_KIND[kind]
    fl.silos({"north": [{**row, "when": object()}] * 2})
    assert json.loads(Path("silos/north.jsonl").read_text().splitlines()[0]) == json.loads(json.dumps(row))
    first, second = read_rows(Path("silos/north.jsonl"))
    assert first == second
    assert first.output


def test_a_silo_of_another_kind_than_its_first_row_is_refused_and_so_is_what_json_cannot_hold():
    with pytest.raises(DataError, match="a: row 2: a row with messages, but the file began with text"):
        fl.silos({"a": [{"text": "t"}, {"messages": TALK}]})
    with pytest.raises(DataError, match=r"a: row 1: the field 'messages\[1\].when' is of the type object"):
        fl.silos({"a": [{"messages": [TALK[0], {**TALK[1], "when": object()}]}]})
    with pytest.raises(DataError, match=r"a: row 1: the field 'messages\[1\].content' must be text, got a number"):
        fl.silos({"a": [{"messages": [TALK[0], {**TALK[1], "content": 7}]}]})
    assert not Path("silos").exists()
