"""A data set of the hub, fetched with a library that a fake stands for: the commit is found and recorded."""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from fedlora import cli
from fedlora.config.data import HubConfig
from fedlora.data.client_files import list_rows
from fedlora.data.records import read_rows
from fedlora.errors import DataError, UsageError
from fedlora.stages.data_hub import check_datasets, run, source_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Labels:
    def int2str(self, number: int) -> str:
        return ("open", "closed")[number]


class Split(list):
    features = {"category": Labels()}  # noqa: RUF012


class Hub:
    """What is asked of the hub and of the library, and what they answer."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = [
            {"instruction": f"i{n}", "output": "o", "category": n % 2, "tags": [{"a": None}], "seen": 2.5}
            for n in range(4)
        ]
        self.asked: list[Any] = []

    def dataset_info(self, repository: str, *, revision: str) -> Any:
        self.asked.append((repository, revision))
        return SimpleNamespace(sha=COMMIT)

    def load_dataset(self, *what: Any, **how: Any) -> Split:
        self.asked.append((*what, how["split"], how["revision"]))
        return Split(self.rows)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub, library = Hub(), ModuleType("datasets")
    library.load_dataset = hub.load_dataset  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


def fetch(folder: Path, **more: Any) -> Any:
    return run(HubConfig.of(**{"repository": "org/name", "output_file": folder / "rows.jsonl", **more}))


def test_a_revision_is_resolved_and_its_commit_recorded_beside_rows_that_are_read(hub, tmp_path):
    made = fetch(tmp_path, revision="v1", split="test", subset="en")
    assert hub.asked == [("org/name", "v1"), ("org/name", "en", "test", COMMIT)]
    record = json.loads(source_file(made.file).read_text())
    assert record == {
        **{"repository": "org/name", "revision": "v1", "commit": COMMIT, "split": "test", "subset": "en"},
        **{"num_rows": 4, "sha256": hashlib.sha256(made.file.read_bytes()).hexdigest()},
    }
    assert made.as_dict() == {"file": str(made.file), **record}
    assert [row.category for row in read_rows(made.file)] == ["open", "closed"] * 2
    assert json.loads(made.file.read_text().splitlines()[0])["tags"] == [{"a": None}]
    assert list_rows(tmp_path) == [made.file]
    assert made.text().endswith("4 rows of org/name (test) at commit 0123456789ab")


def test_a_commit_is_taken_as_it_is_and_nothing_is_asked_about_it(hub, tmp_path):
    made = fetch(tmp_path, revision=COMMIT[::-1])
    assert hub.asked == [("org/name", None, "train", COMMIT[::-1])]
    assert made.record["commit"] == COMMIT[::-1]


def test_columns_that_json_cannot_hold_are_left_out_of_all_rows_and_named(hub, tmp_path, capsys):
    for number, row in enumerate(hub.rows):
        row |= {
            "when": datetime.datetime(2026, 1, 1),
            "image": {"bytes": b"x"},
            "score": float("nan") if number else 1.0,
        }
    made = fetch(tmp_path)
    assert made.record["left_out"] == ["when", "image", "score"]
    assert "columns that JSON cannot hold, left out: when, image, score" in capsys.readouterr().err
    assert all("score" not in json.loads(line) for line in made.file.read_text().splitlines())


def test_an_existing_file_an_empty_split_and_a_hub_out_of_reach_are_errors(hub, tmp_path, monkeypatch):
    fetch(tmp_path)
    with pytest.raises(UsageError, match="already exists"):
        fetch(tmp_path)
    hub.rows = []
    with pytest.raises(DataError, match="org/name: the split train holds no rows"):
        fetch(tmp_path, overwrite=True)

    def lose(*what: Any, **how: Any) -> Any:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(hub, "dataset_info", lose)
    with pytest.raises(UsageError, match=r"cannot fetch org/name at main from the hub: no route to host$") as caught:
        fetch(tmp_path, overwrite=True)
    assert "save_to_disk" in caught.value.hint
    assert len(read_rows(tmp_path / "rows.jsonl")) == 4


def test_a_folder_of_the_same_name_is_never_read_in_the_place_of_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    with pytest.raises(UsageError, match="org/name is a file or folder here"):
        fetch(tmp_path)
    assert not hub.asked


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"repository": ""}, "repository='' is not the name of a data set"),
        ({"repository": "../x"}, "is not the name of a data set"),
        ({"output_file": Path("rows.json")}, "name it .jsonl"),
    ],
)
def test_names_that_cannot_be_are_refused_before_anything_is_fetched(hub, tmp_path, given, message):
    with pytest.raises(UsageError, match=message):
        fetch(tmp_path, **given)
    assert not hub.asked


def test_without_the_library_the_command_says_what_to_install(monkeypatch, capsys):
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(UsageError, match="datasets, which is not installed") as caught:
        check_datasets()
    assert "fedlora[datasets]" in caught.value.hint
    assert cli.main(["data", "hub", "org/name"]) == 2
    assert "pip install 'fedlora[datasets]'" in capsys.readouterr().err
