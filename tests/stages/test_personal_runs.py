"""Personal methods through the whole of training: what equals what, what stays at home, what others can load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import make_client_files

from fedlora.config.generate import GenerateConfig
from fedlora.config.plan import PlanConfig
from fedlora.config.runs import VerifyConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.federated.adapters import fingerprint
from fedlora.files import sha256_of
from fedlora.llm.adapter_files import load_adapter
from fedlora.llm.base_model import load_base_model
from fedlora.llm.lora import LoraModel
from fedlora.methods.choosing import choose_method
from fedlora.methods.feddpa import LOCAL, TrainLocalBeside
from fedlora.paths import OutputName, RunPaths
from fedlora.runs.saved_adapters import adapter_file, adapter_spec, names_in_round
from fedlora.runs.server_state import load_groups
from fedlora.stages import generate, plan, train, verify
from fedlora.types import ClientMemory, Download

CLIENTS = range(4)


@pytest.fixture(scope="module")
def options(tiny_model, tmp_path_factory):
    """The configuration of four small clients and three rounds."""
    data = make_client_files(tmp_path_factory.mktemp("personal"), [3, 2, 4, 3])

    def of(name: str, mode: str, **changes) -> dict:
        return {
            "exp_name": name,
            "federation_mode": mode,
            "base_model": str(tiny_model),
            "base_dtype": "float32",
            "data_path": data,
            "client_selection_strategy": "all",
            "num_communication_rounds": 3,
            "num_clients": 4,
            "local_batch_size": 2,
            "local_num_epochs": 1,
            "local_learning_rate": 1e-2,
            "prompt_template": "chat",
            "device": "cpu",
            **changes,
        }

    return of


@pytest.fixture
def start(options, tmp_path):
    """Train under a name of one's choice."""

    def run(name: str, mode: str, **changes) -> Path:
        return train.run(TrainConfig.of(**options(name, mode, model_dir=tmp_path / "models", **changes))).root

    return run


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """A run of these settings, trained once; nobody changes it."""
    made = {}

    def find(mode: str, **changes) -> Path:
        key = json.dumps([mode, changes])
        if key not in made:
            folder = tmp_path_factory.mktemp("finished")
            made[key] = train.run(TrainConfig.of(**options("run", mode, model_dir=folder, **changes))).root
        return made[key]

    return find


