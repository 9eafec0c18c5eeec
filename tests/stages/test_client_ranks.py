"""Runs whose clients have different ranks: what is trained, stored, read by others, counted, verified and resumed."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from kinds_of_memory import one_of_each_kind

from fedlora.config.generate import GenerateConfig
from fedlora.config.runs import VerifyConfig
from fedlora.config.train import TrainConfig
from fedlora.data.client_files import find_client_files
from fedlora.federated.adapters import num_bytes
from fedlora.federated.ranks import cut_rank, rank_of_adapter
from fedlora.files import sha256_of
from fedlora.llm.adapter_config import load_spec
from fedlora.llm.base_model import load_base_model
from fedlora.llm.lora import LoraModel
from fedlora.methods.choosing import choose_method
from fedlora.methods.fedavg import TrainAndSend
from fedlora.planning.forecast import Work, draw_waves, forecast_run
from fedlora.runs.server_state import load_groups
from fedlora.runs.space import estimate_round_bytes
from fedlora.stages import generate, train, verify
from fedlora.types import Upload

RANKS = (4, 3, 2, 1, 2)


@pytest.fixture
def start(tiny_model, make_clients, tmp_path):
    """Train five small clients of different ranks for three rounds, three of them in each."""
    data = make_clients([3, 2, 4, 3, 2])

    def options(mode: str, **changes) -> dict:
        return {
            "exp_name": mode,
            "federation_mode": mode,
            "base_model": str(tiny_model),
            "base_dtype": "float32",
            "data_path": data,
            "model_dir": tmp_path / "models",
            "client_selection_frac": 0.6,
            "num_communication_rounds": 3,
            "num_clients": 5,
            "client_ranks": ",".join(map(str, RANKS)),
            "local_batch_size": 2,
            "local_num_epochs": 1,
            "local_learning_rate": 1e-2,
            "prompt_template": "chat",
            "device": "cpu",
            **changes,
        }

    def run(mode: str, **changes) -> Path:
        return train.run(TrainConfig.of(**options(mode, **changes))).root

    run.options = options
    return run


def check(run: Path) -> None:
    verify.run(VerifyConfig.of(exp_name=run.name, model_dir=run.parent))


def hashes(run: Path) -> dict[str, str]:
    return {
        path.relative_to(run).as_posix(): sha256_of(path)
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.parent != run and path.name != "manifest.json"
    }


def metrics(run: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def adapter(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def client_folders(run: Path) -> list[tuple[int, Path]]:
    return [(int(path.name.removeprefix("client_")), path) for path in sorted(run.glob("*/client_*"))]


@pytest.mark.parametrize("mode", one_of_each_kind(["zeropad", "hetlora", "flexlora", "flora", "none"]))
def test_a_run_of_different_ranks_is_verified_and_resumes_to_the_bytes_of_an_unbroken_one(start, mode, monkeypatch):
    flush, calls = os.fsync, []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (calls.append(1), flush(descriptor)))
        whole = start(mode)
    check(whole)
    crash_at = int(len(calls) * 0.55)
    calls.clear()

    class CrashError(BaseException):
        pass

    def crashing(descriptor: int) -> None:
        calls.append(1)
        if len(calls) == crash_at:
            raise CrashError
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", crashing)
        with pytest.raises(CrashError):
            start(mode, exp_name="broken")
    broken = start(mode, exp_name="broken")
    assert hashes(broken) == hashes(whole)
    check(broken)


@pytest.mark.parametrize("mode", ["zeropad", pytest.param("flexlora", marks=pytest.mark.thorough), "flora", "none"])
def test_every_client_leaves_an_adapter_of_its_own_rank_and_the_common_scaling(start, mode):
    run = start(mode, lora_alpha=10.0, client_selection_strategy="all")
    assert {client for client, _ in client_folders(run)} == set(range(5))
    for client, folder in client_folders(run):
        spec = load_spec(folder / "adapter_config.json")
        assert spec.r == rank_of_adapter(adapter(folder / "adapter_model.bin")) == RANKS[client]
        assert spec.scaling == pytest.approx(2.5, rel=1e-15)
    if mode != "none":
        spec = load_spec(run / "3/adapter_config.json")
        assert spec.scaling == pytest.approx(2.5, rel=1e-15)
        # what flora leaves is a stack of all clients and rounds
        assert spec.r == 4 or mode == "flora"
        assert rank_of_adapter(adapter(run / "3/global_adapter_model.bin")) == spec.r


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_a_client_s_adapter_as_we_do(start, tiny_model, rslora):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = start("zeropad", num_communication_rounds=1, use_rslora=rslora, client_selection_strategy="all")
    ids = torch.arange(3, 30)[None]
    ours = LoraModel(
        load_base_model(str(tiny_model), device="cpu", dtype="float32").model,
        load_spec(run / "1/adapter_config.json"),
    )
    for client in (1, 3):
        folder = run / f"1/client_{client}"
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(folder)).eval()
        ours.set_adapter(adapter(folder / "adapter_model.bin"))
        with torch.no_grad():
            torch.testing.assert_close(ours.model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_bytes_are_those_of_each_client_s_rank_and_the_forecast_knows_them(start):
    run = start("flexlora", client_selection_frac=0.8)
    whole = adapter(run / "1/global_adapter_model.bin")
    for row in metrics(run, "client"):
        expected = num_bytes(cut_rank(whole, RANKS[row["client_id"]]))
        assert (row["bytes_down"], row["bytes_up"]) == (expected, expected)
    config = TrainConfig.of(**start.options("flexlora", client_selection_frac=0.8))
    waves = draw_waves(config, choose_method(config), range(5))
    forecast = forecast_run(
        config, choose_method(config), waves, {(client,): Work(1, 1, 1, 1, 1, 1) for client in range(5)}, whole
    )
    rounds = metrics(run, "round")
    assert forecast.bytes_down == max(row["bytes_down"] for row in rounds)
    assert forecast.bytes_up == max(row["bytes_up"] for row in rounds)
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    assert size < forecast.disk_bytes < 3 * size


def test_the_room_of_a_round_is_that_of_its_clients_ranks():
    shapes = {"l.lora_A.weight": (64, 4096), "l.lora_B.weight": (4096, 64)}
    options = {"updates": 4, "keeps_optimizer": False, "has_global": True}
    large, mixed, small = (
        estimate_round_bytes(shapes, **options, ranks=ranks) for ranks in ((64,) * 4, (64, 4, 4, 4), (4,) * 4)
    )
    assert large == estimate_round_bytes(shapes, **options)
    assert large - mixed == 3 * 60 * 2 * 4096 * 4
    assert mixed - small == 60 * 2 * 4096 * 4


def test_what_truncation_cut_stands_in_the_manifest_and_the_metrics_also_when_those_were_lost(start):
    run = start("flexlora")
    noted = [json.loads((run / f"{number}/manifest.json").read_text())["notes"] for number in (1, 2, 3)]
    told = [row["truncation_error"] for row in metrics(run, "round")]
    assert told == [notes["truncation_error"] for notes in noted]
    assert all(0 < error < 1 for error in told)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '"kind":"round"' not in line.replace(" ", "")))
    again = start("flexlora")
    assert [row["truncation_error"] for row in metrics(again, "round")] == told


def test_adapters_of_different_ranks_answer_together_as_they_answer_alone(start, tmp_path, test_file):
    run = start("zeropad", num_communication_rounds=1, client_selection_strategy="all", local_learning_rate=0.1)
    options = {
        "exp_name": run.name,
        "communication_rounds": 1,
        "max_new_tokens": 6,
        "device": "cpu",
        "base_dtype": "float32",
        "model_dir": run.parent,
        "test_file_path": test_file,
    }
    together = generate.run(GenerateConfig.of(**options, prediction_dir=tmp_path / "together", all=True)).files
    meta = json.loads(together[-1].with_suffix(".meta.json").read_text())
    assert meta["answered_together"] == ["global", *(f"client_{client}" for client in range(5))]
    for client in range(5):
        single = {"is_global_model": False, "client_id": client, "prediction_dir": tmp_path / "alone"}
        (alone,) = generate.run(GenerateConfig.of(**options, **single)).files
        assert alone.read_bytes() == together[2 + client].read_bytes()
    assert len({file.read_bytes() for file in together}) > 2


def test_hetlora_prunes_and_the_smaller_rank_stays_over_rounds_and_interruptions(start):
    changes = {
        "client_selection_strategy": "all",
        "local_optimizer": "sgd",
        "local_learning_rate": 0.05,
        "tail_penalty": 6.0,
        "max_grad_norm": 0.0,
        "max_update_norm": 0.01,
    }
    run = start("hetlora", **changes)
    ranks = [load_groups(run / f"{number}/state.safetensors")["ranks"]["clients"].tolist() for number in (1, 2, 3)]
    assert all(after <= before for row in zip(RANKS, *ranks, strict=True) for before, after in itertools.pairwise(row))
    assert sum(ranks[2]) < sum(RANKS)
    for number, now in enumerate(ranks, start=1):
        found = [load_spec(run / f"{number}/client_{client}/adapter_config.json").r for client in range(5)]
        assert found == now
    assert [row["mean_client_rank"] for row in metrics(run, "round")] == [sum(now) / 5 for now in ranks]
    assert any("clipped_to" in row for row in json.loads((run / "3/manifest.json").read_text())["limited"])
    check(run)
    expected = hashes(run)
    (run / "3").rename(run / "3.partial")
    (run / "3.partial/manifest.json").unlink()
    assert hashes(start("hetlora", **changes)) == expected


@pytest.mark.thorough
def test_kept_moments_go_on_at_the_client_s_rank(start):
    run = start("zeropad", client_selection_strategy="all", optimizer_state="keep")
    check(run)
    other = start("zeropad", client_selection_strategy="all", exp_name="reset")
    assert sha256_of(run / "1/adapter_model.safetensors") == sha256_of(other / "1/adapter_model.safetensors")
    assert sha256_of(run / "3/adapter_model.safetensors") != sha256_of(other / "3/adapter_model.safetensors")


def test_an_update_of_another_rank_than_the_client_s_is_left_out(start, monkeypatch):
    def send_larger(self, results, download, memory):
        state = results[0].adapter
        if rank_of_adapter(state) == 1:
            state = {key: torch.cat([value, value], dim=int(".lora_B." in key)) for key, value in state.items()}
        return Upload(state), memory

    monkeypatch.setattr(TrainAndSend, "upload", send_larger)
    run = start("zeropad", num_communication_rounds=1, client_selection_strategy="all")
    (row,) = metrics(run, "round")
    ((left_out),) = row["quarantined"]
    assert (left_out["client_id"], left_out["kind"]) == (3, "invalid")
    assert "has shape" in left_out["reason"]
    assert row["cohort"] == [0, 1, 2, 4]


def test_equal_ranks_are_fedavg_to_the_byte(start):
    plain = start("homo", client_ranks=None)
    equal = start("zeropad", client_ranks="4x5")
    assert sha256_of(plain / "3/adapter_model.safetensors") == sha256_of(equal / "3/adapter_model.safetensors")
    assert len(find_client_files(start.options("homo")["data_path"], 5, chosen=True)) == 5
