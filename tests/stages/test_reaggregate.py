"""What-ifs from stored updates: without a client, with other weights, by another server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fedlora.config.generate import GenerateConfig
from fedlora.config.reaggregate import ReaggregateConfig
from fedlora.config.runs import VerifyConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import StorageError, UsageError
from fedlora.federated.adapters import make_adapter, weighted_mean
from fedlora.files import json_text, sha256_of
from fedlora.runs.checking import seal
from fedlora.stages import generate, reaggregate, train, verify

ROWS = (3, 2, 4)


@pytest.fixture(scope="module")
def plain() -> dict[str, Path]:
    """Where the one run lies that most tests only read."""
    return {}


@pytest.fixture
def start(tiny_model, make_clients, tmp_path, tmp_path_factory, plain):
    """Train three small clients for two rounds; returns the run's folder."""
    data = make_clients(list(ROWS))

    def run(mode: str = "homo", name: str = "run", **changes) -> Path:
        if (mode, name, changes) == ("homo", "run", {}):
            if not plain:
                folder = tmp_path_factory.mktemp("plain")
                shutil.copytree(run(name="run", seed=42), folder / "run")
                plain["run"] = folder / "run"
            return Path(shutil.copytree(plain["run"], tmp_path / "models/run", dirs_exist_ok=True))
        options = {
            "exp_name": name,
            "federation_mode": mode,
            "base_model": str(tiny_model),
            "base_dtype": "float32",
            "data_path": data,
            "model_dir": tmp_path / "models",
            "client_selection_strategy": "all",
            "num_communication_rounds": 2,
            "num_clients": 3,
            "local_batch_size": 2,
            "local_num_epochs": 1,
            "local_learning_rate": 1e-2,
            "prompt_template": "chat",
            "device": "cpu",
            **changes,
        }
        return train.run(TrainConfig.of(**options)).root

    return run


def ask(run: Path, new_name: str = "", **fields) -> Path:
    return ask_all(run, new_name=new_name, **fields).root


def ask_all(run: Path, **fields) -> reaggregate.Reaggregated:
    return reaggregate.run(ReaggregateConfig.of(exp_name=run.name, model_dir=run.parent, device="cpu", **fields))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "global_adapter_model.bin", weights_only=True)


def ends(run: Path, number: int) -> list[dict[str, torch.Tensor]]:
    return [torch.load(run / f"{number}/client_{k}/adapter_model.bin", weights_only=True) for k in range(len(ROWS))]


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def close(one, other, tolerance: float = 1e-6) -> bool:
    near = [torch.allclose(one[key], other[key], rtol=0, atol=tolerance) for key in one]
    return one.keys() == other.keys() and all(near)


@pytest.mark.parametrize("mode", ["homo", "fedprox", "ffa", "rolora", "fedsvd", "fedrot", "ditto", "feddpa"])
def test_the_run_s_own_weights_give_the_bytes_of_the_run(start, mode):
    run = start(mode)
    new = ask(run, weights="examples")
    for number in (1, 2):
        for name in ("adapter_model.safetensors", "global_adapter_model.bin", "adapter_config.json"):
            assert sha256_of(new / f"{number}/{name}") == sha256_of(run / f"{number}/{name}")
        facts = json.loads((new / f"{number}/reaggregated.json").read_text())
        assert facts["distance"] == 0.0


def test_the_weights_of_diloco_are_its_option_s(start):
    run = start("diloco", "weighted", server_weights="examples")
    same, heavy = ask(run, "same", weights="examples"), ask(run, "heavy", weights="0:9,1:1,2:1")
    assert all(equal(adapter(same / str(number)), adapter(run / str(number))) for number in (1, 2))
    assert not close(adapter(heavy / "1"), adapter(run / "1"))
    other = ask(start("homo"), "other", federation_mode="diloco", server_weights="examples", weights="uniform")
    assert json.loads((other / "1/reaggregated.json").read_text())["distance"] > 0


@pytest.mark.parametrize("mode", ["fedavgm", "fedadam", "diloco"])
def test_a_server_that_the_run_had_goes_on_from_its_own_memory(start, mode):
    run = start(mode)
    changes = {"server_learning_rate": {"fedavgm": 1.0, "fedadam": 1e-3, "diloco": 0.7}[mode]}
    new = ask(run, **changes)
    assert all(equal(adapter(new / str(number)), adapter(run / str(number))) for number in (1, 2))


