"""Private runs as a whole: their secret, cohorts of nobody, what is spent, interruption and verification."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from kinds_of_memory import one_of_each_kind

from fedlora.config.plan import PlanConfig
from fedlora.config.runs import VerifyConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import BudgetError, TrainingError, UsageError
from fedlora.federated.privacy.accountant import epsilon
from fedlora.federated.privacy.randomness import Secret
from fedlora.files import sha256_of
from fedlora.llm.adapter_files import load_adapter, read_shapes
from fedlora.stages import plan, train, verify

CLIENT = {"dp_noise_multiplier": 0.5, "dp_clip": 0.05, "client_selection_frac": 0.3}
EXAMPLE = {"dp_example_noise_multiplier": 0.5, "dp_example_clip": 0.5, "client_selection_frac": 0.7}
SECRET = Secret(bytes(range(22, 54)))
"""With it the first cohorts of three clients at a rate of 0.3 are nobody, one client, nobody."""


class CrashError(BaseException):
    """Ends a run from inside; not an Exception, so that nothing on the way takes it for its own."""


@pytest.fixture
def secrets_folder(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "secrets"
    monkeypatch.setenv("FEDLORA_SECRETS", str(folder))
    return folder


@pytest.fixture
def start(tiny_model, make_clients, tmp_path, secrets_folder, monkeypatch):
    """Train three small clients for three rounds under a folder of one's choice, with the same secret every time."""
    monkeypatch.setattr(Secret, "draw", classmethod(lambda cls: SECRET))
    data = make_clients([5, 4, 3])

    def run(folder: str = "models", mode: str = "homo", **changes) -> Path:
        options = {
            "exp_name": "run",
            "federation_mode": mode,
            "base_model": str(tiny_model),
            "base_dtype": "float32",
            "data_path": data,
            "model_dir": tmp_path / folder,
            "num_communication_rounds": 3,
            "num_clients": 3,
            "local_batch_size": 2,
            "local_num_epochs": 1,
            "local_learning_rate": 1e-2,
            "local_val_set_size": 1,
            "prompt_template": "chat",
            **({} if "devices" in changes else {"device": "cpu"}),
            **changes,
        }
        return train.run(TrainConfig.of(**options)).root

    return run


def manifest(run: Path, number: int) -> dict:
    return json.loads((run / str(number) / "manifest.json").read_text())


def hashes(run: Path) -> dict[str, str]:
    return {
        path.relative_to(run).as_posix(): sha256_of(path)
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.parent != run
    }


def rounds_of(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "round" and row["round"] > 0]


def global_adapter(run: Path, number: int) -> dict[str, torch.Tensor]:
    file = run / str(number) / "global_adapter_model.bin"
    return load_adapter(file, read_shapes(file))


def check(run: Path) -> str:
    return verify.run(VerifyConfig.of(exp_name=run.name, model_dir=run.parent)).text()


@pytest.mark.parametrize("mode", one_of_each_kind(["homo", "fedsvd", "fedadam", "fedsa", "ditto", "feddpa"]))
def test_rounds_of_nobody_are_committed_counted_and_verified(start, mode):
    run = start("models", mode, **CLIENT)
    cohorts = [manifest(run, number)["cohort"] for number in (1, 2, 3)]
    assert [len(cohort) for cohort in cohorts] == [0, 1, 0]
    for number in (1, 2, 3):
        privacy = manifest(run, number)["privacy"]
        assert (privacy["unit"], privacy["rounds"], privacy["rate"]) == ("client", number, 0.3)
        assert privacy["epsilon"] == pytest.approx(epsilon(0.3, 0.5, number, 1e-5), abs=1e-4)
    assert [row["loss"] is None for row in rounds_of(run)] == [True, False, True]
    assert [row["privacy"]["epsilon"] for row in rounds_of(run)] == [
        manifest(run, number)["privacy"]["epsilon"] for number in (1, 2, 3)
    ]
    assert check(run).count("recomputed to the same bytes") == 3


