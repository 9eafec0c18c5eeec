"""A run that starts from an adapter of another run: it trains on from exactly that adapter, and keeps its own copy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import make_client_files, make_tiny_model, options_of

import fedlora as fl
from fedlora.config.train import TrainConfig
from fedlora.errors import StorageError, UsageError
from fedlora.federated.adapters import layer_pairs
from fedlora.files import sha256_of
from fedlora.methods.table import METHODS
from fedlora.stages import train

STILL = {"local_learning_rate": 1e-9}
"""Training that moves nothing: a round ends where it started."""


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model_dir with a run `first` of two rounds."""
    root = tmp_path_factory.mktemp("starts")
    make_client_files(root / "data", [4, 4, 4, 4])
    trained(root, tiny_model, exp_name="first", num_communication_rounds=2)
    return root


def trained(root: Path, base: Path, mode: str = "homo", models: Path | None = None, **settings: Any) -> fl.Run:
    options = options_of(mode, base, root / "data", models or root / "models") | {"num_communication_rounds": 1}
    return fl.Run(train.run(TrainConfig.of(**{**options, **settings})).paths)


def copy_of(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "models", tmp_path / "models"))


def losses(run: fl.Run) -> dict[int, float]:
    return {row["round"]: row["val_loss"] for row in run.metrics() if row["kind"] == "round"}


def test_the_first_round_starts_where_the_other_run_ended_and_the_run_needs_that_no_more(place, tiny_model, tmp_path):
    models = copy_of(place, tmp_path)
    how = {"models": models, "init_from": "first/last", "exp_name": "on", **STILL}
    on, first = trained(place, tiny_model, **how), fl.open(models / "first")
    assert losses(on)[1] == pytest.approx(losses(first)[2], rel=1e-5) != pytest.approx(losses(first)[0], rel=1e-3)
    told = on.record.more["init_from"]
    assert told["of"] == "first/2/global"
    assert told["sha256"] == sha256_of(on.folder / "start.safetensors")
    shutil.rmtree(first.folder)
    on.verify(progress=False)
    assert len(trained(place, tiny_model, **how, num_communication_rounds=2)) == 2
    on.verify(progress=False)
    fl.reaggregate(name="on", model_dir=models, leave_out="1", progress=False)


def test_a_resumed_run_with_another_start_is_refused(place, tiny_model, tmp_path):
    models = copy_of(place, tmp_path)
    how = {"models": models, "exp_name": "on"}
    on = trained(place, tiny_model, **how, init_from="first/2")
    with pytest.raises(UsageError, match="init_from: 'first/2' -> 'first/1'"):
        trained(place, tiny_model, **how, init_from="first/1", num_communication_rounds=2)
    (on.folder / "start.safetensors").write_bytes(b"other")
    for again in (
        lambda: trained(place, tiny_model, **how, init_from="first/2", num_communication_rounds=2),
        lambda: on.verify(progress=False),
    ):
        with pytest.raises(StorageError, match="does not match its hash"):
            again()


def test_an_imported_adapter_and_a_client_s_are_starts_too(place, tiny_model, tmp_path):
    models = copy_of(place, tmp_path)
    folder = fl.open(models / "first").export(tmp_path / "out", progress=False).folder
    fl.import_adapter(folder, model=str(tiny_model), name="theirs", model_dir=models, template="chat", progress=False)
    first = losses(fl.open(models / "first"))
    theirs = trained(place, tiny_model, models=models, exp_name="a", init_from="theirs/1", **STILL)
    assert losses(theirs)[1] == pytest.approx(first[2], rel=1e-5)
    of_client = trained(place, tiny_model, models=models, exp_name="b", init_from="first/1/2", **STILL)
    assert of_client.record.more["init_from"]["of"] == "first/1/2"
    own = fl.open(models / "first")[1].adapter(client=2)
    for key, value in of_client[1].adapter().items():
        torch.testing.assert_close(value, own[key], atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_r": 2}, "has rank 4, this run 2"),
        ({"lora_target_modules": "q_proj"}, "adapts more layers"),
        ({"lora_target_modules": "q_proj,v_proj,o_proj"}, "adapts other layers"),
        ({"lora_alpha": 8}, "is scaled by 4, this run by 2"),
        ({"init_from": "first/9"}, "no global adapter; rounds 1-2 have one"),
        ({"init_from": "gone/1"}, "no run of this name"),
        ({"init_from": "first/1/nobody"}, "'nobody' is not in run first"),
        ({"init_from": "first"}, "give NAME/ROUND"),
        ({"mode": "ffa"}, "init_from is not supported with ffa: its clients receive B alone"),
        ({"mode": "hetlora", "client_ranks": "4,2,1,1"}, "leave client_ranks out"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_written(
    place, tiny_model, tmp_path, settings, message
):
    models = copy_of(place, tmp_path)
    with pytest.raises(UsageError, match=message):
        trained(place, tiny_model, models=models, **{"exp_name": "on", "init_from": "first/2", **settings})
    assert not (models / "on" / "run.json").exists()


def test_an_adapter_of_another_base_is_refused(place, tmp_path):
    other = make_tiny_model(tmp_path / "other")
    (other / "generation_config.json").write_text("{}")
    with pytest.raises(UsageError, match="is not the base that run first was trained on"):
        trained(place, other, models=copy_of(place, tmp_path), exp_name="on", init_from="first/2")


def product(run: fl.Run, number: int) -> dict[str, torch.Tensor]:
    state = run[number].adapter()
    return {name: state[b].double() @ state[a].double() for name, (a, b) in layer_pairs(state).items()}


@pytest.mark.thorough
@pytest.mark.parametrize("mode", [row.name for row in METHODS.values() if row.has_global_model])
def test_every_method_either_starts_from_the_adapter_or_says_why_it_cannot(place, tiny_model, tmp_path, mode):
    models = copy_of(place, tmp_path)
    row = METHODS[mode]
    more = {"num_communication_rounds": row.fewest_rounds({}), "optimizer_state": "reset", **STILL}
    more |= {"num_hostile": 0} if row.option("num_hostile") else {}
    how = {"models": models, "exp_name": "on", "init_from": "first/2", "client_selection_frac": 1}
    if mode in ("ffa", "flora"):
        with pytest.raises(UsageError, match="and draw the rest"):
            trained(place, tiny_model, mode, **how, **more)
        return
    run = trained(place, tiny_model, mode, **how, **more)
    # training moves nothing, so the round's model is the one that it started from
    started, ended = product(fl.open(models / "first"), 2), product(run, 1)
    for name, value in started.items():
        torch.testing.assert_close(ended[name], value, atol=1e-4, rtol=1e-3, msg=f"{mode} {name}")