def rows(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def own(run: Path, number: int, client: int) -> dict[str, torch.Tensor]:
    return torch.load(run / f"{number}/client_{client}/adapter_model.bin", weights_only=True)


def distance(one, other) -> float:
    return sum(float((one[key] - other[key]).square().sum()) for key in one) ** 0.5


def test_the_global_adapter_and_what_is_sent_are_fedavg_s_to_the_byte(finished):
    homo = finished("homo")
    for mode in ("ditto", "feddpa"):
        run = finished(mode)
        for number in (1, 2, 3):
            assert sha256_of(run / f"{number}/adapter_model.safetensors") == sha256_of(
                homo / f"{number}/adapter_model.safetensors"
            )
            for client in CLIENTS:
                sent = load_file(run / f"{number}/client_{client}/upload.safetensors")
                assert fingerprint(sent) == fingerprint(own(homo, number, client))
        for one, other in zip(rows(run, "round"), rows(homo, "round"), strict=True):
            assert all(one[name] == other[name] for name in ("bytes_down", "bytes_up", "loss", "cohort"))
            assert one["num_steps"] == 2 * other["num_steps"]
            assert one["num_tokens"] == 2 * other["num_tokens"]


def test_without_its_pull_ditto_s_own_models_are_those_of_clients_alone(finished):
    alone, free, pulled = finished("none"), finished("ditto", ditto_lambda=0.0), finished("ditto")
    for number in (1, 2, 3):
        for client in CLIENTS:
            name = f"{number}/client_{client}/adapter_model.bin"
            assert sha256_of(free / name) == sha256_of(alone / name)
    assert sha256_of(pulled / "3/client_0/adapter_model.bin") != sha256_of(alone / "3/client_0/adapter_model.bin")


@pytest.mark.thorough
def test_a_strong_pull_leaves_ditto_s_own_models_at_the_global_adapter(start):
    """One SGD step of rate 1 / lambda goes from anywhere to the anchor, and past it by the gradient's share."""
    options = {"local_optimizer": "sgd", "local_learning_rate": 1e-3, "max_grad_norm": 0.0, "local_num_epochs": 2}
    far, near = (start(f"pull{pull}", "ditto", ditto_lambda=pull, **options) for pull in (0.0, 1e3))
    for client in CLIENTS:
        sent = torch.load(near / "2/global_adapter_model.bin", weights_only=True)
        assert distance(own(near, 3, client), sent) < 0.5 * distance(own(far, 3, client), sent)


def test_at_the_ends_of_its_weight_feddpa_is_local_training_and_the_global_model(start, finished):
    alone = finished("none")
    local, shared = (start(f"weight{weight}", "feddpa", personal_weight=weight) for weight in (1.0, 0.0))
    sent = torch.load(shared / "2/global_adapter_model.bin", weights_only=True)
    for client in CLIENTS:
        kept = load_groups(local / f"3/client_{client}/private/memory.safetensors")[LOCAL]
        assert fingerprint(kept) == fingerprint(own(alone, 3, client))
        mixed = own(shared, 3, client)
        for key in sent:
            if ".lora_A." in key:
                b_key = key.replace(".lora_A.", ".lora_B.")
                assert torch.equal(mixed[b_key] @ mixed[key], mixed[b_key][:, :4] @ sent[key])
                assert torch.equal(mixed[b_key][:, :4], sent[b_key])


@pytest.mark.parametrize("mode", ["ditto", "feddpa"])
def test_an_own_model_waits_for_its_client_to_be_drawn_again(start, options, mode):
    run = start("run", mode, client_selection_strategy="round_robin", client_selection_frac=0.5)
    for client in (0, 1):
        first, second, third = (run / f"{number}/client_{client}" for number in (1, 2, 3))
        for name in ("adapter_model.bin", "adapter_config.json"):
            assert sha256_of(first / name) == sha256_of(second / name)
        assert not (second / "update.json").exists()
        assert sha256_of(third / "adapter_model.bin") != sha256_of(first / "adapter_model.bin")
    memory = run / "1/client_0/private/memory.safetensors"
    slots = load_groups(memory) if mode == "feddpa" else {}
    kept = ClientMemory(own(run, 1, 0), slots=slots)
    config = TrainConfig.of(**options("run", mode))
    sent = torch.load(run / "2/global_adapter_model.bin", weights_only=True)
    begun = choose_method(config).client.phases(Download(sent), kept)[1].start
    assert fingerprint(begun) == fingerprint(slots[LOCAL] if slots else own(run, 1, 0))
    verify.run(VerifyConfig.of(exp_name="run", model_dir=run.parent))


@pytest.mark.parametrize("mode", ["ditto", pytest.param("feddpa", marks=pytest.mark.thorough)])
def test_limits_hold_for_what_is_sent_and_leave_the_own_models_alone(start, finished, mode):
    free, limited = finished(mode), start("limited", mode, max_update_norm=1e-3)
    name = "1/client_0/adapter_model.bin"
    assert sha256_of(free / name) == sha256_of(limited / name)
    assert sha256_of(free / "1/adapter_model.safetensors") != sha256_of(limited / "1/adapter_model.safetensors")
    assert json.loads((limited / "1/manifest.json").read_text())["limited"]
    verify.run(VerifyConfig.of(exp_name="limited", model_dir=limited.parent))


def test_finetune_is_fedavg_until_everybody_trains_alone(start):
    half = {"client_selection_strategy": "round_robin", "client_selection_frac": 0.5, "num_communication_rounds": 4}
    homo, run = start("homo", "homo", **half), start("run", "finetune", personal_rounds=2, **half)
    for number, same in ((1, 1), (2, 2), (3, 2), (4, 2)):
        assert sha256_of(run / f"{number}/adapter_model.safetensors") == sha256_of(
            homo / f"{same}/adapter_model.safetensors"
        )
    paths = RunPaths(run.parent, "run")
    assert not (run / "2/client_0").exists(), "what a client sent in an earlier round is not its model"
    for number in (3, 4):
        assert [name.client_id for name in names_in_round(paths, number) if name.kind == "client"] == list(CLIENTS)
        assert adapter_file(paths, number, OutputName("client", 3)) == run / f"{number}/client_3/adapter_model.bin"
    shared = torch.load(run / "2/global_adapter_model.bin", weights_only=True)
    started = json.loads((run / "3/client_1/update.json").read_text())["started_from"]
    assert started == fingerprint(shared)
    again = json.loads((run / "4/client_1/update.json").read_text())["started_from"]
    assert again == fingerprint(own(run, 3, 1))
    size = 4 * sum(value.numel() for value in shared.values())
    travelled = [(row["bytes_down"], row["bytes_up"]) for row in rows(run, "round")]
    assert travelled == [(2 * size, 2 * size)] * 2 + [(4 * size, 0), (0, 0)]
    verify.run(VerifyConfig.of(exp_name="run", model_dir=run.parent))
    with pytest.raises(UsageError, match="num_communication_rounds: 4 -> 5"):
        start("run", "finetune", personal_rounds=2, **{**half, "num_communication_rounds": 5})


@pytest.mark.parametrize("use_rslora", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_peft_loads_feddpa_s_stack_to_the_logits_of_the_mix(start, tiny_model, use_rslora):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = start("run", "feddpa", personal_weight=0.3, use_rslora=use_rslora, lora_alpha=12.0)
    folder = run / "3/client_2"
    sent = torch.load(run / "2/global_adapter_model.bin", weights_only=True)
    local = load_groups(folder / "private/memory.safetensors")[LOCAL]
    spec = adapter_spec(RunPaths(run.parent, "run"), 3, OutputName("global"))
    rule = TrainLocalBeside(personal_weight=0.3, lora_scaling=spec.scaling)
    phase = rule.phases(Download(sent), ClientMemory(slots={LOCAL: local}))[1]
    lora = LoraModel(load_base_model(str(tiny_model), device="cpu", dtype="float32").model, spec)
    lora.set_background(phase.background)
    lora.set_adapter(phase.start, weight=phase.weight)
    ids = torch.arange(3, 40)[None]
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(tiny_model)).float(), str(folder)).eval()
    with torch.no_grad():
        expected, found = lora.model(ids).logits, peft(ids).logits
        lora.set_background(None)
        lora.set_adapter(None)
        without = lora.model(ids).logits
    assert peft.peft_config["default"].r == 8
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, without, atol=1e-3)


