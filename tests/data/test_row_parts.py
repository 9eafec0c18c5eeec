"""A folder of files and a saved data set are read as one file of rows."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pytest
from saved_data import lines, row, save

from fedlora.config.train import TrainConfig
from fedlora.data.client_facts import read_client_files
from fedlora.data.client_files import check_no_client, find_client_files, find_test_files
from fedlora.data.held_out import read_test_rows, read_validation_rows
from fedlora.data.records import read_rows
from fedlora.data.row_parts import sha256_of_rows
from fedlora.errors import DataError, UsageError
from fedlora.rows import STRICT, ReadRules


def asked(path: Path, **more: Any) -> list[str]:
    return [one.instruction for one in read_rows(path, **more)]


@pytest.fixture
def silo(tmp_path: Path) -> Path:
    """A client of three files in three formats, with more beside them."""
    folder = tmp_path / "silos" / "north"
    folder.mkdir(parents=True)
    (folder / "part10.csv").write_text("instruction,output\ne,o\n")
    (folder / "part2.jsonl.zst").write_bytes(pyarrow.compress(lines("c", "d").encode(), "zstd", asbytes=True))
    (folder / "part1.json").write_text(json.dumps([row("a"), row("b")]))
    (folder / ".part.jsonl").write_text("{")
    (folder / "README.md").write_text("what it is")
    (folder / "old").mkdir()
    (folder / "old" / "part0.jsonl").write_text(lines("z"))
    return folder


def test_the_files_of_a_folder_are_one_client_s_rows_in_natural_order(silo: Path, capsys) -> None:
    (silo.parent / "south.jsonl").write_text(lines("a"))
    (silo.parent / "south.test").mkdir()
    (silo.parent / "south.test" / "only.csv").write_text("instruction,output\nt,o\n")
    (silo.parent / "empty").mkdir()
    files = find_client_files(silo.parent, 8, chosen=False)
    assert [file.name for file in files] == ["north", "south.jsonl"]
    assert find_test_files(files) == {1: silo.parent / "south.test"}
    assert asked(files[0]) == ["a", "b", "c", "d", "e"]
    said = capsys.readouterr().err
    assert "not clients, and ignored: empty\n" in said
    assert "not rows, and ignored: north/README.md, north/old\n" in said
    assert "taking the 1 file and 1 folder of" in said
    held_out = read_test_rows(silo.parent, rules=STRICT)
    assert [(held_out.clients[0], held_out.rows[0].instruction)] == [("south", "t")]


def test_a_bad_row_of_a_folder_is_named_by_its_file_and_line(silo: Path) -> None:
    (silo / "part11.jsonl").write_text(lines("f") + "{oops\n")
    with pytest.raises(DataError, match=r"north/part11\.jsonl:2:2: not valid JSON"):
        read_rows(silo)
    said: list[str] = []
    assert asked(silo, rules=ReadRules(skip_bad=1), on_skip=said.append)[-1] == "f"
    assert "part11.jsonl:2:2" in said[0]


def test_the_hash_of_a_folder_covers_the_name_and_the_bytes_of_every_part(silo: Path) -> None:
    def facts_of(folder: Path) -> str:
        return read_client_files({0: folder}, TrainConfig.of())[0].facts.sha256

    seen = [facts_of(silo)]
    assert seen[0] == sha256_of_rows(silo)
    (silo / "README.md").write_text("of no matter")
    (silo / "old" / "part0.jsonl").unlink()
    assert facts_of(silo) == seen[0]
    (silo / "part1.json").write_text(json.dumps([row("a"), row("c")]))
    seen.append(facts_of(silo))
    (silo / "part1.json").rename(silo / "part01.json")
    seen.append(facts_of(silo))
    (silo / "part3.jsonl").write_text(lines("f"))
    seen.append(facts_of(silo))
    (silo / "part2.jsonl.zst").unlink()
    seen.append(facts_of(silo))
    assert len(set(seen)) == len(seen)
    assert seen[-1] == sha256_of_rows(silo)
    file = silo / "part3.jsonl"
    assert facts_of(file) == sha256_of_rows(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_name_counts_once_whether_it_is_a_file_or_a_folder(silo: Path) -> None:
    (silo.parent / "north.csv").write_text("instruction,output\ni,o\n")
    with pytest.raises(UsageError, match="one client in several formats"):
        find_client_files(silo.parent, 8, chosen=False)
    silo.rename(silo.parent / "global")
    with pytest.raises(UsageError, match="no client can be called global"):
        find_client_files(silo.parent, 8, chosen=False)


def test_a_client_s_file_is_no_file_for_testing(silo: Path) -> None:
    with pytest.raises(UsageError, match="its folder takes this file for a client"):
        check_no_client(silo / "part1.json", [silo], "val_data_path")
    with pytest.raises(UsageError, match=r"val_data_path=.*: a folder, and one file of rows is read here"):
        read_validation_rows(str(silo), STRICT)


def test_one_folder_of_files_is_no_federation_and_the_ways_out_fit_it(silo: Path) -> None:
    with pytest.raises(UsageError, match="is the only file of") as caught:
        find_client_files(silo.parent, 8, chosen=False)
    assert f"if each of its files is a client, give --data_path {silo}" in caught.value.hint


def test_a_saved_data_set_is_one_file_of_rows_wherever_one_is_read(tmp_path: Path) -> None:
    saved = save(tmp_path / "silos" / "west", ["a", "b", "c"], ["d"])
    (tmp_path / "silos" / "east.jsonl").write_text(lines("a"))
    files = find_client_files(tmp_path / "silos", 8, chosen=False)
    assert [file.name for file in files] == ["east.jsonl", "west"]
    assert asked(saved) == ["a", "b", "c", "d"]
    assert [one.instruction for one in read_validation_rows(str(saved), STRICT)] == ["a", "b", "c", "d"]
    held_out = read_test_rows(saved, rules=STRICT)
    assert (len(held_out.rows), held_out.clients) == (4, ())
    assert held_out.sha256 == sha256_of_rows(saved)
    facts = read_client_files({1: saved}, TrainConfig.of())[1].facts
    assert (facts.file, facts.num_examples, facts.sha256) == ("west", 4, sha256_of_rows(saved))
    with pytest.raises(UsageError, match="west is one data set; training reads a folder"):
        find_client_files(saved, 8, chosen=False)


def test_a_row_of_a_saved_data_set_is_named_by_its_file_and_number(tmp_path: Path) -> None:
    rows = [row("a"), row("b"), row("c"), {"instruction": None, "output": "o"}]
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow: row 4: the field 'instruction' must be text"):
        read_rows(save(tmp_path / "nulls", ["x"], rows))
    with pytest.raises(DataError, match=r"data-00000-of-00001\.arrow: the column 'output' must be text, got int64"):
        read_rows(save(tmp_path / "numbers", [{"instruction": "i", "output": 1}]))


def test_the_splits_of_a_dataset_dict_are_refused_by_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "splits"
    save(folder / "train", ["a"])
    save(folder / "validation", ["b"])
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    (tmp_path / "other.jsonl").write_text(lines("a"))

    def read_as_client() -> None:
        files = find_client_files(tmp_path, 8, chosen=False)
        read_client_files(dict(enumerate(files)), TrainConfig.of())

    for read in (
        lambda: read_rows(folder),
        lambda: find_client_files(folder, 8, chosen=False),
        lambda: read_test_rows(folder, rules=STRICT),
        lambda: read_validation_rows(str(folder), STRICT),
        read_as_client,
    ):
        with pytest.raises(DataError, match="a DatasetDict with the splits train, validation") as caught:
            read()
        assert str(folder / "train") in caught.value.hint


DAMAGE: dict[str, Any] = {
    "a state that is no JSON": lambda folder: (folder / "state.json").write_text("{"),
    "a state without files": lambda folder: (folder / "state.json").write_text('{"_data_files": 3}'),
    "a file elsewhere": lambda folder: (folder / "state.json").write_text('{"_data_files": [{"filename": "../x"}]}'),
    "a file that is gone": lambda folder: next(folder.glob("*.arrow")).unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "an end cut off": lambda folder: cut(next(folder.glob("*.arrow")), -300),
    "a header cut off": lambda folder: cut(next(folder.glob("*.arrow")), 40),
    "no Arrow at all": lambda folder: next(folder.glob("*.arrow")).write_text(lines("a") * 9),
    "a length beyond the file": lambda folder: announce(next(folder.glob("*.arrow"))),
}


def cut(file: Path, end: int) -> None:
    file.write_bytes(file.read_bytes()[:end])


def announce(file: Path) -> None:
    """The first record batch says that it takes 2**40 bytes."""
    content = file.read_bytes()
    (length,) = struct.unpack_from("<I", content, 4)
    batch = content[8 + length :]
    body = list(pyarrow.ipc.MessageReader.open_stream(content))[1].body.size
    place = batch.index(struct.pack("<q", body))
    file.write_bytes(content[: 8 + length] + batch[:place] + struct.pack("<q", 1 << 40) + batch[place + 8 :])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_data_set_is_one_data_error(tmp_path: Path, damage: str) -> None:
    folder = save(tmp_path / "saved", [f"row {number}" for number in range(50)], batch=10)
    DAMAGE[damage](folder)
    with pytest.raises(DataError) as caught:
        read_rows(folder)
    assert str(folder) in str(caught.value)
    assert "save_to_disk" in caught.value.hint


def test_bytes_changed_anywhere_in_an_arrow_file_never_end_the_process(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", ["some text", "x" * 40, "y"], batch=2)
    file = next(folder.glob("*.arrow"))
    sound = file.read_bytes()
    for place in range(0, len(sound), 3):
        for value in (0, 255):
            file.write_bytes(sound[:place] + bytes([value]) + sound[place + 1 :])
            with contextlib.suppress(DataError):
                read_rows(folder)


def test_compressed_record_batches_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    folder = save(tmp_path / "saved", ["x" * 100_000] * 50, options=options)
    with pytest.raises(DataError, match="record batches are compressed"):
        read_rows(folder)


def test_what_the_library_saves_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [row(str(number)) | {"category": "c", "seen": number, "tags": ["x"]} for number in range(1500)]
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).select(range(0, 1500, 2)).save_to_disk(tmp_path / "saved", num_shards=3)
    assert asked(tmp_path / "saved") == [str(number) for number in range(0, 1500, 2)]
