import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlora.cli import main
from fedlora.config.plan import PlanConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import DataError, LockedError, StorageError, UsageError
from fedlora.federated.adapters import weighted_mean
from fedlora.files import sha256_of
from fedlora.llm import local_training
from fedlora.methods.table import METHODS
from fedlora.stages import plan, train


@pytest.fixture
def train_mode(tiny_model, make_clients, tmp_path):
    """Train on three small clients (or `sizes`) and return the run's folder."""

    def run(mode: str, sizes=(5, 4, 3), name: str | None = None, data: Path | None = None, **changes) -> Path:
        folder = f"data{'-'.join(map(str, sizes))}"
        place = data or tmp_path / folder
        if not place.exists():
            make_clients(list(sizes), folder)
        options = {
            "exp_name": name or mode,
            "base_model": str(tiny_model),
            "base_dtype": "float32",
            "data_path": place,
            "model_dir": tmp_path / "models",
            "client_selection_frac": 1.0,
            "num_communication_rounds": 2,
            "num_clients": len(sizes),
            "local_batch_size": 2,
            "local_num_epochs": 1,
            "local_learning_rate": 1e-2,
            "prompt_template": "chat",
            "device": "cpu",
            **changes,
        }
        return train.run(TrainConfig.of(federation_mode=mode, **options)).root

    return run


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


RUN_FILES = {"run.json", "metrics.jsonl", "steps.jsonl", ".lock"}
GLOBAL_FILES = {"global_adapter_model.bin", "adapter_model.safetensors", "adapter_config.json", "manifest.json"}
CLIENT_FILES = {"adapter_model.bin", "adapter_config.json", "update.json"}


@pytest.mark.parametrize(
    ("mode", "folders", "has_global"),
    [
        ("homo", ["client_0", "client_1", "client_2"], True),
        ("seq", ["client_0", "client_1", "client_2"], True),
        ("none", ["client_0", "client_1", "client_2"], False),
        ("pooled", ["pooled"], True),
    ],
)
def test_every_mode_leaves_exactly_the_documented_files(train_mode, mode, folders, has_global):
    expected = set(RUN_FILES)
    for number in (1, 2):
        expected |= {f"{number}/{name}" for name in (GLOBAL_FILES if has_global else {"manifest.json"})}
        expected |= {f"{number}/{folder}/{name}" for folder in folders for name in CLIENT_FILES}
    assert tree(train_mode(mode)) == expected


@pytest.mark.parametrize(
    "modes", [("homo", "seq", "pooled", "ditto"), pytest.param(tuple(METHODS), marks=pytest.mark.thorough)]
)
def test_every_mode_takes_the_same_steps_on_the_same_tokens_for_each_model_that_a_client_trains(train_mode, modes):
    totals = set()
    for mode in modes:
        # Krum needs five clients
        rounds = [row for row in metrics(train_mode(mode, sizes=(4, 4, 2, 2, 2))) if row["kind"] == "round"]
        phases = METHODS[mode].num_trainings
        totals.add(tuple(sum(row[name] for row in rounds) / phases for name in ("num_steps", "num_tokens")))
    assert len(totals) == 1


def test_homo_of_one_client_is_seq_of_one_client_is_plain_training_bit_for_bit(train_mode):
    runs = {mode: train_mode(mode, sizes=(5,)) for mode in ("homo", "seq", "none")}
    hashes = {mode: sha256_of(run / "2" / "client_0" / "adapter_model.bin") for mode, run in runs.items()}
    assert len(set(hashes.values())) == 1
    assert sha256_of(runs["homo"] / "2/adapter_model.safetensors") == sha256_of(
        runs["seq"] / "2/adapter_model.safetensors"
    )
    own = adapter(runs["homo"] / "2/client_0/adapter_model.bin")
    shared = adapter(runs["homo"] / "2/global_adapter_model.bin")
    assert all(torch.equal(own[key], shared[key]) for key in own)


