"""The command line: flags from configurations, errors as one message, signals, start-up without heavy imports."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from operator import attrgetter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fedlora import cli, errors
from fedlora.config.evaluate import ReportConfig
from fedlora.config.names import SHORT_NAMES
from fedlora.config.runs import VerifyConfig
from fedlora.config.schema import Config, Names, OptionalInt, flag
from fedlora.config.train import TrainConfig
from fedlora.flags import make_parser, read_flags
from fedlora.results import Result


class FakeConfig(Config):
    """A command for these tests."""

    exp_name: str = flag("default", "a name; 100% text")
    shuffle: bool = flag(True, "a switch")
    layers: Names = flag(("q_proj",), "a list")
    rows: OptionalInt = flag(None, "a number", ge=1)


@pytest.fixture
def stage(monkeypatch):
    """A command `fake_stage` whose run() keeps its configuration and then does `stage.act`."""
    module = ModuleType("fake_stage_module")
    kept = SimpleNamespace(config=None, act=lambda: None)

    def run(config):
        kept.config = config
        return kept.act()

    module.__dict__.update(FakeConfig=FakeConfig, run=run)
    monkeypatch.setitem(sys.modules, "fake_stage_module", module)
    command = cli.Command("for tests", "fake_stage_module:FakeConfig", "fake_stage_module:run")
    monkeypatch.setitem(cli.COMMANDS, "fake_stage", command)
    return kept


@pytest.mark.parametrize(
    ("arguments", "field", "expected"),
    [
        (["--exp_name", "a"], "exp_name", "a"),
        (["--exp-name", "a-b"], "exp_name", "a-b"),
        (["--exp-name=a-b=c"], "exp_name", "a-b=c"),
        (["--exp_name", ""], "exp_name", ""),
        (["--exp_name", "a", "--exp_name", "b"], "exp_name", "b"),
        (["--shuffle"], "shuffle", True),
        (["--shuffle", "true"], "shuffle", True),
        (["--shuffle=false"], "shuffle", False),
        (["--shuffle", "False"], "shuffle", False),
        (["--shuffle", "--rows", "2"], "shuffle", True),
        (["--layers", "a,b"], "layers", ("a", "b")),
        (["--layers", "[a,b]"], "layers", ("a", "b")),
        (["--layers", "[a,", "b]"], "layers", ("a", "b")),
        (["--layers", "a", "b", "--rows", "3"], "layers", ("a", "b")),
        (["--layers=['a','b']"], "layers", ("a", "b")),
        (["--rows", "7"], "rows", 7),
        (["--rows", ""], "rows", None),
        ([], "exp_name", "default"),
    ],
)
def test_flags_become_fields(stage, arguments, field, expected):
    assert cli.main(["fake_stage", *arguments]) == 0
    assert getattr(stage.config, field) == expected


def test_only_flags_that_were_given_count_as_chosen(stage):
    assert cli.main(["fake_stage", "--rows", "2"]) == 0
    assert stage.config.model_fields_set == {"rows"}


def test_commands_may_be_spelled_with_hyphens(stage):
    assert cli.main(["fake-stage"]) == 0
    assert stage.config is not None


def test_every_value_reaches_the_configuration_as_text():
    given = ["--lora_r=8", "--local-learning-rate", "1e-3", "--use_rslora", "--lora_target_modules", "k_proj", "o_proj"]
    values, file, as_json = read_flags(make_parser("train", TrainConfig), given, TrainConfig)
    assert values == {
        "lora_r": "8",
        "local_learning_rate": "1e-3",
        "use_rslora": "true",
        "lora_target_modules": "k_proj,o_proj",
    }
    assert file is None
    assert not as_json
    assert TrainConfig.make(values).local_learning_rate == 1e-3


def test_flags_win_over_the_file_and_the_file_over_the_defaults(stage, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("exp_name: from-file\nrows: 5\nlayers: [x, y]\n", encoding="utf-8")
    assert cli.main(["fake_stage", "--config", str(file), "--exp_name", "from-flag"]) == 0
    assert stage.config == FakeConfig(exp_name="from-flag", rows=5, layers=("x", "y"))


def test_a_field_of_the_command_line_can_stand_without_its_flag():
    parser = make_parser("report", ReportConfig)
    assert read_flags(parser, ["a", "--round", "2", "b"], ReportConfig, "exp_names").values == {
        "exp_names": "a,b",
        "communication_rounds": "2",
    }
    with pytest.raises(errors.UsageError, match="unexpected argument 'b'"):
        read_flags(make_parser("verify", VerifyConfig), ["a", "b"], VerifyConfig, "exp_name")
    with pytest.raises(errors.UsageError, match="'a' and --name='b' name the same thing"):
        read_flags(make_parser("verify", VerifyConfig), ["a", "--exp_name", "b"], VerifyConfig, "exp_name")


def test_what_ends_in_yaml_is_the_file_wherever_it_stands(stage, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("rows: 5\n", encoding="utf-8")
    for arguments in ([str(file)], ["--shuffle", str(file)], ["--config", str(file), "--shuffle"]):
        stage.config = None
        assert cli.main(["fake_stage", *arguments]) == 0
        assert (stage.config.rows, stage.config.shuffle) == (5, True)
    assert cli.main(["fake_stage", str(file), "--config", str(file)]) == 2


def test_a_short_name_is_the_field_in_flags_files_and_keywords(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("method: seq\nrounds: 5\nlora_r: 2\n", encoding="utf-8")
    from_file = TrainConfig.make({"num_communication_rounds": 6}, file=file)
    assert (from_file.federation_mode, from_file.num_communication_rounds, from_file.lora_r) == ("seq", 6, 2)
    assert TrainConfig.of(method="seq", rounds=6, rank=2) == from_file
    with pytest.raises(errors.UsageError, match="rank and lora_r are the same field"):
        TrainConfig.of(rank=2, lora_r=2)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--method", "fedpro"], "method='fedpro'"),
        (["--federation_mode", "fedpro"], "federation_mode='fedpro'"),
        (["--method", "trimmed_mean", "--client_ranks", "4"], "method=trimmed_mean"),
        (["--client_fraction", "2"], "client_fraction='2'"),
        (["--client-selection-frac", "2"], "client_selection_frac='2'"),
    ],
)
def test_a_message_names_a_field_as_it_was_typed(capsys, given, named):
    assert cli.main(["train", *given]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {named}"), shown


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lr", "learning_rate"),
        ("lora_rank", "lora_r"),
        ("bs", "batch_size"),
        ("num_rounds", "rounds"),
        ("model_name", "model"),
        ("dataset", "data"),
        ("wd", "weight_decay"),
    ],
)
def test_a_flag_of_other_tools_finds_ours(capsys, typed, meant):
    assert cli.main(["train", f"--{typed}", "1"]) == 2
    assert f"did you mean --{meant}?" in capsys.readouterr().err


def test_fedavg_finds_its_name(capsys):
    assert cli.main(["train", "--method", "fedavg"]) == 2
    assert "did you mean homo?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fake_stage", "--exp_nam", "x"], "unknown flag --exp_nam\n  hint: did you mean --exp_name?"),
        (["fake_stage", "--exp", "x"], "unknown flag --exp\n"),
        (["fake_stage", "--zzz=secret"], "unknown flag --zzz\n  hint: see fedlora fake_stage --help"),
        (["fake_stage", "stray"], "unexpected argument 'stray'"),
        (["fake_stage", "--rows"], "argument --rows: expected one argument"),
        (["fake_stage", "--rows", "many"], "rows='many': "),
        (["fake_stage", "--rows", "-1"], "rows='-1': "),
        (["fake_stage", "--shuffle", "perhaps"], "unexpected argument 'perhaps'"),
        (["fake_stage", "--config", "missing.yaml"], "missing.yaml: no such file"),
        (["fake_stagee"], "unknown command 'fake_stagee'\n  hint: did you mean fake_stage?"),
        (["evaluate-rogue"], "unknown command 'evaluate-rogue'\n  hint: did you mean evaluate_rouge?"),
        (["data", "skils"], "unknown command 'data skils'\n  hint: did you mean data skills?"),
        (["train", "--federation_mode", "homoo"], "did you mean homo?"),
        (["allocate", "--partition", "cat"], "argument --partition: invalid choice: 'cat' (choose from"),
        (["completion", "fish"], "completion takes one shell\n  hint: one of bash, zsh, tcsh"),
    ],
)
def test_a_wrong_command_line_is_one_message_and_exit_code_2(stage, capsys, arguments, message):
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert "secret" not in shown.err
    assert shown.out == ""
    assert stage.config is None


@pytest.mark.parametrize(
    "given", [["--api_key", "sk-CANARY"], ["--api-key=sk-CANARY"], ["--openai-api-key", "sk-CANARY"]]
)
def test_no_flag_takes_the_key_and_a_key_given_so_is_not_repeated(capsys, given):
    assert cli.main(["evaluate_llm", *given]) == 2
    shown = capsys.readouterr().err
    assert "OPENAI_API_KEY" in shown
    assert "CANARY" not in shown


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError, 2),
        (errors.DataError, 3),
        (errors.TrainingError, 4),
        (errors.StorageError, 5),
        (errors.LockedError, 6),
        (errors.JudgeError, 7),
        (errors.BudgetError, 8),
    ],
)
def test_an_error_of_the_user_is_a_message_a_hint_and_its_exit_code(stage, capsys, error, code):
    stage.act = raiser(error("rows.json:3: no field 'output'\x1b[2J", hint="add it"))
    assert cli.main(["fake_stage"]) == code
    assert capsys.readouterr().err == "error: rows.json:3: no field 'output'\\x1b[2J\n  hint: add it\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 5, "error: out of memory\n  hint: take fewer tokens"),
        (OSError(errno.ENOSPC, "No space left on device", "/disk/file"), 5, "error: /disk/file: no space left"),
        (ValueError("a bug"), 1, "ValueError: a bug"),
        (OSError(errno.EBADF, "Bad file descriptor"), 1, "Traceback"),
    ],
)
def test_everything_else_that_ends_a_stage_has_its_exit_code(stage, capsys, error, code, message):
    stage.act = raiser(error)
    assert cli.main(["fake_stage"]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "resumed"),
    [
        (["train", "run.yaml", "--name", "my run"], "fedlora train run.yaml --name 'my run'"),
        (["train", "--overwrite", "run.yaml"], "fedlora train run.yaml"),
        (["train", "--overwrite", "true", "--rounds", "3", "--overwrite=true"], "fedlora train --rounds 3"),
        (["compare", "study.yaml"], "fedlora compare study.yaml"),
        (["flower", "local", "--nodes", "3"], "fedlora flower local --nodes 3"),
        (["report", "run"], None),
        (["flower", "run"], None),
        (["--help"], None),
        ([], None),
    ],
)
def test_an_interrupt_names_the_command_that_resumes(monkeypatch, capsys, typed, resumed):
    """As it was typed, but for --overwrite, which would start anew."""
    monkeypatch.setattr(cli, "_dispatch", lambda arguments: raiser(KeyboardInterrupt())())
    assert cli.main(typed) == 130
    expected = f"interrupted; to resume: {resumed}" if resumed else "interrupted"
    assert capsys.readouterr().err == f"{expected}\n"


def test_an_interrupt_of_a_program_names_the_program(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_dispatch", lambda arguments: raiser(KeyboardInterrupt())())
    monkeypatch.setattr(sys, "argv", ["train.py", "--rounds", "3"])
    assert cli.main(["train", "--rounds", "3"]) == 130
    assert capsys.readouterr().err == "interrupted; to resume: python train.py --rounds 3\n"


@pytest.mark.parametrize("variable", ["api_key", "OPENAI_API_KEY"])
@pytest.mark.parametrize("error", [RuntimeError, errors.JudgeError])
def test_keys_of_the_environment_are_taken_out_of_what_is_shown(stage, capsys, monkeypatch, variable, error):
    monkeypatch.setenv(variable, "sk-CANARY-123")
    stage.act = raiser(error("refused: Bearer sk-CANARY-123"))
    assert cli.main(["fake_stage"]) != 0
    shown = capsys.readouterr().err
    assert "CANARY" not in shown
    assert "[redacted]" in shown


def test_handlers_of_signals_are_put_back(stage):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert cli.main(["fake_stage"]) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_command_also_runs_outside_the_main_thread(stage):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["fake_stage"])))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_unwinds_and_the_second_kills(number, code):
    program = """
