"""Private metrics of a simulated run: the numbers that `loss` and `score` would find, resumed and on two devices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.config.loss import LossConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.files import sha256_of
from fedlora.stages import loss, train

ASKED = {"private_metrics": "loss,exact,rougeL,chrf", "private_metrics_min": 3, "private_metrics_tokens": 3}
Start = Callable[..., Path]


@pytest.fixture(scope="module")
def start(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Train three clients, of whom the last has two test rows and the others three, for two rounds."""
    root = tmp_path_factory.mktemp("private")
    for client, tests in enumerate((3, 3, 2)):
        for ending, size in (("", 3), (".test", tests)):
            rows = [
                {"instruction": f"say {client} {number}{ending}", "output": "red " * (number + 1)}
                for number in range(size)
            ]
            file = root / "data" / f"c{client}{ending}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name: str, mode: str = "homo", **changes: Any) -> Path:
        options = {
            "exp_name": name,
            "federation_mode": mode,
            "base_model": str(tiny_model),
            "base_dtype": "float32",
            "data_path": root / "data",
            "model_dir": root / "models",
            "client_selection_strategy": "all",
            "num_communication_rounds": 2,
            "local_batch_size": 2,
            "local_num_epochs": 1,
            "local_learning_rate": 1e-2,
            "tokens_per_pass": 256,
            "prompt_template": "chat",
            "device": "cpu",
            **changes,
        }
        return train.run(TrainConfig.of(**options)).root

    return run


def lines(run: Path, kind: str = "private") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def adapters(run: Path) -> dict[str, str]:
    return {
        path.relative_to(run).as_posix(): sha256_of(path)
        for path in sorted(run.rglob("*"))
        if path.suffix in (".bin", ".safetensors")
    }


def test_the_losses_are_those_that_the_loss_stage_finds(start: Start, tmp_path: Path) -> None:
    run = start("homo", **ASKED)
    data = run.parents[1] / "data"
    found = {line["client_id"]: line for line in lines(run)}
    assert [line["round"] for line in lines(run)] == [2, 2, 2], "once, after the last round"
    for client in (0, 1):
        config = LossConfig.of(
            exp_name="homo",
            model_dir=run.parent,
            test_file_path=data / f"c{client}.test.jsonl",
            of_subjects=f"base,global,{client}",
            base_dtype="float32",
            device="cpu",
            evaluation_dir=tmp_path,
        )
        known = [one.overall.loss for one in loss.run(config).losses]
        given = [found[client]["models"][model]["loss"]["mean"] for model in ("base", "global", "personal")]
        assert given == pytest.approx(known, abs=1e-6)
        assert len(set(given)) == 3
    assert found[2] == {**found[2], "withheld": "fewer than 3 test rows with different prompts"}
    assert "models" not in found[2]


def test_measuring_changes_nothing_that_is_trained(start: Start) -> None:
    quiet = start("quiet")
    assert lines(quiet) == []
    assert "private_metrics" not in json.loads((quiet / "run.json").read_text())["config"]
    assert adapters(quiet) == adapters(start("homo", **ASKED))


def test_an_interrupted_run_leaves_the_bytes_of_an_unbroken_one(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {**ASKED, "private_metrics_every": 1}
    whole = lines(start("whole", **asked))
    assert [line["round"] for line in whole] == [1] * 3 + [2] * 3
    from fedlora.engines import private_metrics

    calls: list[int] = []
    honest = private_metrics.measure_own_rows

    class KilledError(BaseException):
        pass

    def killed(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KilledError
        return honest(*arguments, **options)

    monkeypatch.setattr(private_metrics, "measure_own_rows", killed)
    with pytest.raises(KilledError):
        start("broken", **asked)
    calls.clear()
    monkeypatch.setattr(private_metrics, "measure_own_rows", lambda *a, **o: (calls.append(1), honest(*a, **o))[1])
    broken = start("broken", **asked)
    assert len(calls) == 3, "the numbers of round 1 were committed"
    assert lines(broken) == whole


@pytest.mark.thorough
def test_a_second_device_changes_no_byte(start: Start) -> None:
    one, two = start("homo", **ASKED), start("two", **ASKED, devices=("cpu", "cpu"), device=None)
    assert lines(two) == lines(one)


@pytest.mark.parametrize(
    "mode", ["none", "ditto", *(pytest.param(one, marks=pytest.mark.thorough) for one in ("pooled", "flora", "ffa"))]
)
def test_every_kind_of_method_has_the_models_that_it_leaves(start: Start, mode: str) -> None:
    found = lines(start(mode, mode, **{**ASKED, "private_metrics": "loss,f1"}))[0]["models"]
    expected = {"none": {"base", "personal"}, "pooled": {"base", "global"}}
    assert set(found) == expected.get(mode, {"base", "global", "personal"})
    assert len({found[model]["loss"]["mean"] for model in found}) == len(found)


def test_without_any_test_rows_nothing_is_trained(start: Start, make_clients: Any) -> None:
    with pytest.raises(UsageError, match="no client has test rows"):
        start("bare", **ASKED, data_path=make_clients([3, 3]), num_clients=2)


def test_a_share_that_is_held_out_is_measured_too(start: Start, make_clients: Any) -> None:
    asked = {**ASKED, "private_metrics": "loss", "private_metrics_min": 2}
    run = start("share", **asked, data_path=make_clients([6, 6]), num_clients=2, test_share=0.5)
    assert [line["num_rows"] for line in lines(run)] == [3, 3]
    few = start("few", **asked, data_path=make_clients([6, 6]), num_clients=2, test_share=0.5, private_metrics_rows=2)
    assert [line["num_rows"] for line in lines(few)] == [2, 2]


def test_with_privacy_the_numbers_are_said_beside_epsilon(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDLORA_SECRETS", str(tmp_path / "secrets"))
    run = start("noisy", **ASKED, dp_noise_multiplier=1.0, dp_clip=0.1, client_selection_strategy="random",
                client_selection_frac=0.5)  # fmt: skip
    assert "private metrics carry no noise" in capsys.readouterr().err
    assert lines(run, "round")[-1]["privacy"]["without_noise"] == ["private_metrics"]
    assert "without_noise" not in lines(run, "round")[0]["privacy"]


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(UsageError, match="'bleu' is no private metric"):
        TrainConfig.of(private_metrics="loss,bleu")
