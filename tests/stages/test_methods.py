"""Every method through the whole of training: what it trains, what travels, what it remembers over an interruption."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from kinds_of_memory import one_of_each_kind
from method_properties import PROPERTIES
from tiny_run import make_client_files

from fedlora.config.runs import VerifyConfig
from fedlora.config.train import TrainConfig
from fedlora.engines.rounds import FederatedRun
from fedlora.errors import UsageError
from fedlora.files import sha256_of
from fedlora.methods.choosing import choose_method, load_method
from fedlora.methods.table import METHODS
from fedlora.runs.server_state import load_groups
from fedlora.stages import train, verify

NEW = tuple(METHODS)[4:]


def stored_groups(mode: str) -> set[str]:
    """What lies in a round's state.safetensors: a server's slots, and its adapter where the round's is another."""
    method = METHODS[mode]
    has_own = method.adds_to_base or (method.combines and not method.has_global_model)
    return set(PROPERTIES[mode].slots) | ({"adapter"} if has_own else set())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_client_files(tmp_path_factory.mktemp("methods"), [3, 2, 4, 3, 2])


def train_in(folder: Path, data: Path, model: Path, name: str, mode: str, **changes) -> Path:
    options = {
        "exp_name": name,
        "federation_mode": mode,
        "base_model": str(model),
        "base_dtype": "float32",
        "data_path": data,
        "model_dir": folder,
        "client_selection_strategy": "all",
        "num_communication_rounds": 3,
        "num_clients": 5,
        "local_batch_size": 2,
        "local_num_epochs": 1,
        "local_learning_rate": 1e-2,
        "prompt_template": "chat",
        "device": "cpu",
        **changes,
    }
    return train.run(TrainConfig.of(**options)).root


@pytest.fixture
def start(tiny_model, data, tmp_path):
    """Train five small clients for three rounds under a name of one's choice."""
    return lambda name, mode, **changes: train_in(tmp_path / "models", data, tiny_model, name, mode, **changes)


@pytest.fixture(scope="module")
def finished(tiny_model, data, tmp_path_factory):
    """(a finished run of three rounds that no test may change, how often it flushed), once for each method."""
    folder, made = tmp_path_factory.mktemp("finished"), {}

    def find(mode: str) -> tuple[Path, int]:
        if mode not in made:
            with pytest.MonkeyPatch.context() as patch:
                calls = count_flushes(patch)
                run = train_in(folder, data, tiny_model, mode, mode)
            made[mode] = (run, len(calls))
        return made[mode]

    return find


def count_flushes(patch) -> list[int]:
    flush, calls = os.fsync, []
    patch.setattr(os, "fsync", lambda descriptor: (calls.append(1), flush(descriptor)))
    return calls


