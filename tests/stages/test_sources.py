"""Clients whose rows come in every form that is read: files of all formats, a folder of files, a saved data set."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from saved_data import save

from fedlora.config.data import AllocateConfig
from fedlora.config.evaluate import EvaluateRougeConfig
from fedlora.config.generate import GenerateConfig
from fedlora.config.init import InitRunConfig
from fedlora.config.plan import PlanConfig
from fedlora.config.train import TrainConfig
from fedlora.data.client_facts import read_client_files
from fedlora.data.client_files import find_client_files
from fedlora.data.row_parts import sha256_of_rows
from fedlora.engines.client_data import ClientExamples
from fedlora.errors import DataError, UsageError
from fedlora.llm.base_model import load_base_model
from fedlora.llm.prompts import PromptEncoder
from fedlora.stages import allocate, evaluate_rouge, generate, init, plan, train

Rows = list[dict[str, str]]


def rows_of(client: int) -> Rows:
    return [
        {"instruction": f"say {client} {number}", "input": "", "output": f"o{number}", "category": f"c{client % 2}"}
        for number in range(4)
    ]


def as_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: Rows) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([list(rows[0]), *(row.values() for row in rows)])
    return text.getvalue().encode()


def as_parquet(rows: Rows) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def write_folder(folder: Path, rows: Rows) -> None:
    folder.mkdir()
    (folder / "1.jsonl").write_bytes(as_lines(rows[:3]))
    (folder / "2.csv").write_bytes(as_csv(rows[3:]))


FILES: dict[str, Callable[[Rows], bytes]] = {
    "a.jsonl": as_lines,
    "b.json": lambda rows: json.dumps(rows).encode(),
    "c.csv": as_csv,
    "d.csv.gz": lambda rows: gzip.compress(as_csv(rows)),
    "e.jsonl.zst": lambda rows: pyarrow.compress(as_lines(rows), "zstd", asbytes=True),
    "f.parquet": as_parquet,
}
FORMS: dict[str, Callable[[Path, Rows], Any]] = {
    **{name: lambda path, rows, write=write: path.write_bytes(write(rows)) for name, write in FILES.items()},
    "g": write_folder,
    "h": lambda path, rows: save(path, rows[:1], rows[1:]),
}


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clients, each in another form; test rows of the last two in a folder and in a saved data set."""
    folder = tmp_path_factory.mktemp("forms") / "silos"
    folder.mkdir()
    for client, (name, write) in enumerate(FORMS.items()):
        write(folder / name, rows_of(client))
    tests = [{"instruction": f"asked {number}", "input": "", "output": "o9", "category": "c0"} for number in range(3)]
    write_folder(folder / "g.test", [*tests, tests[0] | {"instruction": "asked 3"}])
    save(folder / "h.test", tests[:1])
    return folder


def options(model: Path, data: Path, root: Path, **more: Any) -> dict[str, Any]:
    return {
        "base_model": str(model),
        "base_dtype": "float32",
        "device": "cpu",
        "data_path": data,
        "model_dir": root / "models",
        "client_selection_frac": 1.0,
        "num_communication_rounds": 1,
        "local_num_epochs": 1,
        "prompt_template": "chat",
        **more,
    }


@pytest.fixture(scope="module")
def trained(tiny_model: Path, silos: Path) -> Path:
    return train.run(TrainConfig.of(exp_name="forms", **options(tiny_model, silos, silos.parent))).root


def test_clients_in_every_form_train_together_as_the_same_rows_in_json_lines_do(silos, trained, tiny_model, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for client, name in enumerate(FORMS):
        (plain / f"{name[0]}.jsonl").write_bytes(as_lines(rows_of(client)))
    expected = train.run(TrainConfig.of(exp_name="plain", **options(tiny_model, plain, tmp_path))).root
    adapter = Path("1") / "adapter_model.safetensors"
    assert (trained / adapter).read_bytes() == (expected / adapter).read_bytes()
    clients = json.loads((trained / "run.json").read_text())["clients"]
    assert [client["file"] for client in clients] == list(FORMS)
    assert [client["num_examples"] for client in clients] == [4] * len(FORMS)
    assert [client["sha256"] for client in clients] == [sha256_of_rows(silos / name) for name in FORMS]


def test_test_rows_in_folders_are_answered_and_scored_under_their_clients_names(silos, trained, tmp_path):
    where = {"model_dir": trained.parent, "prediction_dir": tmp_path, "exp_name": "forms"}
    how = {"max_new_tokens": 2, "device": "cpu", "base_dtype": "float32"}
    (file,) = generate.run(GenerateConfig.of(test_file_path=silos, **where, **how)).files
    asked = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["client"] for line in asked] == ["g"] * 4 + ["h"]
    scores = evaluate_rouge.run(EvaluateRougeConfig.of(target_file=silos, evaluation_dir=tmp_path / "rouge", **where))
    assert scores.scores[0].record["fedlora"]["clients"].keys() == {"g", "h"}


