"""A run's base model that has moved, is spelled otherwise, or was replaced: every command that works on a run."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from changed_bases import add_one, change_outside_the_sample, change_weights

import fedlora as fl
from fedlora.config.generate import GenerateConfig
from fedlora.config.loss import LossConfig
from fedlora.config.plan import PlanConfig
from fedlora.config.reaggregate import ReaggregateConfig
from fedlora.config.runs import VerifyConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import StorageError, UsageError
from fedlora.files import json_text, sha256_of
from fedlora.paths import RunPaths
from fedlora.runs import recorded_base
from fedlora.runs.checking import seal
from fedlora.runs.run_folder import read_run
from fedlora.stages import generate, loss, plan, reaggregate, train, verify


class World:
    """A base under `base`, a run of two rounds on it, and the same base under `moved`."""

    def __init__(self, root: Path, data: Path, rows: Path) -> None:
        self.root, self.data, self.rows = root, data, rows
        self.base, self.moved = root / "base", root / "moved"

    def options(self, **changes: Any) -> dict[str, Any]:
        return {
            "exp_name": "run",
            "base_model": "./base",
            "data_path": self.data,
            "model_dir": self.root / "models",
            "client_selection_frac": 1.0,
            "num_communication_rounds": 2,
            "num_clients": 2,
            "local_batch_size": 2,
            "local_num_epochs": 1,
            "prompt_template": "chat",
            "device": "cpu",
            **changes,
        }

    def train(self, **changes: Any) -> Path:
        return train.run(TrainConfig.of(**self.options(**changes))).root

    def call(self, stage: Any, config: Any, **fields: Any) -> Any:
        return stage.run(config.of(exp_name="run", model_dir=self.root / "models", **fields))

    def generate(self, **fields: Any) -> Any:
        where = {"test_file_path": self.rows, "prediction_dir": self.root / "predictions", "max_new_tokens": 3}
        return self.call(generate, GenerateConfig, **{**where, "device": "cpu", **fields})

    def loss(self, **fields: Any) -> Any:
        where = {"test_file_path": self.rows, "evaluation_dir": self.root / "results"}
        return self.call(loss, LossConfig, **where, device="cpu", **fields)

    def reaggregate(self, **fields: Any) -> Any:
        where = {"val_data_path": str(self.rows), "new_name": "what-if", "overwrite": True, "weights": "uniform"}
        return self.call(reaggregate, ReaggregateConfig, **where, device="cpu", **fields)

    def verify(self, **fields: Any) -> Any:
        return self.call(verify, VerifyConfig, **fields)

    def move(self) -> None:
        self.base.rename(self.moved)

    def replace(self) -> None:
        """Another base under the same name: the weights of one layer differ."""
        change_weights(self.base, "model.norm.weight", add_one)

    def forget_identity(self) -> None:
        """run.json as an older release wrote it."""
        file = RunPaths(self.root / "models", "run").run_file
        value = {name: each for name, each in json.loads(file.read_text()).items() if name != "base_identity"}
        file.write_text(json_text(seal(value)))


@pytest.fixture
def world(tiny_model, make_clients, test_file, tmp_path, monkeypatch):
    shutil.copytree(tiny_model, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recorded_base, "_told", set())
    world = World(tmp_path, make_clients([3, 2]), test_file)
    world.train()
    return world


def test_run_json_has_the_spelling_that_was_typed_and_the_identity_beside_it(world):
    recorded = json.loads((world.root / "models" / "run" / "run.json").read_text())
    assert recorded["base_model"] == recorded["config"]["base_model"] == "./base"
    assert set(recorded["base_identity"]) == {"configuration", "tokenizer", "weights"}


@pytest.mark.parametrize("spelling", ["base", "./base/", "{root}/base", "{root}/link", "../{name}/base", "~/base"])
def test_a_run_resumes_on_the_same_base_under_another_spelling(world, spelling, monkeypatch):
    monkeypatch.setenv("HOME", str(world.root))
    (world.root / "link").symlink_to(world.base)
    run = world.train(base_model=spelling.format(root=world.root, name=world.root.name), num_communication_rounds=3)
    whole = world.train(exp_name="whole", num_communication_rounds=3)
    for number in ("1", "2", "3"):
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert sha256_of(run / number / name) == sha256_of(whole / number / name)
    recorded = read_run(RunPaths(world.root / "models", "run"))
    assert (recorded.base_model, recorded.config["base_model"]) == ("./base", "./base")
    assert recorded.base_identity == read_run(RunPaths(world.root / "models", "whole")).base_identity is not None
    assert len({json.loads((run / str(n) / "manifest.json").read_text())["config_sha256"] for n in (1, 2, 3)}) == 1


def test_a_base_that_has_moved_is_named_and_everything_goes_on(world):
    before = world.loss().as_dict()
    answers = [file.read_text() for file in world.generate(of=["base", "global"]).files]
    world.move()
    for work in (lambda: world.generate(overwrite=True), world.loss, world.reaggregate):
        with pytest.raises(UsageError, match=r"'\./base': no such folder; run run was trained on '\./base'") as got:
            work()
        assert "--base_model" in got.value.hint
    moved = {"base_model": str(world.moved)}
    assert world.loss(**moved).as_dict() == before
    again = world.generate(of=["base", "global"], prediction_dir=world.root / "again", **moved)
    assert [file.read_text() for file in again.files] == answers
    sidecar = json.loads((world.root / "again/run/2/global_output.meta.json").read_text())
    assert sidecar["base_model"] == "./base"
    assert sidecar["base_identity"] == dict(read_run(RunPaths(world.root / "models", "run")).base_identity or {})
    assert len(world.reaggregate(**moved).rounds) == 2
    assert read_run(RunPaths(world.root / "models", "what-if")).base_identity == sidecar["base_identity"]
    assert world.verify(**moved).text().startswith("base model: ok")
    assert world.verify().text().startswith("base model: not compared, since it is not on this machine")
    resumed = train.run(TrainConfig.of(**world.options(num_communication_rounds=3, **moved)))
    assert f"--model {world.moved}" in resumed.next_command
    assert world.verify(**moved).text().splitlines()[3].startswith("round 3: ok")


def test_answers_of_the_same_base_elsewhere_are_not_answered_twice(world, capsys):
    world.generate()
    world.move()
    world.generate(base_model="./moved")
    world.generate()
    assert capsys.readouterr().err.count("already answered with these settings") == 2


def test_another_base_under_the_same_name_is_refused_with_both_identities(world, monkeypatch):
    monkeypatch.setattr("fedlora.llm.base_model._load", lambda *_: pytest.fail("it was loaded"))
    known = recorded_base.RecordedBase.of(read_run(RunPaths(world.root / "models", "run"))).identity
    world.replace()
    found = recorded_base.find_identity("base")
    for work in (world.generate, world.loss, world.reaggregate, lambda: world.train(num_communication_rounds=3)):
        with pytest.raises(UsageError, match="is not the base that run run was trained on") as got:
            work()
        assert f"its identity is {found}, not {known} (different: weights)" in str(got.value)
        assert "--base_model" in got.value.hint
    with pytest.raises(UsageError, match="is not the base that run run was trained on"):
        plan.run(PlanConfig.of(**world.options(probe=False)))
    with pytest.raises(StorageError, match="is not the base that run run was trained on") as got:
        world.verify()
    lines = getattr(got.value.result, "checked", ())
    assert [what.partition(",")[0] for what, _ in lines[:3]] == [
        "base model: another one",
        "round 1: ok",
        "round 2: ok",
    ]


def test_a_base_that_is_exchanged_while_it_is_loaded_is_refused(world, monkeypatch):
    """As a hub may do, that has a newer revision than its cache."""
    find_folder = recorded_base.find_folder
    monkeypatch.setattr(recorded_base, "find_folder", lambda name: None)
    world.replace()
    for work in (world.generate, world.loss, world.reaggregate, lambda: world.train(num_communication_rounds=3)):
        with pytest.raises(UsageError, match="is not the base that run run was trained on"):
            work()
    assert find_folder("base")


def test_answers_of_another_base_are_not_taken_for_this_ones(world):
    where = {"is_base_model": True, "prediction_dir": world.root / "alone", "prompt_template": "chat"}

    def answer():
        rows = {"test_file_path": world.rows, "max_new_tokens": 3, "device": "cpu", "base_model": "./base"}
        return generate.run(GenerateConfig.of(exp_name="nobody", model_dir=world.root / "none", **where, **rows))

    answer()
    world.replace()
    with pytest.raises(UsageError, match=r"predictions of another base model lie there.*different: weights") as got:
        answer()
    assert "--overwrite" in got.value.hint


def test_a_run_without_an_identity_goes_by_its_name_and_says_so_once(world, capsys):
    world.forget_identity()
    before = (world.root / "models" / "run" / "run.json").read_bytes()
    world.generate(of=["base", "global"])
    world.loss()
    assert capsys.readouterr().err.count("its base is known by its name alone") == 1
    for spelling in ("base", str(world.base)):
        with pytest.raises(UsageError, match=r"was trained on '\./base'"):
            world.generate(base_model=spelling)
        with pytest.raises(UsageError, match=r"base_model: '\./base' -> "):
            world.train(base_model=spelling)
    assert "base model: not compared, since the run is older" in world.verify().text()
    assert (world.root / "models" / "run" / "run.json").read_bytes() == before
    world.train(num_communication_rounds=3)
    assert read_run(RunPaths(world.root / "models", "run")).base_identity is None


def test_every_byte_is_compared_where_it_was_recorded(world):
    with pytest.raises(UsageError, match="records no hash of every byte"):
        world.verify(verify_base=True)
    with pytest.raises(UsageError, match="records no hash of every byte"):
        world.train(verify_base=True, num_communication_rounds=3)
    world.train(overwrite=True, verify_base=True)
    recorded = read_run(RunPaths(world.root / "models", "run"))
    assert recorded.base_identity is not None
    assert "every_byte" in recorded.base_identity
    assert "verify_base" not in recorded.config
    assert world.verify(verify_base=True).text().startswith("base model: ok")
    change_outside_the_sample(world.base)
    assert world.verify().text().startswith("base model: ok")
    with pytest.raises(StorageError, match="different: every byte"):
        world.verify(verify_base=True)
    with pytest.raises(UsageError, match="different: every byte"):
        world.train(verify_base=True, num_communication_rounds=3)
    world.move()
    with pytest.raises(UsageError, match="is not on this machine"):
        world.verify(verify_base=True)


def test_a_loop_over_rounds_may_leave_the_folder_of_its_base(world, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    keywords = world.options(exp_name="loop", model_dir="models", data_path="data", progress=False)
    loop = fl.rounds(**keywords)
    os.chdir(tmp_path / "elsewhere")
    assert [each.number for each in loop] == [1, 2]
    os.chdir(tmp_path)
    assert read_run(RunPaths(Path("models"), "loop")).base_model == "./base"
    resumed = fl.rounds(**{**keywords, "num_communication_rounds": 3})
    os.chdir(tmp_path / "elsewhere")
    assert [each.number for each in resumed] == [3]
    assert list(tmp_path.glob("elsewhere/*")) == []


@pytest.mark.thorough
def test_a_worker_of_a_further_device_loads_the_base_where_it_lies_now(world):
    whole = world.train(exp_name="whole", num_communication_rounds=3)
    world.move()
    run = world.train(base_model=str(world.moved), num_communication_rounds=3, device=None, devices="cpu,cpu")
    assert sha256_of(run / "3" / "adapter_model.safetensors") == sha256_of(whole / "3" / "adapter_model.safetensors")