def hashes(run: Path) -> dict[str, str]:
    return {
        path.relative_to(run).as_posix(): sha256_of(path)
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.parent != run and path.name != "manifest.json"
    }


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("mode", one_of_each_kind(NEW))
def test_a_method_is_verified_and_resumes_to_the_bytes_of_an_unbroken_run(start, finished, mode, monkeypatch):
    whole, flushes = finished(mode)
    verify.run(VerifyConfig.of(exp_name=mode, model_dir=whole.parent))
    expected = hashes(whole)
    assert ("2/state.safetensors" in expected) == bool(stored_groups(mode))
    flush = os.fsync

    class CrashError(BaseException):
        pass

    # in the middle of the second round, and right behind it
    for share in (0.45, 0.7):
        left = iter(range(int(flushes * share), 0, -1))

        def crashing(descriptor: int, left=left) -> None:
            if next(left) == 1:
                raise CrashError
            flush(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", crashing)
            with pytest.raises(CrashError):
                start(f"broken{share}", mode)
        assert hashes(start(f"broken{share}", mode)) == expected


@pytest.mark.parametrize("mode", one_of_each_kind(sorted(filter(stored_groups, METHODS))))
def test_what_a_server_remembers_lies_in_the_round(finished, mode):
    run, _ = finished(mode)
    for number in (1, 2):
        assert load_groups(run / f"{number}/state.safetensors").keys() == stored_groups(mode)
        assert "state.safetensors" in json.loads((run / f"{number}/manifest.json").read_text())["files"]


@pytest.mark.parametrize("mode", one_of_each_kind(NEW))
def test_run_json_tells_the_hyperparameters_and_whether_there_is_a_global_model(finished, mode):
    run, _ = finished(mode)
    facts = json.loads((run / "run.json").read_text())
    assert facts["hyperparameters"] == load_method(mode).hyperparameters
    assert (
        facts["has_global_model"]
        == load_method(mode).has_global_model
        == (run / "1/global_adapter_model.bin").is_file()
    )


def count(state, half: str) -> int:
    return sum(value.numel() for key, value in state.items() if f".lora_{half}." in key)


def travelling(run: Path, mode: str, number: int) -> tuple[str, str] | None:
    """Factors down and up in a round, as the method's row of promises says; None where the base has grown, for that is
    counted in test_base_deltas.py."""
    promises, method = PROPERTIES[mode], METHODS[mode]
    if method.pools_rows:
        return "", ""
    if method.adds_to_base and number > 1:
        return None
    chosen = choose_method(TrainConfig.of(**json.loads((run / "run.json").read_text())["config"]))
    shares = None if chosen.server.asks_everybody(number) else promises.of_round(promises.shares, number)
    halves = {"both": "AB", "A": "A", "B": "B", None: ""}
    times = 2 if promises.keeps_control else 1
    return times * halves[promises.of_round(promises.travels, number)], times * halves[shares]


@pytest.mark.parametrize("mode", one_of_each_kind(METHODS))
def test_the_bytes_on_the_way_are_those_of_the_factors_that_travel(start, finished, mode):
    run = start(mode, mode, prune_to=1.0) if mode == "hetlora" else finished(mode)[0]
    clients = sorted((run / "1").glob("client_*/adapter_model.bin")) or [run / "1/global_adapter_model.bin"]
    state = adapter(clients[0])
    rank = 2 if mode == "feddpa" else 1
    sizes = {half: 4 * count(state, half) // rank for half in "AB"}
    for row in metrics(run):
        if row["kind"] == "round" and row["round"] and (travels := travelling(run, mode, row["round"])):
            down, up = (sum(sizes[half] for half in halves) for halves in travels)
            assert (row["bytes_down"], row["bytes_up"]) == (5 * down, 5 * up)


def test_ffa_leaves_a_alone_and_rolora_changes_one_factor_a_round(finished):
    ffa, ro = (
        [adapter(finished(mode)[0] / f"{number}/global_adapter_model.bin") for number in (1, 2, 3)]
        for mode in ("ffa", "rolora")
    )

    def moved(before, after) -> str:
        return "".join(
            half
            for half in "AB"
            if any(not torch.equal(before[key], after[key]) for key in before if f".lora_{half}." in key)
        )

    assert [moved(*pair) for pair in itertools.pairwise(ffa)] == ["B", "B"]
    assert [moved(*pair) for pair in itertools.pairwise(ro)] == ["A", "B"]


def test_without_its_term_a_method_is_fedavg_bit_for_bit(start, finished):
    expected = sha256_of(finished("homo")[0] / "3/adapter_model.safetensors")
    assert sha256_of(start("prox", "fedprox", proximal_mu=0.0) / "3/adapter_model.safetensors") == expected
    assert sha256_of(start("far", "fedprox", proximal_mu=1.0) / "3/adapter_model.safetensors") != expected


def test_a_strong_pull_keeps_clients_near_the_global_adapter(start):
    steep = {"local_optimizer": "sgd", "local_num_epochs": 4}
    norms = {
        mu: max(row["update_norm"] for row in metrics(run) if row["kind"] == "client")
        for mu in (0.0, 100.0)
        if (run := start(f"mu{mu}", "fedprox", proximal_mu=mu, num_communication_rounds=1, **steep))
    }
    assert norms[100.0] < 0.7 * norms[0.0]


def test_sgd_takes_plain_steps(start, monkeypatch):
    """One step of SGD moves by the rate times the clipped gradient: twice the rate, twice the way."""
    norms = []
    for rate in (1e-3, 2e-3):
        options = {"local_optimizer": "sgd", "local_batch_size": 8, "local_learning_rate": rate, "lora_dropout": 0.0}
        run = start(f"rate{rate}", "homo", num_communication_rounds=1, **options)
        norms.append([row["update_norm"] for row in metrics(run) if row["kind"] == "client"])
    assert norms[1] == pytest.approx([2 * norm for norm in norms[0]], rel=1e-4)


def test_scaffold_starts_as_fedavg_and_then_corrects(start, finished):
    plain = start("homo", "homo", client_selection_frac=1.0, max_client_weight=0.2)
    corrected, _ = finished("scaffold")
    first, last = (
        [sha256_of(run / f"{number}/adapter_model.safetensors") for run in (plain, corrected)] for number in (1, 3)
    )
    a, b = (adapter(run / "1/global_adapter_model.bin") for run in (plain, corrected))
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a), "all controls are zero in the first round"
    assert last[0] != last[1]
    assert len(first) == 2


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"federation_mode": "homo", "server_momentum": 0.5}, "homo has no server_momentum"),
        ({"federation_mode": "fedavgm", "proximal_mu": 0.5}, "fedavgm has no proximal_mu"),
        ({"federation_mode": "krum", "max_client_weight": 0.5}, "the same weight"),
        ({"federation_mode": "diloco", "max_client_weight": 0.5}, "the same weight"),
        ({"federation_mode": "rolora", "optimizer_state": "keep"}, "other factors than a client left"),
        ({"federation_mode": "fedsvd", "optimizer_state": "keep"}, "other factors than a client left"),
        ({"federation_mode": "scaffold", "max_update_norm": 1.0}, "sends more than an adapter"),
    ],
)
def test_combinations_that_cannot_be_right_are_refused(changes, what):
    with pytest.raises(UsageError, match=what):
        choose_method(TrainConfig.of(**changes))


