"""Adapters of other programs become runs that answer as these programs would, and no file of theirs runs code."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import make_client_files, options_of

import fedlora as fl
from fedlora.config.importing import ImportConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.files import sha256_of
from fedlora.stages import import_adapter, train


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model_dir with one run of two rounds, whose round folders are those of the reference project."""
    root = tmp_path_factory.mktemp("trained")
    data = make_client_files(root / "data", [3, 3])
    options = options_of("homo", tiny_model, data, root / "models") | {"num_clients": 2, "num_communication_rounds": 2}
    train.run(TrainConfig.of(**{**options, "client_selection_frac": 1, "prompt_template": "alpaca"}))
    return root / "models"


def taken(folder: Path, base: Path, models: Path, **settings: Any) -> fl.Run:
    """The run that an import makes."""
    fields = {"folder": folder, "base_model": str(base), "model_dir": models, "exp_name": "theirs", **settings}
    return fl.Run(import_adapter.run(ImportConfig.of(**fields)).paths)


def loss_of(run: fl.Run, rows: Path, results: Path) -> float:
    where = {"name": run.name, "model_dir": run.folder.parent, "test": rows, "evaluation_dir": results}
    return fl.loss(**where, base_dtype="float32", progress=False).losses[0].overall.loss


def answers(run: fl.Run, of: str | int, number: int) -> Any:
    return run.answer(["say north 1", "say gold"], of=of, round=number, max_new_tokens=6, progress=False)


def test_rounds_of_the_reference_project_answer_as_they_did_and_count_from_1(trained, tiny_model, tmp_path):
    theirs = tmp_path / "theirs"
    for number in (1, 2):
        source = trained / "run" / str(number)
        for name in ("global_adapter_model.bin", "adapter_config.json", "client_1/adapter_model.bin"):
            target = theirs / str(number - 1) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target)
    run = taken(theirs, tiny_model, tmp_path / "models")
    before = fl.open(trained / "run")
    for number, who in ((1, "global"), (2, "global"), (2, 1)):
        assert answers(run, who, number) == answers(before, who, number)
    origin = run.record.imported_from or {}
    assert (origin["layout"], origin["rounds"]) == ("reference project", {"1": 0, "2": 1})
    assert origin["files"]["1/client_1/adapter_model.bin"] == sha256_of(theirs / "1/client_1/adapter_model.bin")
    assert run.record.base_identity == before.record.base_identity
    assert "finished, 2 of 2 rounds" in str(run)


def test_shepherd_s_rounds_have_one_configuration_above_them_and_the_name_of_the_adapter_in_every_key(
    trained, tiny_model, tmp_path
):
    source, theirs = trained / "run" / "2", tmp_path / "theirs"
    state = load_file(source / "adapter_model.safetensors")
    for number in ("0", "1"):
        (theirs / number).mkdir(parents=True)
        live = {key.replace(".weight", ".default.weight"): value.half() for key, value in state.items()}
        torch.save(live, theirs / number / "adapter_model.bin")
    shutil.copy(source / "adapter_config.json", theirs)
    run = taken(theirs, tiny_model, tmp_path / "models")
    assert (run.record.imported_from or {})["layout"] == "Shepherd"
    found = run[2].adapter()
    assert found.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(found[key], value.half().float(), rtol=0, atol=0)


def test_an_export_is_imported_again_to_the_same_answers_scores_and_loss(trained, tiny_model, tmp_path):
    before = fl.open(trained / "run")
    folder = before.export(tmp_path / "out", progress=False).folder
    run = taken(folder, tiny_model, tmp_path / "models")
    assert answers(run, "global", 1) == answers(before, "global", 2)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "say north", "input": "", "output": "north", "category": "c"}) + "\n")
    told = run.generate(rows, prediction_dir=tmp_path / "predictions", max_new_tokens=4, progress=False)
    scored = told.score(rows, evaluation_dir=tmp_path / "scores")
    assert 0 <= scored["global"].measures["chrf"].mean <= 1
    assert loss_of(run, rows, tmp_path / "losses") == loss_of(before, rows, tmp_path / "losses")


def test_an_imported_run_is_not_trained_verified_or_reaggregated(trained, tiny_model, tmp_path):
    taken(trained / "run" / "1", tiny_model, tmp_path / "models")
    data = make_client_files(tmp_path / "data", [3, 3])
    options = options_of("homo", tiny_model, data, tmp_path / "models") | {"num_clients": 2, "exp_name": "theirs"}
    for refused in (
        lambda: train.run(TrainConfig.of(**options)),
        lambda: fl.verify(name="theirs", model_dir=tmp_path / "models"),
        lambda: fl.reaggregate(name="theirs", model_dir=tmp_path / "models", weights="uniform"),
    ):
        with pytest.raises(UsageError, match="took over, and no updates") as caught:
            refused()
        assert "init_from theirs/last" in caught.value.hint
    with pytest.raises(UsageError, match="imported adapters, whose training is not known"):
        fl.report(names=["theirs"], model_dir=tmp_path / "models", report_dir=tmp_path / "reports")
    with pytest.raises(UsageError, match="an earlier import of this name exists"):
        taken(trained / "run" / "1", tiny_model, tmp_path / "models")
    taken(trained / "run" / "2", tiny_model, tmp_path / "models", overwrite=True)


class Planted:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def damage(folder: Path, mark: Path, kind: str) -> None:
    file = folder / "adapter_model.bin"
    (folder / "adapter_model.safetensors").unlink()
    state = torch.load(folder / "global_adapter_model.bin", weights_only=True)
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Planted(mark)))
    elif kind == "planted":
        torch.save({**state, "planted": Planted(mark)}, file)
    elif kind == "shape":
        torch.save({key: value.repeat(2, 2) for key, value in state.items()}, file)
    elif kind == "missing":
        torch.save(dict(list(state.items())[1:]), file)
    elif kind == "nan":
        torch.save({key: value * float("nan") for key, value in state.items()}, file)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pickle", "not a readable adapter"),
        ("planted", "not a readable adapter"),
        ("shape", "adapter_model.bin"),
        ("missing", "adapter_model.bin"),
        ("nan", "adapter_model.bin"),
    ],
)
def test_files_that_are_no_adapters_of_the_base_are_refused_and_nothing_is_unpickled_or_written(
    trained, tiny_model, tmp_path, kind, message
):
    shutil.copytree(trained / "run" / "1", tmp_path / "theirs")
    damage(tmp_path / "theirs", tmp_path / "mark", kind)
    with pytest.raises(UsageError, match=message):
        taken(tmp_path / "theirs", tiny_model, tmp_path / "models")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_what_is_missing_is_named(trained, tiny_model, tmp_path):
    folder = trained / "run" / "1"
    with pytest.raises(UsageError, match="base_model is not given") as caught:
        taken(folder, "", tmp_path / "models", base_model="")
    assert str(tiny_model) in caught.value.hint
    with pytest.raises(UsageError, match="no such folder"):
        taken(tmp_path / "gone", tiny_model, tmp_path / "models")
    with pytest.raises(UsageError, match="holds no adapter"):
        taken(tmp_path, tiny_model, tmp_path / "models")
    assert not list(tmp_path.iterdir())
