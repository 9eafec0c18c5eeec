import json
import shutil

import pytest
from kinds_of_memory import one_of_each_kind

from fedlora.config.runs import VerifyConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import StorageError, UsageError
from fedlora.files import json_text
from fedlora.runs.checking import describe_files, seal
from fedlora.stages import train, verify


@pytest.fixture
def trained(tiny_model, make_clients, tmp_path):
    """Train three clients for two rounds."""
    data = make_clients([5, 4, 3])

    def run(mode="homo", **changes):
        options = {
            "exp_name": "run",
            "federation_mode": mode,
            "base_model": str(tiny_model),
            "data_path": data,
            "model_dir": tmp_path / "models",
            "client_selection_frac": 0.6,
            "num_communication_rounds": 2,
            "num_clients": 3,
            "local_batch_size": 2,
            "local_num_epochs": 1,
            "local_learning_rate": 1e-2,
            "prompt_template": "chat",
            "optimizer_state": "keep",
            "device": "cpu",
            **changes,
        }
        return train.run(TrainConfig.of(**options)).root

    return run


def check(run) -> str:
    return verify.run(VerifyConfig.of(exp_name=run.name, model_dir=run.parent)).text()


def reseal(run, number, **changes) -> None:
    """Make a round's manifest agree with what lies there now: a change that no hash tells of."""
    folder = run / str(number)
    for record in folder.glob("*/update.json"):
        facts = json.loads(record.read_text())
        files = sorted(path for path in record.parent.rglob("*") if path.is_file() and path != record)
        record.write_text(json_text(seal({**facts, "files": describe_files(record.parent, files)})))
    manifest = json.loads((folder / "manifest.json").read_text())
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    manifest = seal({**manifest, "files": describe_files(folder, files), **changes})
    (folder / "manifest.json").write_text(json_text(manifest))


PLAIN = ("homo", "seq", "none", "pooled")
OTHERS = ("fedadam", "diloco", "scaffold", "ffa", "rolora", "fedsvd", "fedrot", "fedsa", "median", "geometric_median")


@pytest.mark.parametrize("mode", one_of_each_kind(PLAIN + OTHERS))
def test_a_run_is_computed_again_without_its_base_model(trained, tiny_model, mode, monkeypatch):
    share = {"client_selection_frac": 1.0} if "median" in mode else {}
    run = trained(mode, optimizer_state="keep" if mode in PLAIN else "reset", **share)
    monkeypatch.setattr("fedlora.llm.base_model.load_base_model", lambda *_: pytest.fail("the base was loaded"))
    lines = check(run).splitlines()
    expected = ["base model: ok", "round 1: ok", "round 2: ok", "metrics.jsonl: ok"]
    assert [line.split(",")[0] for line in lines] == expected
    assert all("recomputed to the same bytes" in line for line in lines[1:3])


def test_limits_and_left_out_clients_are_computed_again(trained, monkeypatch):
    from fedlora.llm.local_training import Trainer

    original = Trainer.train

    def poisoned(self, start, examples, *, client_id, **options):
        if client_id == 1:
            start = {key: value * float("nan") for key, value in start.items()}
        return original(self, start, examples, client_id=client_id, **options)

    monkeypatch.setattr(Trainer, "train", poisoned)
    run = trained(client_selection_frac=1.0, max_update_norm_ratio=0.9, min_clients=2)
    manifest = json.loads((run / "2/manifest.json").read_text())
    assert manifest["quarantined"]
    assert manifest["limited"]
    check(run)


def test_an_aggregate_that_is_not_the_clients_is_found_though_every_hash_holds(trained):
    run = trained()
    for name in ("adapter_model.safetensors", "global_adapter_model.bin"):
        shutil.copy(run / "1" / name, run / "2" / name)
    reseal(run, 2)
    wrong = r"2/global_adapter_model\.bin is not the aggregate of the clients' files"
    with pytest.raises(StorageError, match=wrong) as raised:
        check(run)
    assert "round 1: ok" in raised.value.result.text()


def test_a_client_s_adapter_that_was_exchanged_is_found_though_every_hash_holds(trained):
    run = trained(client_selection_frac=1.0)
    shutil.copy(run / "2/client_0/adapter_model.bin", run / "2/client_1/adapter_model.bin")
    reseal(run, 2)
    with pytest.raises(StorageError, match=r"client_1/update\.json: the norm of the update is not the one"):
        check(run)


def test_another_cohort_than_the_drawn_one_is_found(trained):
    run = trained(client_selection_frac=0.6)
    manifest = json.loads((run / "2/manifest.json").read_text())
    reseal(run, 2, cohort=[client for client in range(3) if client not in manifest["cohort"]])
    with pytest.raises(StorageError, match=r"cohort is not what the run computes"):
        check(run)


def test_a_carried_adapter_that_was_exchanged_is_found(trained):
    run = trained("none", num_communication_rounds=3)
    carried = [
        path.parent for path in sorted(run.glob("*/*/adapter_model.bin")) if not (path.parent / "update.json").exists()
    ]
    place = carried[-1]
    other = next(path for path in sorted(run.glob("1/*/adapter_model.bin")) if path.parent.name != place.name)
    (place / "adapter_model.bin").unlink()
    shutil.copy(other, place / "adapter_model.bin")
    reseal(run, int(place.parent.name))
    with pytest.raises(StorageError, match=r"from which it was carried forward"):
        check(run)


def test_a_broken_chain_a_missing_round_and_a_stray_file_are_told_together(trained):
    run = trained(num_communication_rounds=3)
    shutil.rmtree(run / "1")
    (run / "3/notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="and 2 more") as raised:
        check(run)
    out = raised.value.result.text()
    for part in ("1 is missing", "2 was not made from the present round 1", "3/notes.txt is not named by the manifest"):
        assert part in out


def test_an_open_round_is_no_fault(trained):
    run = trained()
    (run / "2").rename(run / "2.partial")
    assert "2.partial: open, 2 finished updates are kept" in check(run)


def test_verify_needs_a_run(tmp_path):
    with pytest.raises(UsageError, match="no run of this name"):
        check(tmp_path / "nothing")