def test_another_server_remembers_its_own_steps_along_the_actual_path(start):
    """FedAvgM by hand: the velocity of round 2 holds what it saw in round 1; the start is the actual one."""
    run = start()
    new = ask(run, federation_mode="fedavgm", server_momentum=0.5)
    first = adapter(run / "1")
    means = [weighted_mean(list(zip(ends(run, number), ROWS, strict=True))) for number in (1, 2)]
    assert close(adapter(new / "1"), first, 1e-7), "from rest the first step is the mean"
    untrained = make_adapter({key: tuple(value.shape) for key, value in first.items()}, 42)
    velocity = {key: 0.5 * (means[0][key] - untrained[key]) + (means[1][key] - first[key]) for key in first}
    assert close(adapter(new / "2"), {key: first[key] + velocity[key] for key in first})


def test_leaving_out_a_client_is_the_mean_of_the_others_from_the_actual_start(start):
    run = start()
    new = ask(run, leave_out="1")
    for number in (1, 2):
        sent = ends(run, number)
        assert equal(adapter(new / str(number)), weighted_mean([(sent[0], 3), (sent[2], 4)]))
        facts = json.loads((new / f"{number}/reaggregated.json").read_text())
        assert facts["counts"] == {"0": 3, "2": 4}
        assert facts["distance"] > 0
        assert facts["changed"]["leave_out"] == [1]
        assert facts["source"]["actual_adapter_sha256"] == sha256_of(run / f"{number}/adapter_model.safetensors")
        assert facts["source"]["updates_sha256"] == {
            f"client_{k}/adapter_model.bin": sha256_of(run / f"{number}/client_{k}/adapter_model.bin") for k in (0, 2)
        }
        manifest = json.loads((new / f"{number}/manifest.json").read_text())
        assert "reaggregated.json" in manifest["files"]


@pytest.mark.parametrize(
    ("weights", "expected"), [("uniform", (1, 1, 1)), ("0:1,1:0.25,2:2.5", (4, 1, 10)), ("tokens", None)]
)
def test_other_weights_are_those_of_the_mean(start, weights, expected):
    run = start()
    new = ask(run, weights=weights)
    if expected is None:
        expected = [json.loads((run / f"1/client_{k}/update.json").read_text())["num_tokens"] for k in range(3)]
    assert equal(adapter(new / "1"), weighted_mean(list(zip(ends(run, 1), expected, strict=True))))


def test_updates_of_one_factor_can_go_to_a_server_that_sums_both(start):
    run = start("ffa")
    new = ask(run, federation_mode="fedavgm", server_momentum=0.0)
    assert all(close(adapter(new / str(number)), adapter(run / str(number))) for number in (1, 2))


def test_the_limits_of_a_run_hold_in_its_what_ifs(start):
    run = start(max_update_norm_ratio=0.5, max_client_weight=0.4)
    new = ask(run, weights="examples")
    assert equal(adapter(new / "2"), adapter(run / "2"))
    free = ask(start(name="free"), weights="examples")
    assert not equal(adapter(free / "1"), adapter(new / "1"))


def test_a_robust_run_can_be_averaged_after_all(start):
    run = start("median")
    new = ask(run, federation_mode="homo")
    assert equal(adapter(new / "1"), weighted_mean(list(zip(ends(run, 1), ROWS, strict=True))))


def test_the_updates_of_a_run_of_means_can_go_to_a_robust_server(start):
    """Coordinate median by hand; the run's cap on weights says nothing of a server without weights."""
    run = start(max_client_weight=0.4)
    new = ask(run, "median", federation_mode="median")
    for number in (1, 2):
        sent = ends(run, number)
        expected = {key: torch.stack([one[key] for one in sent]).median(dim=0).values for key in sent[0]}
        assert close(adapter(new / str(number)), expected, 1e-7)
    krum = ask(run, "krum", federation_mode="krum", num_hostile=0)
    assert any(close(adapter(krum / "1"), one, 1e-7) for one in ends(run, 1))


@pytest.mark.thorough
@pytest.mark.parametrize("target", ["median", "trimmed_mean", "krum", "multi_krum", "geometric_median"])
@pytest.mark.parametrize("source", ["homo", "fedprox", "fedadam", "ffa", "rolora", "fedsvd", "fedrot", "ditto", "krum"])
def test_every_robust_server_takes_the_updates_of_every_method_that_sends_one_adapter(start, source, target):
    hostile = {"num_hostile": 0} if "krum" in target else {}
    new = ask(start(source, **({"num_hostile": 0} if source == "krum" else {})), federation_mode=target, **hostile)
    assert all(torch.isfinite(value).all() for value in adapter(new / "2").values())


def rename(run: Path, names: list[str]) -> None:
    """As if the clients' files had these names."""
    facts = json.loads((run / "run.json").read_text())
    for client, name in zip(facts["clients"], names, strict=True):
        client["file"] = name
    (run / "run.json").write_text(json_text(seal(facts)))


