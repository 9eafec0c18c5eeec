"""Finding the client files of a federation."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.config.train import TrainConfig
from fedlora.data.client_files import client_files_of, find_client_files, find_test_files
from fedlora.errors import UsageError


def _allocate(folder: Path, count: int) -> None:
    (folder / str(count)).mkdir(parents=True)
    (folder / str(count) / "manifest.json").write_text("{}")
    for client_id in range(count):
        (folder / str(count) / f"local_training_{client_id}.json").write_text("[]")


def _touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("[]")


def test_the_contracts_tree_is_read_in_client_order(tmp_path: Path) -> None:
    _allocate(tmp_path, 12)
    _touch(tmp_path, "dolly_test_200.jsonl")
    files = find_client_files(tmp_path, 12, chosen=True)
    assert files == [tmp_path / "12" / f"local_training_{client_id}.json" for client_id in range(12)]


def test_the_only_data_set_below_is_found_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _allocate(tmp_path / "dataset1", 8)
    _allocate(tmp_path / "dataset2", 4)
    files = find_client_files(tmp_path, 8, chosen=False)
    assert files[0] == tmp_path / "dataset1" / "8" / "local_training_0.json"
    assert str(tmp_path / "dataset1" / "8") in capsys.readouterr().err


def test_several_data_sets_are_listed(tmp_path: Path) -> None:
    _allocate(tmp_path / "one", 2)
    _allocate(tmp_path / "two", 2)
    with pytest.raises(UsageError, match=r"several data sets for 2 clients: .*one.2, .*two.2"):
        find_client_files(tmp_path, 2, chosen=True)


def test_a_data_set_directly_below_wins_over_one_further_down(tmp_path: Path) -> None:
    _allocate(tmp_path, 2)
    _allocate(tmp_path / "other", 2)
    assert find_client_files(tmp_path, 2, chosen=True)[0].parent == tmp_path / "2"


def test_a_missing_client_file_is_named(tmp_path: Path) -> None:
    _allocate(tmp_path, 3)
    (tmp_path / "3" / "local_training_1.json").unlink()
    with pytest.raises(UsageError, match=r"local_training_1\.json: no such file"):
        find_client_files(tmp_path, 3, chosen=True)


@pytest.mark.parametrize("chosen", [True, False])
def test_another_count_is_named_and_loose_files_are_not_taken_for_silos(tmp_path: Path, chosen: bool) -> None:
    _allocate(tmp_path, 4)
    _touch(tmp_path, *(f"dolly_test_{number}.jsonl" for number in range(8)))
    with pytest.raises(UsageError, match=r"no data for 8 clients, only .*4"):
        find_client_files(tmp_path, 8, chosen=chosen)


def test_own_silos_set_the_count_in_natural_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _touch(tmp_path, "site10.json", "site2.jsonl", "site1.json", "manifest.json", ".hidden.json", "notes.txt")
    (tmp_path / "folder.json").mkdir()
    files = find_client_files(tmp_path, 8, chosen=False)
    assert [file.name for file in files] == ["site1.json", "site2.jsonl", "site10.json"]
    assert find_client_files(tmp_path, 3, chosen=True) == files
    assert "3 files" in capsys.readouterr().err


def test_what_is_no_client_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _touch(tmp_path, "a.json", "b.json", "lab.xlsx", ".hidden")
    (tmp_path / "more").mkdir()
    find_client_files(tmp_path, 8, chosen=False)
    assert "not clients, and ignored: lab.xlsx, more\n" in capsys.readouterr().err


def test_own_silos_may_be_of_any_format_that_is_read(tmp_path: Path) -> None:
    names = ["a.json", "b.jsonl", "c.csv", "d.parquet", "e.json.gz", "f.jsonl.gz", "g.csv.gz", "h.jsonl.zst"]
    _touch(tmp_path, *names, "i.pkl", "i.parquet.gz", "i.parquet.zst", "j.gz", "README", "k.npy")
    assert [file.name for file in find_client_files(tmp_path, 8, chosen=False)] == names


@pytest.mark.parametrize("other", ["site1.csv", "site1.jsonl", "site1.json.gz", "site1.parquet"])
def test_one_client_in_two_formats_is_refused_with_both_files(tmp_path: Path, other: str) -> None:
    _touch(tmp_path, "site1.json", "site2.json", other)
    with pytest.raises(UsageError, match="one client in several formats") as caught:
        find_client_files(tmp_path, 3, chosen=True)
    assert all(str(tmp_path / name) in str(caught.value) for name in ("site1.json", other))


def test_a_chosen_count_that_differs_from_the_silos_is_refused_with_both_numbers(tmp_path: Path) -> None:
    _touch(tmp_path, "a.json", "b.json")
    with pytest.raises(UsageError, match=r"num_clients=5, but .* holds 2 client files"):
        find_client_files(tmp_path, 5, chosen=True)


def test_a_single_file_is_a_federation_only_when_one_client_is_asked_for(tmp_path: Path) -> None:
    _touch(tmp_path, "skills.json")
    with pytest.raises(UsageError, match="a federation has at least two clients"):
        find_client_files(tmp_path, 8, chosen=False)
    assert find_client_files(tmp_path, 1, chosen=True) == [tmp_path / "skills.json"]


@pytest.mark.parametrize("there", [True, False])
def test_where_nothing_is_found_the_way_to_data_is_named(tmp_path: Path, there: bool) -> None:
    with pytest.raises(UsageError) as caught:
        find_client_files(tmp_path if there else tmp_path / "absent", 8, chosen=False)
    assert "fedlora data skills" in caught.value.hint
    assert "fedlora allocate" in caught.value.hint


def test_one_file_is_no_folder_of_clients_and_the_way_to_split_it_is_named(tmp_path: Path) -> None:
    _touch(tmp_path, "rows.csv")
    with pytest.raises(UsageError, match="is one file; training reads a folder") as caught:
        find_client_files(tmp_path / "rows.csv", 8, chosen=False)
    assert "fedlora allocate" in caught.value.hint


def test_test_rows_stand_beside_their_client_in_any_format_and_are_no_client(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _touch(tmp_path, "north.csv", "north.test.csv", "south.2.json", "south.2.test.jsonl.gz", "west.parquet")
    files = find_client_files(tmp_path, 8, chosen=False)
    assert [file.name for file in files] == ["north.csv", "south.2.json", "west.parquet"]
    assert find_test_files(files) == {0: tmp_path / "north.test.csv", 1: tmp_path / "south.2.test.jsonl.gz"}
    assert "3 files" in (said := capsys.readouterr().err)
    assert "test rows: north.test.csv, south.2.test.jsonl.gz" in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base.csv", "no client can be called base"),
        ("global.json", "no client can be called global"),
        ("all.jsonl.gz", "no client can be called all"),
        ("test.csv", "no client can be called test"),
        ("1.csv", "named by a number, but it is client 0"),
        ("west.test.csv", "test rows of 'west', but the folder has no client of this name"),
    ],
)
def test_a_name_that_means_something_else_is_refused_with_the_file(tmp_path: Path, name: str, message: str) -> None:
    _touch(tmp_path, "north.csv", "south.csv", name)
    with pytest.raises(UsageError, match=message) as caught:
        find_client_files(tmp_path, 8, chosen=False)
    assert name in str(caught.value)


def test_a_file_named_by_its_client_s_number_is_taken(tmp_path: Path) -> None:
    _touch(tmp_path, *(f"{number}.csv" for number in range(11)))
    assert [file.name for file in find_client_files(tmp_path, 8, chosen=False)] == [f"{n}.csv" for n in range(11)]


def test_two_files_of_test_rows_of_one_client_are_refused(tmp_path: Path) -> None:
    _touch(tmp_path, "north.csv", "south.csv", "north.test.csv", "north.test.json")
    with pytest.raises(UsageError, match="one client in several formats"):
        find_client_files(tmp_path, 8, chosen=False)


def test_rows_that_are_held_out_in_two_ways_or_trained_on_are_refused(tmp_path: Path) -> None:
    _touch(tmp_path, "north.csv", "south.csv", "north.test.csv")
    with pytest.raises(UsageError, match=r"test_share=0.2, but .* holds test rows already: north.test.csv"):
        client_files_of(TrainConfig.of(data_path=tmp_path, test_share=0.2))
    with pytest.raises(UsageError, match="its folder takes this file for a client"):
        client_files_of(TrainConfig.of(data_path=tmp_path, val_data_path=str(tmp_path / "south.csv")))
    assert len(client_files_of(TrainConfig.of(data_path=tmp_path, val_data_path=str(tmp_path / "north.test.csv")))) == 2