def test_where_diloco_weighs_by_examples_a_limit_on_weights_holds(start):
    examples = {"server_weights": "examples", "client_selection_frac": 1.0}
    run, limited = start("run", "diloco", **examples), start("limited", "diloco", **examples, max_client_weight=0.2)
    # five clients of at most a fifth weigh the same
    uniform = start("uniform", "diloco", client_selection_frac=1.0)
    one, other, same = (adapter(folder / "1/global_adapter_model.bin") for folder in (run, limited, uniform))
    assert any(not torch.equal(one[key], same[key]) for key in one)
    assert all(torch.allclose(other[key], same[key], rtol=0, atol=1e-6) for key in one)


def test_a_flag_reaches_the_half_that_has_it(start):
    mode = choose_method(TrainConfig.of(federation_mode="fedadam", server_learning_rate=0.5, server_tau=0.25))
    assert (mode.server.server_learning_rate, mode.server.server_tau) == (0.5, 0.25)
    assert choose_method(TrainConfig.of(federation_mode="fedprox", proximal_mu=0.5)).client.proximal_mu == 0.5
    fast, slow = (
        start(f"rate{rate}", "fedadam", server_learning_rate=rate, num_communication_rounds=1) for rate in (1e-2, 1e-4)
    )
    assert sha256_of(fast / "1/adapter_model.safetensors") != sha256_of(slow / "1/adapter_model.safetensors")


def test_a_cohort_too_small_for_krum_is_refused_before_any_training(start):
    with pytest.raises(UsageError, match="krum needs 7, but a cohort has 5 of the 5 clients"):
        start("few", "krum", num_hostile=2)


@pytest.mark.parametrize(
    ("mode", "options", "why"),
    [
        ("multi_krum", {"krum_selected": 5}, "krum_selected=5 of 5 clients is more than the 4 that are not hostile"),
        ("trimmed_mean", {"trimmed_share": 0.1}, "trimmed_share=0.1 leaves nobody out of 5 clients"),
        (
            "median",
            {"client_selection_strategy": "random", "client_selection_frac": 0.4},
            "median needs 3, but a cohort has 2 of the 5 clients",
        ),
    ],
)
def test_options_that_would_break_a_robust_method_s_promise_are_refused_before_any_training(start, mode, options, why):
    with pytest.raises(UsageError, match=why):
        start("weak", mode, **options)


def test_fedsa_clients_keep_their_own_b(finished):
    run, _ = finished("fedsa")
    clients = [adapter(run / f"3/client_{client}/adapter_model.bin") for client in range(5)]
    keys = [key for key in clients[0] if ".lora_B." in key]
    assert any(not torch.equal(clients[0][key], clients[1][key]) for key in keys)


def test_the_loop_asks_a_strategy_for_what_each_round_sends(start, monkeypatch):
    seen = []
    make_tasks = FederatedRun._make_tasks

    def watch(self, context, wave):
        tasks = make_tasks(self, context, wave)
        seen.extend((task.round, task.download.trainable) for task in tasks)
        return tasks

    monkeypatch.setattr(FederatedRun, "_make_tasks", watch)
    start("run", "rolora")
    assert set(seen) == {(1, "B"), (2, "A"), (3, "B")}


def test_kept_moments_go_on_where_the_factors_are_those_a_client_left(start, finished):
    kept, reset = (
        run / "3/adapter_model.safetensors"
        for run in (start("keep", "ffa", optimizer_state="keep"), finished("ffa")[0])
    )
    assert sha256_of(kept) != sha256_of(reset)
    assert sha256_of(kept.parents[1] / "1" / kept.name) == sha256_of(reset.parents[1] / "1" / reset.name)