def test_the_global_adapter_is_the_mean_of_the_client_files_weighted_by_examples(train_mode):
    run = train_mode("homo")
    clients = [adapter(run / "1" / f"client_{client}" / "adapter_model.bin") for client in range(3)]
    expected = weighted_mean(zip(clients, (5, 4, 3), strict=True))
    found = adapter(run / "1/global_adapter_model.bin")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert any(not torch.equal(clients[0][key], clients[1][key]) for key in expected)


def test_metrics_hold_what_the_report_needs(train_mode, test_file):
    rows = metrics(train_mode("homo", val_data_path=str(test_file)))
    assert rows[0].keys() == {"check", "kind", "round", "val_loss"}
    clients = [row for row in rows if row["kind"] == "client"]
    rounds = [row for row in rows if row["kind"] == "round"][1:]
    assert len(clients) == 6
    assert [row["num_steps"] for row in clients[:3]] == [3, 2, 2]
    assert all(row["update_norm"] > 0 and row["seconds"] > 0 for row in clients)
    size = clients[0]["bytes_up"]
    assert size == 4 * sum(
        value.numel()
        for value in adapter(Path(train_mode("homo", name="again")) / "1/global_adapter_model.bin").values()
    )
    assert rounds[0]["bytes_up"] == rounds[0]["bytes_down"] == 3 * size
    assert rounds[0]["num_tokens"] == sum(row["num_tokens"] for row in clients[:3])
    assert rounds[1]["val_loss"] != rounds[0]["val_loss"] != rows[0]["val_loss"]


def test_nothing_travels_in_none_and_no_adapter_in_pooled(train_mode):
    for mode in ("none", "pooled"):
        rounds = [row for row in metrics(train_mode(mode)) if row["kind"] == "round"]
        assert all(row["bytes_up"] == row["bytes_down"] == 0 for row in rounds)


def test_validation_points_to_the_best_round_and_none_validates_every_client(train_mode, test_file):
    run = train_mode("none", val_data_path=str(test_file))
    rows = metrics(run)
    clients = [row for row in rows if row["kind"] == "client"]
    rounds = [row for row in rows if row["kind"] == "round"][1:]
    assert len({row["val_loss"] for row in clients}) == 6
    means = [sum(row["val_loss"] for row in clients if row["round"] == number) / 3 for number in (1, 2)]
    assert [row["val_loss"] for row in rounds] == pytest.approx(means)
    best = json.loads((run / "run.json").read_text())["best_round"]
    assert best["val_loss"] == min(row["val_loss"] for row in rounds)


def test_a_local_split_is_held_back_from_training(train_mode):
    run = train_mode("homo", sizes=(5, 4), local_val_set_size=2)
    facts = json.loads((run / "run.json").read_text())["clients"]
    assert [(client["num_examples"], client["num_validation"]) for client in facts] == [(3, 2), (2, 2)]
    assert "val_loss" in metrics(run)[0]
    with pytest.raises(DataError, match="leaves none of the client's 2 rows"):
        train_mode("homo", sizes=(5, 2), name="small", local_val_set_size=2)


def test_kept_moments_stay_private_to_the_client(train_mode):
    run = train_mode("homo", optimizer_state="keep")
    assert "1/client_0/private/optimizer.safetensors" in tree(run)
    reset = train_mode("homo", name="reset")
    assert not any("private" in name for name in tree(reset))
    assert sha256_of(run / "1/adapter_model.safetensors") == sha256_of(reset / "1/adapter_model.safetensors")
    assert sha256_of(run / "2/adapter_model.safetensors") != sha256_of(reset / "2/adapter_model.safetensors")


def test_the_manifest_names_every_file_and_its_parent(train_mode):
    run = train_mode("homo")
    parents = []
    for number in (1, 2):
        manifest = json.loads((run / str(number) / "manifest.json").read_text())
        assert set(manifest["files"]) == tree(run / str(number)) - {"manifest.json"}
        for name, facts in manifest["files"].items():
            assert facts["sha256"] == sha256_of(run / str(number) / name)
        parents.append(manifest["parent_sha256"])
    assert parents == [None, sha256_of(run / "1/manifest.json")]


