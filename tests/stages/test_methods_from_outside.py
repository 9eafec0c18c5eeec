"""Methods that are not in the table, through the stages: trained, resumed, verified, aggregated again, reported."""

import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedlora.config.evaluate import ReportConfig
from fedlora.config.methods import MethodsConfig
from fedlora.config.reaggregate import ReaggregateConfig
from fedlora.config.runs import RunsConfig, VerifyConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.federated.adapters import fingerprint
from fedlora.methods import FedAvg, Method
from fedlora.methods.table import find_recorded
from fedlora.stages import methods, reaggregate, report, runs, train, verify

EXAMPLE = Path(__file__).parents[2] / "examples" / "part_way.py"


@pytest.fixture
def code(tmp_path):
    """The example's file, where a test may change it."""
    return shutil.copy(EXAMPLE, tmp_path / "part_way.py")


@pytest.fixture
def options(tiny_model, make_clients, tmp_path, code):
    return {
        "exp_name": "run",
        "federation_mode": f"{code}:part_way",
        "base_model": str(tiny_model),
        "data_path": make_clients([3, 2, 2]),
        "model_dir": tmp_path / "models",
        "client_selection_frac": 1.0,
        "num_communication_rounds": 2,
        "num_clients": 3,
        "local_batch_size": 2,
        "local_num_epochs": 1,
        "local_learning_rate": 1e-2,
        "prompt_template": "chat",
    }


def edit(code) -> None:
    Path(code).write_text(Path(code).read_text() + "# another version\n")


def adapter_of(root, number=2):
    return fingerprint(load_file(root / str(number) / "adapter_model.safetensors"))


def test_a_run_of_a_method_in_a_file_goes_through_every_command(options, code, capsys, monkeypatch):
    root = train.run(TrainConfig.of(**options, step=0.3)).root
    told = json.loads((root / "run.json").read_text())
    assert (told["mode"], told["config"]["federation_mode"], told["config"]["step"]) == ("part_way", "part_way", 0.3)
    assert told["method"]["from"] == "file"
    assert told["method"]["place"] == f"{code}:part_way"
    assert list(told["method"]["files"]) == ["part_way.py"]
    assert told["method"]["facts"]["server_sees"] == "mean"
    where = {"exp_name": "run", "model_dir": options["model_dir"]}
    place = options["federation_mode"]

    assert "recomputed to the same bytes" in verify.run(VerifyConfig.of(**where, federation_mode=place)).text()
    with pytest.raises(UsageError, match="method part_way, whose code is not given") as caught:
        verify.run(VerifyConfig.of(**where))
    assert caught.value.hint == f"give --federation_mode {place}"
    with pytest.raises(UsageError, match="was trained with part_way"):
        verify.run(VerifyConfig.of(**where, federation_mode="fedavgm"))

    again = ReaggregateConfig.of(**where, federation_mode=place, leave_out="1", new_name="without")
    assert "server part_way" in reaggregate.run(again).text()
    faster = ReaggregateConfig.of(**where, federation_mode=place, method_options={"step": "1.0"}, new_name="faster")
    assert len(reaggregate.run(faster).rounds) == 2

    # whoever reads a run needs no code
    monkeypatch.delattr("fedlora.methods.outside.load_file")
    Path(code).unlink()
    assert "part_way" in runs.run(RunsConfig.of(model_dir=options["model_dir"])).text()
    text = report.run(
        ReportConfig.of(exp_names=("run",), model_dir=options["model_dir"], communication_rounds=2)
    ).text()
    assert "part_way" in text


def test_a_changed_source_stops_a_run_unless_drift_is_allowed(options, code, capsys):
    train.run(TrainConfig.of(**options))
    edit(code)
    more = {**options, "num_communication_rounds": 3}
    with pytest.raises(UsageError, match=r"its source is not the one .* was started with \(part_way.py: \w+ -> \w+\)"):
        train.run(TrainConfig.of(**more))
    where = {"exp_name": "run", "model_dir": options["model_dir"], "federation_mode": options["federation_mode"]}
    with pytest.raises(UsageError, match="its source is not the one"):
        verify.run(VerifyConfig.of(**where))
    assert "ok" in verify.run(VerifyConfig.of(**where, allow_drift=True)).text()
    train.run(TrainConfig.of(**more, allow_drift=True))
    assert "the source of method part_way has changed" in capsys.readouterr().err


def test_a_method_resumes_without_a_trace_of_where_its_file_lies(options, code, tmp_path):
    root = train.run(TrainConfig.of(**options)).root
    longer = {**options, "num_communication_rounds": 3}
    straight = train.run(TrainConfig.of(**{**longer, "exp_name": "straight"})).root
    moved = shutil.move(code, tmp_path / "moved.py")
    train.run(TrainConfig.of(**{**longer, "federation_mode": f"{moved}:part_way"}))
    assert adapter_of(root, 3) == adapter_of(straight, 3)


