import json

import pytest

from fedlora.config.generate import GenerateConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.stages import generate, train

pytest.importorskip("bitsandbytes")


@pytest.fixture
def run_both(tiny_model, make_clients, test_file, tmp_path):
    """Train a run of one round with a quantization, and answer with it."""

    def run_train(kind: str) -> dict:
        trained = train.run(
            TrainConfig.of(
                exp_name=kind,
                base_model=str(tiny_model),
                data_path=make_clients([8, 8], folder=f"data_{kind}"),
                model_dir=tmp_path / "models",
                num_clients=2,
                client_selection_strategy="all",
                num_communication_rounds=1,
                local_num_epochs=6,
                local_batch_size=4,
                local_learning_rate=2e-2,
                lora_target_modules=("all-linear",),
                local_val_set_size=2,
                prompt_template="chat",
                quantization=kind,
                base_dtype="float32",
                device="cpu",
            )
        )
        paths = trained.paths
        lines = [json.loads(line) for line in (paths.root / "metrics.jsonl").read_text().splitlines()]
        return {
            "run": json.loads(paths.run_file.read_text()),
            "losses": [line["val_loss"] for line in lines if line["kind"] == "round"],
            "adapter": (paths.root / "1" / "adapter_model.safetensors").read_bytes(),
            "peft": (paths.root / "1" / "adapter_config.json").read_bytes(),
        }

    def run_generate(name: str, **options) -> dict:
        config = {
            "exp_name": name,
            "communication_rounds": 1,
            "model_dir": tmp_path / "models",
            "prediction_dir": tmp_path / "predictions",
            "test_file_path": test_file,
            "max_new_tokens": 4,
            "base_dtype": "float32",
            "device": "cpu",
            **options,
        }
        (file,) = generate.run(GenerateConfig.of(**config)).files
        return json.loads(next(file.parent.glob(f"{file.stem}*meta.json")).read_text())

    return run_train, run_generate


def test_a_run_on_a_quantised_base_learns_is_recorded_and_answers_on_the_same_base(run_both, tiny_model):
    run_train, run_generate = run_both
    plain = run_train("none")
    assert "bitsandbytes" not in plain["run"]["versions"]
    for kind in ("int8", "nf4"):
        trained = run_train(kind)
        assert trained["run"]["config"]["quantization"] == kind
        assert "bitsandbytes" in trained["run"]["versions"]
        assert trained["losses"][1] < 0.97 * trained["losses"][0]
        assert trained["losses"][0] != plain["losses"][0]
        assert trained["adapter"] != plain["adapter"]
        assert trained["peft"] == plain["peft"]
        assert run_generate(kind)["quantization"] == kind
        with pytest.raises(UsageError, match="different: quantization"):
            run_generate(kind, quantization="none")
        assert run_generate(kind, quantization="none", overwrite=True)["quantization"] == "none"


def test_the_base_alone_answers_unquantised_unless_asked(run_both, tiny_model, tmp_path):
    _, run_generate = run_both
    options = {"is_base_model": True, "base_model": str(tiny_model)}
    assert run_generate("no_run", **options)["quantization"] == "none"
    asked = run_generate("no_run", **options, quantization="nf4", prediction_dir=tmp_path / "other")
    assert asked["quantization"] == "nf4"


def test_a_run_older_than_the_field_is_answered_on_the_base_as_it_is(run_both, tmp_path):
    run_train, run_generate = run_both
    run_train("none")
    file = tmp_path / "models/none/run.json"
    recorded = json.loads(file.read_text())
    del recorded["config"]["quantization"], recorded["sha256"]
    file.write_text(json.dumps(recorded))
    assert run_generate("none")["quantization"] == "none"