def test_a_round_of_nobody_moves_the_adapter_by_noise(start):
    run = start(**CLIENT)
    before, after = global_adapter(run, 2), global_adapter(run, 3)
    moved = torch.cat([(after[key] - before[key]).flatten() for key in before])
    assert float(moved.std()) == pytest.approx(0.5 * 0.05 / (0.3 * 3), rel=0.1)


def test_clients_beyond_the_clip_count_no_more_than_it(start):
    run = start(**{**CLIENT, "dp_noise_multiplier": 0.0, "client_selection_frac": 1.0, "num_communication_rounds": 1})
    records = [json.loads(path.read_text()) for path in sorted(run.glob("1/client_*/update.json"))]
    assert all(record["metrics"]["update_norm"] > 0.05 for record in records)
    start_run = start("zero", num_communication_rounds=1, local_learning_rate=1e-12)
    before, after = global_adapter(start_run, 1), global_adapter(run, 1)
    norm = sum(float((after[key].double() - before[key].double()).square().sum()) for key in after) ** 0.5
    assert 0 < norm <= 0.05 * (1 + 1e-5)
    assert manifest(run, 1)["privacy"]["epsilon"] is None


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("homo", CLIENT),
        pytest.param("fedsvd", {**CLIENT, "client_selection_frac": 0.7}, marks=pytest.mark.thorough),
        ("homo", EXAMPLE),
    ],
)
def test_a_private_run_that_ends_anywhere_goes_on_to_the_same_bytes_and_the_same_epsilon(
    start, mode, flags, monkeypatch
):
    start("first", mode, **flags)
    flush, calls = os.fsync, []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (calls.append(1), flush(descriptor)))
        expected = hashes(start("whole", mode, **flags))
    for number, call in enumerate(range(0, len(calls), max(1, len(calls) // 3))):
        count = iter(range(10**9))

        def crashing(descriptor: int, count=count, call=call) -> None:
            if next(count) == call:
                raise CrashError
            flush(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", crashing)
            with pytest.raises(CrashError):
                start(f"broken{number}", mode, **flags)
        again = hashes(start(f"broken{number}", mode, **flags))
        # the manifests among them hold what is spent
        assert again == expected, f"flush {call}"


def test_the_secret_is_for_its_owner_only_away_from_the_run_and_told_nowhere_in_it(start, secrets_folder):
    run = start(**CLIENT)
    (file,) = secrets_folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.stem == json.loads((run / "run.json").read_text())["privacy"]["secret_id"]
    shown = (SECRET.content, SECRET.content.hex().encode(), str(list(SECRET.content)).encode())
    for path in run.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(text in content for text in shown), path


def test_every_new_run_has_a_secret_of_its_own(start, monkeypatch, secrets_folder):
    monkeypatch.undo()
    os.environ["FEDLORA_SECRETS"] = str(secrets_folder)
    try:
        one, other = (start(name, **CLIENT) for name in ("one", "other"))
    finally:
        del os.environ["FEDLORA_SECRETS"]
    assert len(list(secrets_folder.iterdir())) == 2
    assert hashes(one)["3/adapter_model.safetensors"] != hashes(other)["3/adapter_model.safetensors"]


@pytest.mark.parametrize("flags", [CLIENT, EXAMPLE])
@pytest.mark.parametrize("fault", ["missing", "open", "another"])
def test_without_its_secret_a_run_does_not_go_on(start, secrets_folder, fault, flags):
    run = start(**flags)
    before = hashes(run)
    (file,) = secrets_folder.iterdir()
    if fault == "missing":
        file.unlink()
    elif fault == "open":
        file.chmod(0o644)
    else:
        file.write_text("00" * 32 + "\n")
    with pytest.raises(UsageError, match=r"the secret of this run"):
        start(**flags, **{"num_communication_rounds": 5})
    assert hashes(run) == before


def test_verify_without_the_secret_looks_at_the_files_and_says_what_it_could_not_do(start, secrets_folder):
    run = start(**CLIENT)
    (file,) = secrets_folder.iterdir()
    file.unlink()
    with pytest.raises(UsageError, match="no round was recomputed") as raised:
        check(run)
    assert raised.value.result.text().count("not computed again without the run's secret") == 3


def test_verify_of_example_level_privacy_needs_no_secret(start, secrets_folder):
    run = start(**EXAMPLE)
    next(iter(secrets_folder.iterdir())).unlink()
    assert check(run).count("recomputed to the same bytes") == 3


def test_verify_finds_an_epsilon_that_was_written_smaller(start):
    from fedlora.files import json_text
    from fedlora.runs.checking import seal

    run = start(**CLIENT)
    facts = manifest(run, 3)
    facts["privacy"]["epsilon"] /= 2
    (run / "3" / "manifest.json").write_text(json_text(seal(facts)))
    with pytest.raises(Exception, match="privacy is not what the run computes"):
        check(run)


def test_the_limit_ends_a_run_before_the_round_and_a_higher_one_lets_it_go_on(start):
    limit = epsilon(0.3, 0.5, 2, 1e-5) + 0.01
    with pytest.raises(BudgetError, match="round 3 would bring the client-level epsilon"):
        start(**CLIENT, max_epsilon=limit)
    run = start(**CLIENT, max_epsilon=100.0)
    assert [row["round"] for row in rounds_of(run)] == [1, 2, 3]
    assert hashes(run)["3/adapter_model.safetensors"] == hashes(start("free", **CLIENT))["3/adapter_model.safetensors"]


def test_a_limit_below_the_first_round_trains_nothing(start, tmp_path):
    with pytest.raises(BudgetError, match="round 1"):
        start(**CLIENT, max_epsilon=0.01)
    assert not [entry for entry in (tmp_path / "models" / "run").iterdir() if entry.is_dir()]


def test_more_rounds_go_on_counting(start):
    start(**CLIENT)
    run = start(**CLIENT, num_communication_rounds=4)
    assert manifest(run, 4)["privacy"]["rounds"] == 4
    assert manifest(run, 4)["privacy"]["epsilon"] == pytest.approx(epsilon(0.3, 0.5, 4, 1e-5), abs=1e-4)


def test_a_client_level_run_without_noise_and_bound_is_the_uniform_mean(start):
    """Of clients with equal rows plain FedAvg is the uniform mean; here the private sum of everybody must be it."""
    free = {"dp_noise_multiplier": 0.0, "dp_clip": 1e9, "client_selection_frac": 1.0, "num_communication_rounds": 1}
    private = start("private", **free)
    files = [path / "adapter_model.bin" for path in sorted((private / "1").glob("client_*"))]
    clients = [load_adapter(file, read_shapes(file)) for file in files]
    assert len(clients) == 3
    for key, value in global_adapter(private, 1).items():
        mean = sum(client[key].double() for client in clients) / 3
        assert torch.allclose(value.double(), mean, rtol=0, atol=1e-7)


def test_a_round_whose_whole_cohort_fails_ends_the_run(start, monkeypatch):
    from fedlora.engines.simulation import SimulatedClients
    from fedlora.types import ClientFailure

    monkeypatch.setattr(
        SimulatedClients, "train_one", lambda self, task: ClientFailure(task.client_id, "diverged", "planned")
    )
    with pytest.raises(TrainingError, match="round 2: no client gave a usable update"):
        start(**CLIENT)


@pytest.mark.parametrize("mode", one_of_each_kind(["homo", "seq", "none", "scaffold", "median"]))
def test_example_level_privacy_counts_each_client_s_steps(start, mode, capsys):
    run = start("models", mode, **EXAMPLE)
    spent = manifest(run, 3)["privacy"]
    steps = dict.fromkeys(map(str, range(3)), 0)
    for number in (1, 2, 3):
        for client in manifest(run, number)["cohort"]:
            steps[str(client)] += {0: 2, 1: 2, 2: 1}[client]
            record = json.loads((run / str(number) / f"client_{client}" / "update.json").read_text())
            assert record["num_steps"] == {0: 2, 1: 2, 2: 1}[client]
    assert spent["steps"] == {client: count for client, count in steps.items() if count}
    rates = {"0": 2 / 4, "1": 2 / 3, "2": 1.0}
    costs = [epsilon(rates[client], 0.5, count, 1e-5) for client, count in spent["steps"].items()]
    assert spent["epsilon"] == pytest.approx(max(costs), abs=1e-4)
    assert spent["unit"] == "example"
    check(run)


def refuse_client_one(monkeypatch) -> None:
    """The server refuses what client 1 sends in round 2, after it has trained."""
    from fedlora.engines import arriving

    find = arriving.find_update_fault

    def refuse(update, task, *args, **options):
        if (task.round, task.client_id) == (2, 1):
            return "refused on purpose"
        return find(update, task, *args, **options)

    monkeypatch.setattr(arriving, "find_update_fault", refuse)


def test_an_update_that_was_sent_and_refused_is_counted_at_example_level(start, monkeypatch):
    everybody = {**EXAMPLE, "client_selection_frac": 1.0}
    whole = start("whole", **everybody)
    refuse_client_one(monkeypatch)
    run = start("refused", **everybody)
    assert [entry["client_id"] for entry in manifest(run, 2)["quarantined"]] == [1]
    for number in (1, 2, 3):
        spent, wanted = manifest(run, number)["privacy"], manifest(whole, number)["privacy"]
        assert (spent["steps"], spent["epsilon"]) == (wanted["steps"], wanted["epsilon"])
        assert spent.get("refused") == ([1] if number == 2 else None)
    check(run)
    # resuming after the round in which it was refused counts the same
    again = start("refused", **everybody, num_communication_rounds=4)
    assert manifest(again, 4)["privacy"]["steps"] == {"0": 8, "1": 8, "2": 4}
    check(again)


def test_a_round_from_before_refused_updates_were_counted_is_verified_as_it_was_counted(start, monkeypatch):
    from fedlora.engines.private_run import PrivateRun

    refuse_client_one(monkeypatch)
    with monkeypatch.context() as before:
        before.setattr(PrivateRun, "spend", lambda self, spent, used, failures: self.budget.spend(spent, sorted(used)))
        run = start("old", **{**EXAMPLE, "client_selection_frac": 1.0})
    assert manifest(run, 3)["privacy"]["steps"] == {"0": 6, "1": 4, "2": 3}
    check(run)


def test_example_level_privacy_stops_at_its_limit_too(start):
    with pytest.raises(BudgetError, match="example-level epsilon"):
        start(**EXAMPLE, max_epsilon=1.0)


def test_warnings_and_spending_are_said(start, capsys):
    start(**CLIENT)
    said = capsys.readouterr().err
    assert "client-level privacy over 3 clients" in said
    assert "must not be published" in said
    assert said.count("client-level epsilon") >= 4
    assert "empty cohort" in said


@pytest.mark.parametrize("flags", [CLIENT, EXAMPLE])
def test_a_private_run_can_be_planned(start, tiny_model, tmp_path, make_clients, flags, secrets_folder):
    made = plan.run(
        PlanConfig.of(
            **flags,
            max_epsilon=1.0,
            base_model=str(tiny_model),
            data_path=make_clients([5, 4, 3]),
            num_clients=3,
            local_batch_size=2,
            num_communication_rounds=3,
            prompt_template="chat",
            model_dir=tmp_path / "models",
            device="cpu",
        )
    )
    said, record = made.text(), made.record
    assert (
        f"level epsilon {record['privacy']['epsilon']:.4g} at delta 1e-05 after all rounds: above max_epsilon=1" in said
    )
    assert not secrets_folder.exists()
    # at example level the plan counts every client in every round, the most there can be
    run = start(**flags)
    spent = manifest(run, 3)["privacy"]["epsilon"]
    assert record["privacy"]["epsilon"] >= spent > 1.0
    assert flags is EXAMPLE or record["privacy"]["epsilon"] == spent


@pytest.mark.thorough
def test_a_worker_on_another_device_draws_from_the_same_secret(start):
    alone, together = (
        start(name, **EXAMPLE, **more) for name, more in (("alone", {}), ("two", {"devices": "cpu,cpu"}))
    )
    files = [name for name in hashes(alone) if name.endswith((".safetensors", ".bin"))]
    assert {name: hashes(together)[name] for name in files} == {name: hashes(alone)[name] for name in files}