def test_clients_are_named_by_their_files(start):
    run = start()
    rename(run, ["library.csv", "2.json", "town hall.jsonl.gz"])
    by_name, by_number = ask_all(run, leave_out="library", new_name="one"), ask(run, "two", leave_out="0")
    assert equal(adapter(by_name.root / "1"), adapter(by_number / "1"))
    assert "without library" in by_name.text().splitlines()[0]
    assert by_name.origin["changed"]["leave_out"] == [0]
    weighed = ask_all(run, leave_out="library", weights="town hall:3,2:1", new_name="three")
    assert equal(adapter(weighed.root / "1"), weighted_mean([(ends(run, 1)[1], 1), (ends(run, 1)[2], 3)]))
    assert "2:1, town hall:3" in weighed.text() or "town hall:3, 2:1" in weighed.text()
    with pytest.raises(UsageError, match="weights has none for client 2") as caught:
        ask(run, weights="library:1,town hall:2")
    assert "name every client" in caught.value.hint
    with pytest.raises(UsageError, match="no client 'bank'") as caught:
        ask(run, leave_out="bank")
    assert caught.value.hint == "its clients are library, 2, town hall"


def test_every_client_is_left_out_in_turn_in_one_table(start, test_file):
    run = start(val_data_path=str(test_file))
    rename(run, ["library.csv", "museum.csv", "school.csv"])
    before = sorted(run.parent.rglob("*"))
    each = ask_all(run, leave_out="each", val_data_path=str(test_file), base_dtype="float32")
    assert sorted(run.parent.rglob("*")) == before, "only adapters that can be named are written"
    lines = each.as_dict()["clients"]
    assert [(line["name"], line["num_examples"]) for line in lines] == [("library", 3), ("museum", 2), ("school", 4)]
    for line in lines:
        single = ask_all(
            run, leave_out=line["name"], overwrite=True, val_data_path=str(test_file), base_dtype="float32"
        )
        for one, other in zip(line["rounds"], single.rounds, strict=True):
            assert one["distance"] == other["distance"]
            assert (one["actual_val_loss"], one["val_loss"]) == (other["actual_val_loss"], other["val_loss"])
        assert line["distance"] == pytest.approx(sum(one["distance"] for one in single.rounds) / 2)
        assert line["val_loss"] == pytest.approx(sum(one["val_loss"] for one in single.rounds) / 2)
    rows = [line.split() for line in each.text().splitlines()]
    (museum,) = [row for row in rows if row[:1] == ["museum"]]
    assert museum[1:4] == ["2", "2", f"{lines[1]['distance']:.4f}"]
    assert json.loads(json.dumps(each.as_dict())) == json.loads(json_text(each.as_dict()))


def test_a_client_counts_in_the_rounds_that_it_took_part_in(start):
    run = start(client_selection_strategy="random", client_selection_frac=0.5, num_communication_rounds=3)
    cohorts = [json.loads((run / f"{number}/manifest.json").read_text())["cohort"] for number in (1, 2, 3)]
    lines = ask_all(run, leave_out="each").as_dict()["clients"]
    for line in lines:
        took_part = [number for number, cohort in enumerate(cohorts, 1) if line["client"] in cohort]
        assert [one["round"] for one in line["rounds"]] == took_part
        assert (line["distance"] is None) == (not took_part)


def test_another_server_remembers_what_each_leaving_out_made_of_it(start):
    run = start()
    each = ask_all(run, leave_out="each", federation_mode="fedavgm", server_momentum=0.5).as_dict()["clients"]
    one = ask_all(run, leave_out="2", federation_mode="fedavgm", server_momentum=0.5)
    assert [line["distance"] for line in one.as_dict()["rounds"]] == [line["distance"] for line in each[2]["rounds"]]


def test_a_round_that_nobody_is_left_in_stays_where_it_began(start):
    run = start(client_selection_strategy="random", client_selection_frac=0.1)
    cohort = json.loads((run / "2/manifest.json").read_text())["cohort"]
    new = ask_all(run, leave_out=str(cohort[0]))
    assert equal(adapter(new.root / "2"), adapter(run / "1"))
    (row,) = [line.split() for line in new.text().splitlines() if line.startswith("2 ")]
    assert row[:3] == ["2", "0", "1.0000"], "the distance from the actual result is the whole step"


def test_held_out_losses_stand_side_by_side(start, test_file):
    run = start(val_data_path=str(test_file))
    new = ask_all(run, leave_out="0", val_data_path=str(test_file), base_dtype="float32")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    known = {row["round"]: row["val_loss"] for row in rows if row["kind"] == "round"}
    lines = json.loads((new.root / "run.json").read_text())["reaggregated_from"]["rounds"]
    assert list(new.rounds) == lines
    for line in lines:
        assert line["actual_val_loss"] == pytest.approx(known[line["round"]], rel=1e-6)
        assert line["val_loss"] != line["actual_val_loss"]
    out = new.text()
    assert "held-out loss, actual" in out
    assert f"{lines[0]['val_loss']:.4f}" in out
    assert "what-if of one round" in out