def test_an_option_of_one_is_fedavg_and_another_is_not(options):
    roots = {
        step: train.run(TrainConfig.of(**{**options, "exp_name": f"step{step}", "step": step})).root
        for step in (1, 0.5)
    }
    plain = train.run(TrainConfig.of(**{**options, "exp_name": "plain", "federation_mode": "homo"})).root
    assert adapter_of(roots[1]) == adapter_of(plain)
    assert adapter_of(roots[0.5]) != adapter_of(plain)


def test_worker_processes_load_the_method_themselves(options, capsys):
    apart = {**options, "devices": ("cpu", "cpu"), "exp_name": "apart"}
    roots = [train.run(TrainConfig.of(**given)).root for given in (options, apart)]
    assert adapter_of(roots[0]) == adapter_of(roots[1])
    assert "continuing without it" not in capsys.readouterr().err


def test_an_object_of_an_importable_module_is_known_by_its_name(options, code, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "part_way", raising=False)
    import part_way  # pyright: ignore[reportMissingImports]

    config = TrainConfig.of(**{**options, "federation_mode": part_way.part_way})
    assert config.method.source.place == "part_way:part_way"
    root = train.run(config).root
    told = json.loads((root / "run.json").read_text())["method"]
    assert (told["from"], list(told["files"])) == ("module", ["part_way"])
    # the same source, named as a file
    train.run(TrainConfig.of(**{**options, "num_communication_rounds": 3}))


def test_a_run_of_a_built_in_method_says_nothing_of_a_source(options):
    root = train.run(TrainConfig.of(**{**options, "federation_mode": "homo"})).root
    told = json.loads((root / "run.json").read_text())
    assert "method" not in told
    assert "method_row" not in told["config"]


@pytest.mark.parametrize("record", [None, [], {"facts": 3}, {"facts": {"order": "sideways", "rows_weigh": ["a", 1]}}])
def test_a_run_whose_record_says_little_is_read_as_one_that_states_nothing(record):
    row = find_recorded("unheard_of", record)
    assert (row.name, row.order, row.server_sees, row.source) == ("unheard_of", "parallel", None, None)
    assert find_recorded([mode := "homo"], record).name == f"{[mode]}"


def test_a_method_in_a_file_is_described_like_any_other(options):
    told = methods.run(MethodsConfig.of(federation_mode=options["federation_mode"]))
    assert "--set step=VALUE" in told.text()
    assert told.as_dict()["combines_with"]["privacy by client"]
    assert told.as_dict()["source"]["from"] == "file"


@dataclass(frozen=True)
class Half(FedAvg):
    share: float = 0.5


def test_a_method_of_this_process_alone_resumes_with_the_same_code_and_facts(options, monkeypatch):
    monkeypatch.setattr(Half, "__module__", "__main__")
    half = Method("half", server=Half(), server_sees="mean", bound_to_length=False)
    given = {**options, "federation_mode": half}
    root = train.run(TrainConfig.of(**given)).root
    where = {"exp_name": "run", "model_dir": options["model_dir"]}
    assert "recomputed" in verify.run(VerifyConfig.of(**where, federation_mode=half)).text()
    with pytest.raises(UsageError) as caught:
        verify.run(VerifyConfig.of(**where))
    assert caught.value.hint == "give --federation_mode file.py:name"
    longer = {**given, "num_communication_rounds": 3}
    train.run(TrainConfig.of(**longer))
    assert (root / "3").is_dir()
    claims = replace(half, server_sees="single updates")
    with pytest.raises(UsageError, match="server_sees: mean -> single updates"):
        train.run(TrainConfig.of(**{**longer, "federation_mode": claims}))
    monkeypatch.setattr(Half, "weight_of", lambda self, update: 2.0)
    with pytest.raises(UsageError, match=r"Half: \w+ -> \w+"):
        train.run(TrainConfig.of(**longer))


def test_a_row_that_states_no_length_says_why_a_run_gets_no_more_rounds(options):
    short = Method("short", server=Half())
    train.run(TrainConfig.of(**{**options, "federation_mode": short}))
    with pytest.raises(UsageError, match="num_communication_rounds: 2 -> 3") as caught:
        train.run(TrainConfig.of(**{**options, "federation_mode": short, "num_communication_rounds": 3}))
    assert "bound_to_length=False" in caught.value.hint


def test_a_mistyped_option_of_a_method_from_outside_is_named(options):
    with pytest.raises(UsageError, match="unknown field 'stpe'") as caught:
        TrainConfig.of(**options, stpe=0.3)
    assert caught.value.hint == "did you mean step?"


def test_privacy_by_client_takes_a_method_whose_server_sees_the_mean(options):
    private = {"dp_noise_multiplier": 1.0, "dp_clip": 1.0}
    root = train.run(TrainConfig.of(**options, **private)).root
    assert json.loads((root / "2" / "manifest.json").read_text())["privacy"]
    with pytest.raises(UsageError, match="client-level privacy"):
        TrainConfig.of(**{**options, "federation_mode": Method("silent", server=Half())}, **private)