def test_an_absent_client_of_none_is_carried_forward(train_mode):
    run = train_mode("none", client_selection_frac=0.3, num_communication_rounds=6)
    seen: dict[str, str] = {}
    for number in range(1, 7):
        (trained,) = {row["client_id"] for row in metrics(run) if row["kind"] == "client" and row["round"] == number}
        for folder in sorted((run / str(number)).glob("client_*")):
            digest = sha256_of(folder / "adapter_model.bin")
            if folder.name != f"client_{trained}":
                assert digest == seen[folder.name]
            seen[folder.name] = digest
    assert len(seen) > 1


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_run_whose_cohorts_are_single_clients_begins_with_a_warning(train_mode, capsys, share):
    train_mode("homo", client_selection_frac=share, num_communication_rounds=1)
    assert ("warning: a cohort is one of 3 clients" in capsys.readouterr().err) == (share == 0.1)


def test_sizes_of_nought_one_and_many_rows_train_and_the_empty_client_is_never_selected(train_mode, capsys):
    run = train_mode("homo", sizes=(0, 1, 2, 7))
    rows = [row for row in metrics(run) if row["kind"] == "client" and row["round"] == 1]
    assert [row["client_id"] for row in rows] == [1, 2, 3]
    assert [row["num_steps"] for row in rows] == [1, 1, 4]
    assert "client 0 (local_training_0.json) has no row to train on and is never selected" in capsys.readouterr().err


def test_an_existing_run_is_refused_without_overwrite_and_stays_as_it_is(train_mode):
    run = train_mode("homo", num_communication_rounds=1)
    before = {name: sha256_of(run / name) for name in tree(run)}
    with pytest.raises(UsageError, match="a run of this name exists") as caught:
        train_mode("homo", seed=7)
    assert "--overwrite" in caught.value.hint
    assert {name: sha256_of(run / name) for name in tree(run)} == before
    train_mode("homo", seed=7, num_communication_rounds=1, overwrite=True)
    assert sha256_of(run / "1/adapter_model.safetensors") != before["1/adapter_model.safetensors"]


@pytest.mark.parametrize("name", ["notes.txt", "chapter/one.txt", "7/scan.txt"])
def test_a_folder_that_is_not_a_runs_is_never_touched(train_mode, tmp_path, name):
    mine = tmp_path / "models" / "homo" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="holds files that no run writes"):
            train_mode("homo", overwrite=overwrite)
    assert mine.read_text() == "years of work"
    assert tree(tmp_path / "models") == {f"homo/{name}"}