import sys, time, types
from fedlora import cli
from fedlora.config.data import ModelConfig

def run(config):
    try:
        print("started", flush=True)
        time.sleep(30)
    finally:
        print("unwound", flush=True)
        time.sleep(float(sys.argv[1]))

sys.modules["fake"] = types.SimpleNamespace(run=run, Config=ModelConfig)
cli.COMMANDS["fake"] = cli.Command("", "fake:Config", "fake:run")
raise SystemExit(cli.main(["fake"]))
"""
    for pause, expected in (("0", code), ("30", -number)):
        with subprocess.Popen([sys.executable, "-c", program, pause], stdout=-1, stderr=-1, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            process.send_signal(number)
            assert process.stdout.readline() == "unwound\n"
            if pause != "0":
                process.send_signal(number)
            _, shown = process.communicate(timeout=20)
        assert process.returncode == expected
        assert "Traceback" not in shown


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_a_reader_that_has_gone_is_no_noise(arguments):
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "fedlora", *arguments]
    try:
        result = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write_end)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], {"pydantic", "torch", "transformers", "peft", "rich", "argparse", "numpy"}),
        (["train", "--help"], {"torch", "transformers", "peft", "rich", "numpy"}),
        (["evaluate_llm", "--help"], {"torch", "transformers", "openai", "rich", "numpy"}),
    ],
)
def test_help_loads_nothing_heavy(arguments, heavy):
    program = "import sys; from fedlora.cli import main; main(sys.argv[1:]); print('loaded', *sys.modules)"
    command = [sys.executable, "-c", program, *arguments]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loaded = set(shown.rsplit("loaded", 1)[1].split())
    assert "fedlora.cli" in loaded
    assert not loaded & heavy


def test_help_names_every_command_and_version_is_printed(capsys):
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(f"  {name} " in overview for name in [*cli.COMMANDS, "completion"])
    assert cli.main(["data"]) == cli.main(["data", "--help"]) == 0
    group = capsys.readouterr().out
    assert "data dolly" in group
    assert "train" not in group
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["fedlora", cli.__version__]


def test_the_overview_shows_the_everyday_commands_first(capsys):
    assert cli.main([]) == 0
    everyday, more = capsys.readouterr().out.split("\nmore:\n")
    names = [line.split()[0] for line in everyday.split("everyday commands:\n")[1].splitlines() if line]
    assert names == [name for name, command in cli.COMMANDS.items() if command.everyday]
    assert "  allocate " in more


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_shows_every_field_with_its_default(name, capsys):
    assert cli.main([*name.split(), "--help", "all"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for field, info in cli.load(cli.COMMANDS[name].config).flat_fields().items():
        assert f"--{field} " in shown
        assert info.description.split()[0] in shown
    assert "(default: " in shown
    assert "unset" not in shown


@pytest.mark.parametrize("name", [name for name, command in cli.COMMANDS.items() if command.everyday])
def test_the_everyday_help_fits_on_two_screens_and_uses_short_names(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 100
    assert not [field for field in SHORT_NAMES if f"--{field} " in shown]


def test_help_of_a_method_shows_its_flags_with_its_defaults(capsys):
    assert cli.main(["train", "--help", "--method", "fedprox"]) == 0
    assert "--proximal_mu FLOAT" in (shown := " ".join(capsys.readouterr().out.split()))
    assert "(default: 0.01)" in shown
    assert cli.main(["train", "--help"]) == 0
    assert "proximal_mu" not in capsys.readouterr().out


def test_help_shows_choices_and_defaults(stage, capsys):
    assert cli.main(["fake_stage", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--shuffle true|false a switch (default: true)" in shown
    assert "--layers NAME,... a list (default: q_proj)" in shown
    assert "--rows INT a number (default: nothing)" in shown
    assert "a name; 100% text (default: default)" in shown
    assert cli.main(["allocate", "--help"]) == 0
    assert "--partition category|iid|dirichlet|shards" in capsys.readouterr().out


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion_knows_commands_flags_and_choices(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("evaluate_rouge", "skills", "smollm2-135m", "round_robin", "lora_dropout"))


def test_the_bash_completion_is_valid_bash(capsys, tmp_path):
    cli.main(["completion", "bash"])
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    subprocess.run(["bash", "-n", str(script)], check=True)


def raiser(error: BaseException):
    def act():
        raise error

    return act


def test_the_programs_at_the_root_are_doors_to_their_commands():
    root = Path(__file__).parent.parent
    programs = ["client_data_allocation", "train", "generate", "evaluate_rouge", "evaluate_llm"]
    for program in programs:
        command = "allocate" if program == "client_data_allocation" else program
        result = subprocess.run(
            [sys.executable, str(root / f"{program}.py"), "--no-such-flag"], capture_output=True, text=True, check=False
        )
        assert result.returncode == 2
        assert result.stderr == f"error: unknown flag --no_such_flag\n  hint: see fedlora {command} --help\n"


def test_a_program_without_the_package_says_how_to_install_it():
    program = Path(__file__).parent.parent / "train.py"
    result = subprocess.run([sys.executable, "-S", str(program)], capture_output=True, text=True, check=False, env={})
    assert result.returncode == 1
    assert "pip install -e ." in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.usefixtures("handlers")
def test_an_error_that_a_signal_turned_into_is_the_signal_s(monkeypatch):
    def swallow(config):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except SystemExit:
            raise ValueError("the library's own way to say so") from None

    monkeypatch.setattr(cli, "load", lambda place, load=cli.load: swallow if place.endswith(":run") else load(place))
    assert cli.main(["runs"]) == 128 + signal.SIGTERM
    # a second signal would now end the process without another word
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_command_that_swallows_the_signal_is_ended(tmp_path):
    script = tmp_path / "deaf.py"
    script.write_text(
        "import os, signal, time\n"
        "from fedlora import cli, stopping\n"
        "stopping.PATIENCE_SECONDS = 0.2\n"
        "def deaf(arguments):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(1)\n"
        "    except KeyboardInterrupt:\n"
        "        pass\n"
        "    time.sleep(30)\n"
        "cli._dispatch = deaf\n"
        "raise SystemExit(cli.main(['runs']))\n"
    )
    assert subprocess.run([sys.executable, str(script)], timeout=20).returncode == 128 + signal.SIGINT


def test_a_result_is_printed_and_one_without_text_is_not(stage, capsys):
    class Told(Result):
        def text(self) -> str:
            return "a table\nand a path"

        def as_dict(self) -> dict[str, str]:
            return {"a": "table"}

        @property
        def next_command(self) -> str:
            return "fedlora next --exp_name modes"

    stage.act = Told
    # whatever the user calls a field, a command is shown as it is typed
    assert cli.main(["fake_stage", "--rows", "1"]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("a table\nand a path\n", "next: fedlora next --exp_name modes\n")
    assert cli.main(["fake_stage", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"a": "table"}
    stage.act = lambda: type("Silent", (Result,), {"text": lambda self: "", "as_dict": lambda self: {}})()
    assert cli.main(["fake_stage"]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_what_was_found_before_an_error_is_printed_before_it(stage, capsys):
    def fail():
        raise errors.StorageError(
            "round 2 is damaged", hint="restore it", result=SimpleNamespace(text=lambda: "round 1: ok")
        )

    stage.act = fail
    assert cli.main(["fake_stage"]) == errors.StorageError.exit_code
    shown = capsys.readouterr()
    assert shown.out == "round 1: ok\n"
    assert shown.err == "error: round 2 is damaged\n  hint: restore it\n"


def test_every_command_returns_a_result_that_has_a_text_or_nothing():
    for name, command in cli.COMMANDS.items():
        run = cli.load(command.run)
        # a generator's results are those that it gives and the one that it ends with
        told = run.__annotations__["return"]
        streamed = re.fullmatch(r"Generator\[(\w+), None, (\w+)\]", told)
        for kind in streamed.groups() if streamed else told.split(" | "):
            result = attrgetter(kind)(sys.modules[run.__module__]) if kind != "None" else None
            assert result is None or callable(result.text), f"{name}: {kind}"
