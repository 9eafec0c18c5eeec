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
from fedlora.data.client_facts import read_client_files, split_rows
from fedlora.data.held_out import prompt_key
from fedlora.data.records import read_rows
from fedlora.errors import DataError
from fedlora.methods.table import METHODS
from fedlora.rows import Row

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
    elif kind == "jsonl.zst":
        path.write_bytes(pyarrow.compress(lines.encode(), "zstd", asbytes=True))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=50)
    else:
        path.write_text(lines)
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "jsonl.gz", "jsonl.zst", "parquet"])
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
    with pytest.raises(DataError, match="local_val_set_size=1 leaves none of the client's 1 row"):
        read_client_files({0: path}, TrainConfig.of(skip_bad=1, local_val_set_size=1))
    assert read_client_files({0: path}, TrainConfig.of(skip_bad=1))[0].facts.num_skipped == 1


def write_rows(path, prompts):
    rows = [
        {"instruction": prompt, "input": "", "output": f"answer {number}", "category": "c"}
        for number, prompt in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def split_of(path, client=0, **fields):
    """The prompts of a client's parts, and its facts."""
    config, rows = TrainConfig.of(**fields), read_rows(path)
    parts = split_rows([row.instruction for row in rows], [prompt_key(row) for row in rows], config, client)
    return parts, read_client_files({client: path}, config)[client].facts


def test_a_share_of_the_rows_is_held_out_by_the_seed_alike_for_every_method(tmp_path):
    path = write_rows(tmp_path / "north.jsonl", [f"say {number}" for number in range(20)])
    split, facts = split_of(path, test_share=0.2)
    assert (len(split.training), len(split.test)) == (16, 4)
    assert (facts.num_examples, facts.num_test, facts.categories) == (16, 4, {"c": 16})
    assert not set(split.training) & set(split.test)
    for method in METHODS:
        assert split_of(path, test_share=0.2, federation_mode=method)[0] == split
    assert set(split_of(path, test_share=0.2, seed=7)[0].test) != set(split.test)
    # what validates is drawn from what is left, and changes no test row
    both, facts = split_of(path, test_share=0.2, local_val_set_size=3)
    assert both.test == split.test
    assert set(both.training) | set(both.validation) == set(split.training)
    assert (facts.num_examples, facts.num_validation, facts.num_test) == (13, 3, 4)


def test_without_a_share_nothing_is_recorded_of_it(tmp_path):
    path = write_rows(tmp_path / "north.jsonl", ["a", "b", "c"])
    _, facts = split_of(path)
    assert "num_test" not in facts.record()
    assert "test_share" not in TrainConfig.of().full_record()
    assert TrainConfig.of(test_share=0.0).identity() == TrainConfig.of().identity()
    assert TrainConfig.of(test_share=0.1).record()["test_share"] == 0.1


def test_a_prompt_that_comes_twice_is_never_on_both_sides(tmp_path):
    path = write_rows(tmp_path / "north.jsonl", [f"say {number % 7}" for number in range(35)])
    for seed in range(10):
        split, _ = split_of(path, test_share=0.3, seed=seed)
        assert not set(split.training) & set(split.test)
        assert 10 <= len(split.test) <= 15


def test_a_share_is_at_least_one_row_and_never_all_and_an_error_where_it_can_be_none(tmp_path):
    two = write_rows(tmp_path / "two.jsonl", ["a", "b"])
    for share in (0.01, 0.99):
        split, _ = split_of(two, test_share=share)
        assert (len(split.training), len(split.test)) == (1, 1)
    with pytest.raises(DataError, match=r"one.jsonl: test_share=0.5 can hold out no row"):
        split_of(write_rows(tmp_path / "one.jsonl", ["a", "a"]), test_share=0.5)
    with pytest.raises(DataError, match="local_val_set_size=1 leaves none of the client's"):
        split_of(two, test_share=0.5, local_val_set_size=1)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_fields_that_are_not_used_are_named_once_for_all_files(tmp_path, kind, capsys):
    rows = [{**row, "url": "x", "id": str(number)} for number, row in enumerate(ROWS[:5])]
    for name in ("north", "south"):
        path = tmp_path / f"{name}.{kind}"
        if kind == "csv":
            lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
            path.write_text("".join(f"{line}\n" for line in lines))
        elif kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    files = {0: tmp_path / f"north.{kind}", 1: tmp_path / f"south.{kind}"}
    read_client_files(files, TrainConfig.of())
    assert capsys.readouterr().err == "not used: url, id\n"


def test_fields_that_some_files_have_are_named_with_the_files(tmp_path, capsys):
    files = {}
    for client, more in enumerate([{"url": "x"}, {}, {"url": "y"}]):
        files[client] = tmp_path / f"client{client}.jsonl"
        files[client].write_text(json.dumps({**ROWS[1], **more}) + "\n")
    read_client_files(files, TrainConfig.of())
    assert capsys.readouterr().err == "not used in client0.jsonl, client2.jsonl: url\n"


def test_a_field_without_end_of_names_is_not_listed_without_end(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**ROWS[1], f"k{number}": 1}) + "\n" for number in range(100)))
    read_client_files({0: path}, TrainConfig.of())
    assert capsys.readouterr().err.count("k") == 20


def test_kinds_other_than_plain_instructions_are_reported_once_with_their_files(tmp_path, capsys):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "weight": 1}]
    rows = [{"messages": turns}, {"text": "t"}, {"instruction": "i", "output": "o"}, {"messages": turns}]
    files = {}
    for client, row in enumerate(rows):
        files[client] = tmp_path / f"client{client}.jsonl"
        files[client].write_text((json.dumps(row) + "\n") * 3)
    read_client_files(files, TrainConfig.of())
    assert capsys.readouterr().err.splitlines() == [
        "conversation rows, read from messages in client0.jsonl, client3.jsonl",
        "not used in client0.jsonl, client3.jsonl: messages[].weight",
        "text rows, read from text in client1.jsonl",
    ]
    read_client_files({0: files[0]}, TrainConfig.of())
    assert capsys.readouterr().err.splitlines()[0] == "conversation rows, read from messages"
