"""The error meter in a run: what stands in metrics.jsonl, and that an interruption changes none of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedlora.config.train import TrainConfig
from fedlora.federated.adapters import layer_pairs
from fedlora.stages import train

METER = {"aggregation_error", "by_layer", "drift_norm_mean", "drift_cosine_mean", "drift_cosine_pairwise"}


@pytest.fixture
def start(tiny_model, make_clients, tmp_path):
    """Train four small clients for two rounds under a name of one's choice."""
    data = make_clients([3, 2, 4, 3])

    def run(name: str, mode: str, **changes) -> Path:
        options = {
            "exp_name": name,
            "federation_mode": mode,
            "base_model": str(tiny_model),
            "base_dtype": "float32",
            "data_path": data,
            "model_dir": tmp_path / "models",
            "client_selection_strategy": "all",
            "num_communication_rounds": 2,
            "num_clients": 4,
            "local_batch_size": 2,
            "local_num_epochs": 1,
            "local_learning_rate": 1e-2,
            "prompt_template": "chat",
            "device": "cpu",
            **changes,
        }
        return train.run(TrainConfig.of(**options)).root

    return run


def lines(run: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def without_clock(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in ("seconds", "check")} for row in rows]


def test_a_round_s_line_is_what_the_dense_matrices_of_its_files_say(start):
    run = start("run", "homo")
    row = lines(run, "round")[-1]
    assert row.keys() >= METER
    before, made = (torch.load(run / f"{number}/global_adapter_model.bin", weights_only=True) for number in (1, 2))
    ends = [torch.load(run / f"2/client_{client}/adapter_model.bin", weights_only=True) for client in range(4)]
    weights = torch.tensor([3.0, 2.0, 4.0, 3.0], dtype=torch.float64) / 12

    def flat(state):
        pairs = layer_pairs(state).values()
        return torch.cat([(state[b].double() @ state[a].double()).flatten() for a, b in pairs])

    total = weights @ torch.stack([flat(end) for end in ends])
    changes = 4.0 * torch.stack([flat(end) - flat(before) for end in ends])
    mean = weights @ changes
    assert row["aggregation_error"] == pytest.approx(float((total - flat(made)).norm() / total.norm()), rel=1e-6)
    assert row["drift_norm_mean"] == pytest.approx(float(changes.norm(dim=1).mean()), rel=1e-7)
    for client in lines(run, "client")[-4:]:
        change = changes[client["client_id"]]
        assert client["cosine_to_mean"] == pytest.approx(float(change @ mean / change.norm() / mean.norm()), rel=1e-7)
    assert all(name.startswith("model.layers.") for name in row["by_layer"])
    assert len(row["by_layer"]) == len(layer_pairs(made))


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("homo", {"max_update_norm_ratio": 0.9, "max_client_weight": 0.3}),
        ("rolora", {}),
        ("fedadam", {}),
        ("fedsvd", {"client_selection_strategy": "random", "client_selection_frac": 0.5}),
        ("seq", {}),
        ("fedsa", {}),
    ],
)
def test_rounds_that_were_committed_but_not_measured_get_the_same_lines(start, mode, changes):
    run = start("run", mode, **changes)
    measured = run / "metrics.jsonl"
    whole = {kind: without_clock(lines(run, kind)) for kind in ("client", "round")}
    kept = [line for line in measured.read_text().splitlines(True) if json.loads(line)["kind"] == "update"]
    measured.write_text("".join(kept))
    assert start("run", mode, **changes) == run
    assert {kind: without_clock(lines(run, kind)) for kind in ("client", "round")} == whole


def test_a_round_on_damaged_ground_is_measured_without_the_meter(start, capsys):
    run = start("run", "homo")
    before = lines(run, "round")
    text = [line for line in (run / "metrics.jsonl").read_text().splitlines(True) if json.loads(line)["round"] < 2]
    (run / "metrics.jsonl").write_text("".join(text))
    file = run / "1/client_0/adapter_config.json"
    file.write_text(file.read_text() + " ")
    start("run", "homo")
    assert "round 2 has no aggregation error and no drift in the metrics" in capsys.readouterr().err
    row = lines(run, "round")[-1]
    assert not METER & row.keys()
    assert row["loss"] == before[-1]["loss"]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("seq", {"drift_norm_mean"}), ("pooled", {"drift_norm_mean"}), ("none", set()), ("fedsa", set())],
)
def test_what_a_mode_does_not_have_is_not_in_its_lines(start, mode, expected):
    for row in lines(start("run", mode), "round"):
        assert METER & row.keys() == expected


def test_exact_methods_are_exact_in_a_run(start):
    for mode in ("ffa", "rolora", "fedsvd"):
        for row in lines(start(mode, mode), "round"):
            assert row["aggregation_error"] < 1e-6, mode
    assert lines(start("homo", "homo"), "round")[-1]["aggregation_error"] > 1e-3