def test_generate_answers_with_the_global_adapter_and_larger_ones_of_clients(start, test_file, tmp_path):
    run = start("run", "feddpa", num_communication_rounds=2)

    def answer(folder: str, **chosen) -> tuple[Path, ...]:
        options = {
            "exp_name": "run",
            "model_dir": run.parent,
            "prediction_dir": tmp_path / folder,
            "test_file_path": test_file,
            "communication_rounds": 2,
            "max_new_tokens": 8,
            "device": "cpu",
            "base_dtype": "float32",
        }
        return generate.run(GenerateConfig.of(**options, **chosen)).files

    together = answer("together", all=True)
    assert [file.name.split("_output")[0] for file in together] == ["base", "global", *(f"client_{i}" for i in CLIENTS)]
    by_name = {file.name: file.read_text() for file in together}
    (alone,) = answer("alone", client_id=1)
    assert by_name[alone.name] == alone.read_text()
    (shared,) = answer("shared", is_global_model=True)
    assert by_name[shared.name] == shared.read_text()


@pytest.mark.thorough
def test_own_models_are_measured_on_own_rows_and_on_the_held_out_ones(start, test_file, tiny_model):
    held_out = {"val_data_path": str(test_file), "num_communication_rounds": 2}
    run = start("run", "feddpa", local_val_set_size=1, **held_out)
    for row in rows(run, "round")[1:]:
        clients = [line for line in rows(run, "client") if line["round"] == row["round"]]
        for name in ("val_loss_personal", "val_loss_personal_shared"):
            assert row[name] == pytest.approx(sum(line[name] for line in clients) / len(CLIENTS))
        assert row["val_loss"] != row["val_loss_personal_shared"]
    without = start("without", "ditto", **held_out)
    alone = start("none", "none", **held_out)
    free = start("free", "ditto", ditto_lambda=0.0, **held_out)
    assert "val_loss_personal_shared" not in rows(without, "round")[1]
    for one, other in zip(rows(free, "round")[1:], rows(alone, "round")[1:], strict=True):
        assert one["val_loss_personal"] == pytest.approx(other["val_loss"], rel=1e-5)
    tuned = start("tuned", "finetune", **held_out)
    assert ["val_loss_personal" in row for row in rows(tuned, "round")] == [False, False, True]


@pytest.mark.parametrize(
    "mode", ["feddpa", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("ditto", "finetune"))]
)
def test_a_plan_counts_what_the_run_then_takes(start, options, tmp_path, mode, capsys):
    half = {"client_selection_strategy": "round_robin", "client_selection_frac": 0.5}
    record = plan.run(PlanConfig.of(**options("run", mode, model_dir=tmp_path / "models", **half), probe=False)).record
    run = start("run", mode, **half)
    done = rows(run, "round")
    for name in ("num_steps", "num_tokens"):
        assert record["run"][name] == sum(row[name] for row in done)
    assert record["run"]["bytes_up"] == max(row["bytes_up"] for row in done)
    # what is carried forward is a link to a file that is counted already
    sizes = {(found := path.stat()).st_ino: found.st_size for path in run.rglob("*") if path.is_file()}
    taken = sum(sizes.values())
    assert 0.4 * record["run"]["disk_bytes"] < taken < 1.05 * record["run"]["disk_bytes"]


def test_an_own_adapter_lies_in_the_round_with_settings_of_its_own(finished):
    run = finished("feddpa")
    settings = [json.loads((run / name / "adapter_config.json").read_text()) for name in ("1", "1/client_0")]
    assert [(one["r"], one["lora_alpha"]) for one in settings] == [(4, 16), (8, 32)]
    shapes = {key: tuple(value.shape) for key, value in own(run, 1, 0).items()}
    assert load_adapter(run / "1/client_0/adapter_model.bin", shapes).keys() == shapes.keys()