def test_a_file_where_the_models_should_go_is_a_storage_error(train_mode, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="file/homo: "):
        train_mode("homo", model_dir=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_locked_run_is_left_alone(train_mode, tmp_path):
    from filelock import FileLock

    (tmp_path / "models" / "homo").mkdir(parents=True)
    with FileLock(tmp_path / "models/homo/.lock"), pytest.raises(LockedError, match="another process"):
        train_mode("homo")


def test_a_client_that_diverges_is_left_out_and_the_rest_is_as_if_it_were_not_there(train_mode, monkeypatch):
    from fedlora.llm.local_training import Trainer

    original = Trainer.train

    def poisoned(self, phase, examples, *, client_id, **options):
        if client_id == 1:
            phase = replace(phase, start={key: value * float("nan") for key, value in phase.start.items()})
        return original(self, phase, examples, client_id=client_id, **options)

    monkeypatch.setattr(Trainer, "train", poisoned)
    run = train_mode("homo", num_communication_rounds=1)
    manifest = json.loads((run / "1/manifest.json").read_text())
    assert [entry["client_id"] for entry in manifest["quarantined"]] == [1]
    assert "not a number" in manifest["quarantined"][0]["reason"]
    clients = [adapter(run / "1" / f"client_{client}" / "adapter_model.bin") for client in (0, 2)]
    expected = weighted_mean(zip(clients, (5, 3), strict=True))
    found = adapter(run / "1/global_adapter_model.bin")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_wrong_input_stops_before_anything_is_written(train_mode, tmp_path):
    with pytest.raises(UsageError, match="no linear layer is named c_attn"):
        train_mode("homo", lora_target_modules="c_attn")
    with pytest.raises(UsageError, match="no such folder") as caught:
        train_mode("homo", base_model=str(tmp_path / "nowhere"))
    assert "smollm2-135m" in caught.value.hint
    with pytest.raises(UsageError, match="is not a method"):
        TrainConfig.of(federation_mode="fedavg")
    with pytest.raises(UsageError, match="cannot be a folder name"):
        train_mode("homo", name="../elsewhere")
    assert not (tmp_path / "models").exists() or not any((tmp_path / "models").iterdir())


@pytest.mark.parametrize("seeds", [("4711",), pytest.param(("0", "1", "4711"), marks=pytest.mark.thorough)])
def test_processes_with_other_hash_seeds_leave_the_same_bytes(tiny_model, make_clients, tmp_path, seeds):
    data = make_clients([4, 3])
    listings = []
    # this process has a hash seed of its own
    for seed in (None, *seeds):
        models = tmp_path / f"models{seed}"
        command = [sys.executable, "-m", "fedlora", "train", "--exp_name", "x", "--base_model", str(tiny_model)]
        command += [
            "--data_path",
            str(data),
            "--model_dir",
            str(models),
            "--num_clients",
            "2",
            "--num_communication_rounds",
        ]
        command += ["2", "--client_selection_frac", "1", "--local_batch_size", "2", "--local_num_epochs", "1"]
        command += ["--lora_target_modules", "v_proj,q_proj,o_proj", "--optimizer_state", "keep"]
        if seed is None:
            assert main(command[3:]) == 0
        else:
            subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
        files = sorted(tree(models) - {"x/metrics.jsonl", "x/steps.jsonl", "x/.lock"})
        listings.append({name: sha256_of(models / name) for name in files})
    assert all(listing == listings[0] for listing in listings)
    assert len(listings[0]) > 15


def test_a_layout_that_was_reduced_is_on_record_before_the_next_step_and_at_the_end(train_mode, tmp_path, monkeypatch):
    within, seen = local_training.with_less_memory, []

    def layout() -> dict:
        return json.loads((tmp_path / "models" / "short" / "run.json").read_text())["layout"]

    def run_short(*attempt):
        seen.append(layout()["reductions"])
        return within(*attempt)[0], 1024

    monkeypatch.setattr(local_training, "with_less_memory", run_short)
    train_mode("homo", sizes=(4,), name="short", tokens_per_pass=2048)
    kept = [{"round": 1, "client_id": 0, "step": 0, "tokens_per_pass": 1024}]
    assert seen[:2] == [[], kept]
    assert layout() == {"tokens_per_pass": 2048, "gradient_checkpointing": False, "reductions": kept}


@pytest.mark.parametrize("command", [(train.run, TrainConfig), (plan.run, PlanConfig)], ids=["train", "plan"])
def test_what_a_run_cannot_be_is_said_before_a_model_is_looked_for(make_clients, tmp_path, command):
    run, kind = command
    places = {"data_path": make_clients([2] * 5), "model_dir": tmp_path / "models", "num_clients": 5}
    private = ("dp_noise_multiplier", "dp_clip", "dp_example_noise_multiplier", "dp_example_clip")
    impossible = {
        "homo has no proximal_mu": {"proximal_mu": 1},
        "krum needs 7, but a cohort has 5": {"federation_mode": "krum", "num_hostile": 2},
        "trimmed_share=0.1 leaves out no client of 5": {"federation_mode": "trimmed_mean", "trimmed_share": 0.1},
        "names 2 ranks, but there are 5 clients": {"federation_mode": "zeropad", "client_ranks": "4,2"},
        "two guarantees": dict.fromkeys(private, 1),
    }
    for what, flags in impossible.items():
        with pytest.raises(UsageError, match=what):
            run(kind.of(**places, **flags, base_model=str(tmp_path / "no model"), client_selection_frac=1))