def test_generate_answers_with_what_came_out(start, test_file, tmp_path):
    new = ask(start(), leave_out="1", new_name="without")
    config = {"model_dir": new.parent, "test_file_path": test_file, "device": "cpu", "max_new_tokens": 4}
    (file,) = generate.run(
        GenerateConfig.of(exp_name="without", communication_rounds=2, prediction_dir=tmp_path / "answers", **config)
    ).files
    assert len(file.read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("mode", "fields", "what"),
    [
        ("none", {"weights": "uniform"}, "its clients send nothing"),
        ("seq", {"leave_out": "1"}, "starts from what the one before left"),
        ("pooled", {"leave_out": "1"}, "there is one update"),
        ("fedsa", {"weights": "uniform"}, "there is no global model"),
        ("scaffold", {"leave_out": "1"}, "carry control variates"),
        ("krum", {"leave_out": "1"}, "krum, round 1 without client 1: it needs 5 updates and has 2"),
        ("homo", {"federation_mode": "multi_krum"}, "multi_krum, round 1: it needs 5 updates and has 3"),
        ("homo", {"federation_mode": "median", "leave_out": "each"}, "without client 0: it needs 3 updates"),
        ("homo", {"federation_mode": "median", "weights": "uniform"}, "gives every client the same weight"),
        ("homo", {"federation_mode": "trimmed_mean", "trimmed_share": 0.1}, "round 1: trimmed_share=0.1 "),
        ("homo", {"federation_mode": "fedprox"}, "how clients train"),
        ("homo", {"federation_mode": "scaffold"}, "carry control variates"),
        ("homo", {"federation_mode": "diloco", "weights": "uniform"}, "gives every client the same weight"),
        ("homo", {"server_momentum": 0.5}, "homo has no server_momentum"),
        ("homo", {"leave_out": "7"}, "the run has no client '7'"),
        ("homo", {"leave_out": "library"}, "the run has no client 'library'"),
        ("homo", {"weights": "0:1,1:2"}, "weights has none for client 2"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_the_reason(start, mode, fields, what):
    run = start()
    facts = json.loads((run / "run.json").read_text())
    facts["config"]["federation_mode"] = mode
    (run / "run.json").write_text(json_text(seal(facts)))
    with pytest.raises(UsageError, match=what):
        ask(run, **fields)
    assert not run.with_name("run-what-if").exists()


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({}, "nothing is changed"),
        ({"leave_out": "each,1"}, "each stands for every client in turn"),
        ({"leave_out": "each", "new_name": "all"}, "writes no adapter"),
        ({"weights": "more"}, "give examples, tokens, uniform"),
        ({"weights": "0:1,0:2"}, "named twice"),
        ({"weights": "0:1,1:0"}, "name that client in leave_out"),
        ({"federation_mode": "best"}, "is not a method"),
    ],
)
def test_flags_that_say_nothing_or_nonsense_are_refused(fields, what):
    with pytest.raises(UsageError, match=what):
        ReaggregateConfig.of(**fields)


def test_a_what_if_is_not_taken_for_a_run(start, capsys):
    run = start()
    new = ask(run, leave_out="1")
    before = {path: sha256_of(path) for path in sorted(new.rglob("*")) if path.is_file()}
    with pytest.raises(UsageError, match="holds what `fedlora reaggregate` made of run run"):
        start(name=new.name)
    with pytest.raises(UsageError, match="holds what"):
        verify.run(VerifyConfig.of(exp_name=new.name, model_dir=new.parent))
    with pytest.raises(UsageError, match="no updates"):
        ask(new, weights="uniform")
    with pytest.raises(UsageError, match="an earlier reaggregate"):
        ask(run, leave_out="1")
    with pytest.raises(UsageError, match="is the run itself"):
        ask(run, leave_out="1", new_name="run", overwrite=True)
    other = start(name="other")
    with pytest.raises(UsageError, match="a run of this name exists"):
        ask(run, leave_out="1", new_name="other", overwrite=True)
    assert (other / "2").is_dir()
    assert {path: sha256_of(path) for path in sorted(new.rglob("*")) if path.is_file()} == before
    assert ask(run, leave_out="1", overwrite=True) == new
    assert {path: sha256_of(path) for path in sorted(new.rglob("*")) if path.is_file()} == before


def test_a_damaged_update_is_not_used(start):
    run = start()
    file = run / "2/client_1/adapter_model.bin"
    content = bytearray(file.read_bytes())
    content[-200] ^= 1
    file.write_bytes(content)
    with pytest.raises(StorageError, match="does not match its hash"):
        ask(run, weights="uniform")
    # what was broken off is begun anew
    content[-200] ^= 1
    file.write_bytes(content)
    assert (ask(run, weights="uniform") / "2").is_dir()