def test_plan_and_init_know_clients_in_folders_by_their_names(silos, tiny_model, tmp_path, capsys):
    made = init.run(InitRunConfig.of(data_path=silos, config_file=tmp_path / "run.yaml"))
    assert list(made.clients) == [name[0] for name in FORMS]
    config = PlanConfig.of(probe=False, **options(tiny_model, silos, tmp_path))
    assert [client["file"] for client in plan.run(config).record["clients"]] == list(FORMS)


@pytest.mark.parametrize("change", ["changed", "added", "gone", "renamed", "all gone"])
def test_a_part_that_changed_during_a_run_is_a_changed_file(silos, tiny_model, tmp_path, change):
    folder = tmp_path / "silos"
    shutil.copytree(silos, folder)
    files = find_client_files(folder, 8, chosen=False)
    config = TrainConfig.of(prompt_template="chat")
    tokenizer = load_base_model(str(tiny_model), device="cpu").tokenizer
    clients = read_client_files(dict(enumerate(files)), config)
    examples = ClientExamples(clients, PromptEncoder(tokenizer, "chat"), config, None)
    part = folder / "g" / "1.jsonl"
    assert len(examples.training(6)) == len(examples.training(7)) == 4
    if change == "changed":
        part.write_bytes(as_lines(rows_of(6)[:2]))
    elif change == "added":
        (folder / "g" / "3.jsonl").write_bytes(as_lines(rows_of(9)))
    elif change == "renamed":
        part.rename(folder / "g" / "01.jsonl")
    elif change == "gone":
        part.unlink()
    else:
        shutil.rmtree(folder / "g")
    with pytest.raises(DataError, match=r"silos/g: changed or gone since the run began"):
        examples.training(6)
    assert len(examples.training(7)) == 4


def test_the_rows_that_a_share_held_out_of_a_folder_are_found_while_its_parts_are_the_same(tiny_model, tmp_path):
    folder = tmp_path / "silos"
    folder.mkdir()
    for client, name in enumerate("gh"):
        write_folder(folder / name, rows_of(client))
    train.run(TrainConfig.of(exp_name="shared", test_share=0.25, **options(tiny_model, folder, tmp_path)))
    where = {"model_dir": tmp_path / "models", "prediction_dir": tmp_path / "predictions", "exp_name": "shared"}
    how = {"max_new_tokens": 2, "device": "cpu", "base_dtype": "float32", "test_file_path": folder}
    (file,) = generate.run(GenerateConfig.of(**where, **how)).files
    assert [json.loads(line)["client"] for line in file.read_text().splitlines()] == ["g", "h"]
    (folder / "h" / "2.csv").unlink()
    with pytest.raises(DataError, match=r"silos/h: not the file that the run was trained on"):
        generate.run(GenerateConfig.of(**where, **how, overwrite=True))


def test_a_saved_data_set_is_divided_among_clients_and_a_folder_of_files_is_not(tmp_path):
    saved = save(tmp_path / "saved", [row for client in range(20) for row in rows_of(client)])
    given = {"output_root": tmp_path / "data", "train_per_cat": 3, "test_per_cat": 1}
    manifest = allocate.run(AllocateConfig.of(input_file=saved, **given)).manifest
    assert manifest["input"] == {"file": "saved", "sha256": sha256_of_rows(saved), "num_rows": 80}
    with pytest.raises(UsageError, match="saved is one file of rows"):
        init.run(InitRunConfig.of(data_path=saved, config_file=tmp_path / "run.yaml"))
    write_folder(tmp_path / "parts", rows_of(0))
    with pytest.raises(UsageError, match="a folder; allocate divides one file of rows"):
        allocate.run(AllocateConfig.of(input_file=tmp_path / "parts", **given))
