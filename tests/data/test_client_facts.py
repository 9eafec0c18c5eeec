"""A client's file is opened and read once at the start, in every format: checked, hashed and counted in one pass."""

import gzip
import hashlib
import json
import random
import sys

import pyarrow
import pyarrow.parquet
import pytest

from fedlora.config.train import TrainConfig
from fedlora.data.client_facts import read_client_files
from fedlora.errors import DataError
from fedlora.types import Row

DRAW = random.Random(0)
# more than any buffer on the way holds, in any format: readers go back, and leave gaps
ROWS = [
    {
        "instruction": f"say {number} \u00e9 {DRAW.randbytes(1000).hex()}",
        "input": "",
        "output": "word " * (number % 3),
        "category": f"c{number % 2}",
    }
    for number in range(400)
]
_opened: list[str] | None = None


def _note(event, arguments):
    if _opened is not None and event == "open":
        _opened.append(str(arguments[0]))


sys.addaudithook(_note)


@pytest.fixture
def opened(monkeypatch):
    """The names of all files that this process opens, in order."""
    names: list[str] = []
    monkeypatch.setattr(sys.modules[__name__], "_opened", names)
    return names


def write(folder, kind):
    path, lines = folder / f"rows.{kind}", "".join(json.dumps(row) + "\n" for row in ROWS)
    if kind == "json":
        path.write_text(json.dumps(ROWS, indent=1) + "\n \n" * 9)
    elif kind == "csv":
        columns = "instruction,input,output,category\n"
        path.write_bytes(("\ufeff" + columns + "".join(f"{','.join(row.values())}\n" for row in ROWS)).encode())
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=50)
    else:
        path.write_text(lines)
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "jsonl.gz", "parquet"])
def test_a_file_is_opened_once_and_hashed_whole(tmp_path, opened, kind):
    path = write(tmp_path, kind)
    before, seen = len(opened), []
    clients = read_client_files({3: path}, TrainConfig.of(), on_row=lambda client, row: seen.append((client, row)))
    assert opened[before:].count(str(path)) == 1
    facts = clients[3].facts
    assert facts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (facts.client_id, facts.file, facts.num_skipped) == (3, path.name, 0)
    assert (facts.num_examples, facts.num_empty) == (266, 134)
    assert facts.categories == {"c0": 133, "c1": 133}
    assert seen == [(3, Row(**row)) for row in ROWS]


def test_train_opens_a_client_s_file_once_before_the_model_is_loaded(tiny_model, make_clients, tmp_path, opened):
    from fedlora.stages import train

    class LoadedError(Exception):
        pass

    def load(*arguments, **options):
        raise LoadedError

    folder = make_clients([3, 2])
    config = TrainConfig.of(base_model=str(tiny_model), data_path=folder, model_dir=tmp_path / "models", num_clients=2)
    before = len(opened)
    with pytest.raises(LoadedError):
        train.run(config, load=load)
    files = [str(file) for file in sorted((folder / "2").iterdir())]
    assert [name for name in opened[before:] if name in files] == files


def test_the_first_bad_row_and_a_client_without_rows_are_errors(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\nbad\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:2:1: not valid JSON"):
        read_client_files({0: path}, TrainConfig.of())
    with pytest.raises(DataError, match="local_val_set_size=1 leaves client 0 none of its 1 rows"):
        read_client_files({0: path}, TrainConfig.of(skip_bad=1, local_val_set_size=1))
    assert read_client_files({0: path}, TrainConfig.of(skip_bad=1))[0].facts.num_skipped == 1
