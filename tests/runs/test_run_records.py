"""run.json and manifests as typed records: what commit 0a2484f wrote is read, and written again to the same bytes.

`recorded/` holds run.json and the manifest of round 2 of a `fedex` run of that commit.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.files import json_text
from fedlora.paths import RunPaths
from fedlora.runs.checking import is_whole, read_manifest, seal
from fedlora.runs.listing import describe_run
from fedlora.runs.run_folder import find_differences, read_run, read_training
from fedlora.runs.run_records import Manifest, RunRecord
from fedlora.typed_json import from_json, to_json

RECORDED = Path(__file__).parent / "recorded"
RUN = json.loads((RECORDED / "run.json").read_text(encoding="utf-8"))
MANIFEST = json.loads((RECORDED / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture
def paths(tmp_path):
    (tmp_path / "fedex").mkdir()
    return RunPaths(tmp_path, "fedex")


@pytest.mark.parametrize(("name", "kind"), [("run.json", RunRecord), ("manifest.json", Manifest)])
def test_a_record_of_the_older_commit_is_written_again_to_the_same_bytes(name, kind):
    text = (RECORDED / name).read_text(encoding="utf-8")
    record = to_json(from_json(kind, json.loads(text)))
    assert json_text(record) == text
    assert is_whole(record)
    assert json_text(seal(record)) == text


def test_the_older_run_is_read(paths):
    paths.run_file.write_bytes((RECORDED / "run.json").read_bytes())
    record = read_run(paths)
    assert (record.exp_name, record.mode, record.state, record.num_rounds) == ("fedex", "fedex", "finished", 3)
    assert record.has_global_model is True
    assert record.training_clients == {0: 5, 1: 4, 2: 3, 3: 2}
    assert record.clients[0].num_tokens == 162 + 60
    # it answers by the rule that it was trained under, and a new run of its name has another one
    assert find_differences(record.config, read_training(record)) == []
    assert find_differences(record.config, TrainConfig.of(**record.config)) == ["token_rule: 1 -> 2"]
    assert describe_run(paths).mode == "fedex"


def test_the_older_manifest_is_read_and_known_by_the_hash_of_its_file():
    manifest = read_manifest(RECORDED)
    assert manifest is not None
    assert manifest.sha256 == hashlib.sha256((RECORDED / "manifest.json").read_bytes()).hexdigest()
    assert (manifest.round, manifest.cohort, manifest.quarantined) == (2, [0, 1, 2], [])
    assert manifest.export == {"rank": 20, "relative_error": 0.0}


@pytest.mark.parametrize(
    "change",
    [
        {"added_later": {"a": [1, None]}},
        {"has_global_model": None},
        {"privacy": None},
        {"clients": []},
        {"clients": [{**RUN["clients"][0], "added_later": None}]},
    ],
)
def test_what_another_release_wrote_is_kept_as_it_was(change):
    value = {**RUN, **change}
    assert to_json(from_json(RunRecord, value)) == value
    changed = replace(from_json(RunRecord, value), state="training")
    assert to_json(changed) == {**value, "state": "training"}


def test_a_field_that_is_there_no_more_is_read_without(paths):
    value = {name: each for name, each in RUN.items() if name not in ("has_global_model", "sha256", "adapter")}
    paths.run_file.write_text(json_text(value))
    record = read_run(paths)
    assert record.has_global_model is None
    assert to_json(record) == value


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"mode": 1}, "mode is 1, not text"),
        ({"config": []}, r"config is \[\], not an object"),
        ({"clients": {}}, r"clients is \{\}, not an array"),
        ({"clients": [{**RUN["clients"][0], "num_examples": True}]}, "num_examples is True, not a whole number"),
        ({"clients": [{"client_id": 0}]}, "file is missing"),
        ({"clients": [None]}, "not a JSON object"),
        ({"has_global_model": 1}, "has_global_model is 1, not true or false"),
        ({"reaggregated_from": "x" * 999}, "reaggregated_from is 'xxx"),
    ],
)
def test_a_damaged_field_is_named_with_what_to_do(paths, change, what):
    paths.run_file.write_text(json_text(seal({**RUN, **change})))
    with pytest.raises(UsageError, match=rf"run\.json: not the record of a run: {what}") as caught:
        read_run(paths)
    assert "restore the file" in caught.value.hint
    assert len(str(caught.value)) < 200 + len(str(paths.run_file))


@pytest.mark.parametrize("name", ["exp_name", "state", "versions", "environment", "layout", "clients", "base_dtype"])
def test_a_field_that_a_run_needs_and_lacks_is_named(paths, name):
    paths.run_file.write_text(json_text(seal({key: value for key, value in RUN.items() if key != name})))
    with pytest.raises(UsageError, match=f"not the record of a run: {name} is missing"):
        read_run(paths)


@pytest.mark.parametrize(
    "change",
    [{"round": True}, {"files": []}, {"cohort": None}, {"parent_sha256": 1}, {"limited": {}}, {"base_delta": []}],
)
def test_a_manifest_with_a_damaged_field_is_none(tmp_path, change):
    (tmp_path / "manifest.json").write_text(json_text(seal({**MANIFEST, **change})))
    assert read_manifest(tmp_path) is None
    (tmp_path / "manifest.json").write_text(json_text(seal(MANIFEST)))
    assert read_manifest(tmp_path) == from_json(Manifest, MANIFEST)
