"""Where fedlora runs: output of any encoding, a home folder that is not there, notebooks, proxies.

Each works, or is one message.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import pwd
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedlora as fl
from fedlora import home, paths
from fedlora.cli import load, main
from fedlora.command_table import COMMANDS
from fedlora.config.compare import CompareConfig
from fedlora.config.schema import Config
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.evaluation.judge.client import _make_http_client
from fedlora.flower.node_config import NodeConfig
from fedlora.home import expand_home
from fedlora.llm import hub

NAMES = ("münchen", "東京", "plain")
TRAINING = ["--data", "silos", "--client_fraction", "1", "--rounds", "1", "--epochs", "1", "--batch_size", "2"]
TRAINING += ["--template", "chat", "--device", "cpu", "--base_dtype", "float32"]


@pytest.fixture(scope="module")
def world(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of clients whose names and rows are not ASCII, and answers of it."""
    folder = tmp_path_factory.mktemp("wörld")
    rows = [{"instruction": f"Grüße {n} 東京 😀", "output": "schön", "category": "größe"} for n in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fl.silos(dict.fromkeys(NAMES, rows), progress=False)
        Path("test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path("base").symlink_to(tiny_model)
        assert main(["train", "--name", "run", "--model", "base", *TRAINING]) == 0
        asked = ["--test", "test.jsonl", "--of", "base,global", "--max_new_tokens", "3", "--device", "cpu"]
        assert main(["generate", "run", *asked]) == 0
    return folder


def run_in(encoding: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    """Exit code and output of a command whose streams refuse what their encoding lacks."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        code = main(arguments)
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)  # type: ignore[attr-defined]
    return code, out, err


SHOWN = {
    "plan": ["plan", "--model", "base", "--probe", "false", "--name", "other", *TRAINING],
    "score": ["score", "run", "--test", "test.jsonl", "--of", "base,global"],
    "loss": ["loss", "run", "--test", "test.jsonl", "--of", "global,münchen", "--device", "cpu"],
    "report": ["report", "run", "--round", "1"],
    "runs": ["runs"],
    "verify": ["verify", "run"],
    "methods": ["methods", "fedprox"],
    "help": ["train", "--help", "all"],
    "generate again": ["generate", "run", "--test", "test.jsonl", "--max_new_tokens", "3", "--device", "cpu"],
}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("command", [name for name in SHOWN if name != "report"])
def test_output_of_any_encoding_has_what_it_lacks_replaced(world, command, encoding, monkeypatch):
    monkeypatch.chdir(world)
    code, out, err = run_in(encoding, SHOWN[command], monkeypatch)
    assert code == 0, err
    plain = run_in("utf-8", SHOWN[command], monkeypatch)[1]
    # a plan shows the memory of this process, which grows
    bare, expected = (re.sub(r"\d+", "0", text) for text in (out, plain.encode(encoding, "replace").decode(encoding)))
    assert bare == expected
    assert out != plain or command not in ("plan", "loss") or encoding != "ascii"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_loses_nothing_in_any_encoding(world, encoding, monkeypatch):
    monkeypatch.chdir(world)
    code, out, _ = run_in(encoding, [*SHOWN["score"], "--json"], monkeypatch)
    assert code == 0
    assert "größe" in json.dumps(json.loads(out), ensure_ascii=False)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_messages_and_errors_go_to_any_stream(world, encoding, monkeypatch):
    monkeypatch.chdir(world)
    code, _, err = run_in(encoding, ["nösuch"], monkeypatch)
    assert code == 2
    assert err.startswith("error: unknown command 'n")
    code, _, err = run_in(encoding, ["loss", "run", "--of", "münchn", "--test", "test.jsonl"], monkeypatch)
    assert code == 2
    assert "did you mean" in err


def test_a_name_that_is_not_unicode_is_one_message(world, tmp_path, monkeypatch, capsys):
    """A file name of another encoding, or any name with other letters where the locale is ASCII."""
    monkeypatch.chdir(tmp_path)
    Path("silos").mkdir()
    for name in (b"m\xfcnchen.jsonl", b"plain.jsonl"):
        Path(os.fsdecode(b"silos/" + name)).write_bytes((world / "silos" / "plain.jsonl").read_bytes())
    assert main(["train", "--name", "odd", "--model", str(world / "base"), *TRAINING]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.splitlines()[-2:] == [
        "error: a name or text with '\\udcfc' cannot be written as utf-8",
        "  hint: rename the file or folder, or set PYTHONUTF8=1 where the locale is not UTF-8",
    ]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LANG": "C", "LC_ALL": "C"},
        {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        {"MPLBACKEND": "nonsense"},
        {"HOME": "/dev/null"},
        {"ALL_PROXY": "socks5://127.0.0.1:9", "HTTPS_PROXY": "socks5h://127.0.0.1:9"},
    ],
    ids=str,
)
def test_commands_of_a_process_of_its_own_end_without_a_traceback(world, environment):
    for command in ("score", "report", "verify", "loss", "generate again"):
        arguments = [sys.executable, "-m", "fedlora", *SHOWN[command]]
        where = {"cwd": world, "env": {**os.environ, **environment}}
        ended = subprocess.run(arguments, **where, capture_output=True, check=False)
        assert b"Traceback" not in ended.stderr, ended.stderr.decode(errors="replace")
        # under an ASCII locale a name with other letters is not that of the client
        assert ended.returncode == 0 or (command == "loss" and "PYTHONUTF8" in environment)


@pytest.mark.parametrize(
    "backend",
    [
        "module://matplotlib_inline.backend_inline",
        pytest.param("nonsense", marks=pytest.mark.thorough),
        pytest.param("svg", marks=pytest.mark.thorough),
    ],
)
def test_figures_are_drawn_whatever_backend_the_environment_names(backend):
    draw = (
        "import os\n"
        "from fedlora.reporting.drawing import house_style, png_bytes\n"
        "with house_style():\n"
        "    from matplotlib.figure import Figure\n"
        "    print(len(png_bytes(Figure())) > 100, os.environ['MPLBACKEND'])\n"
        "import matplotlib\n"
        "print(matplotlib.rcParams['backend'])\n"
    )
    environment = {**os.environ, "MPLBACKEND": backend}
    ended = subprocess.run([sys.executable, "-c", draw], env=environment, capture_output=True, text=True, check=False)
    assert ended.stdout.splitlines()[:1] == [f"True {backend}"], ended.stderr
    if backend == "svg":  # what a user's own figures are drawn with is left as it is
        assert ended.stdout.splitlines()[1] == "svg"


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without HOME and without an entry in the password database, as in some containers."""

    def refuse(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "FEDLORA_CACHE", "FEDLORA_SECRETS", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", refuse)


def test_without_a_home_folder_its_place_is_asked_for_by_variable(homeless, world, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(world)
    arguments = ["train", "--name", "homeless", "--model", "base", "--model_dir", str(tmp_path), *TRAINING]
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert "error: ~: the home folder of this user is not known" in told
    assert "set HOME, or let FEDLORA_CACHE name a folder" in told
    with pytest.raises(UsageError, match="home folder") as caught:
        paths.secret_file("x")
    assert "FEDLORA_SECRETS" in caught.value.hint
    with pytest.raises(UsageError, match="~/data: the home folder of this user is not known") as caught:
        TrainConfig.of(data="~/data")
    assert "HOME" in caught.value.hint
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    assert main(arguments) == 0


def test_a_home_folder_that_cannot_be_written_is_one_message_and_costs_no_run(world, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(world)
    monkeypatch.setenv("HOME", "/dev/null")
    for name in ("FEDLORA_CACHE", "FEDLORA_SECRETS", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    arguments = ["train", "--model_dir", str(tmp_path), *TRAINING, "--name"]
    assert main([*arguments, "run", "--model", "base"]) == 0
    capsys.readouterr()
    private = ["--dp_noise_multiplier", "1", "--dp_clip", "1"]
    for more, variable in ((["--model", "base", *private], "SECRETS"), (["--model", "smollm2-135m"], "CACHE")):
        assert main([*arguments, "other", *more]) in (2, 5)
        told = capsys.readouterr().err
        assert "Traceback" not in told
        if "not installed" not in told:  # the package of the embedded model
            assert told.splitlines()[-1] == f"  hint: let FEDLORA_{variable} name a folder that can be written"


def test_a_relative_folder_of_the_desktop_conventions_does_not_count(monkeypatch, tmp_path):
    monkeypatch.delenv("FEDLORA_CACHE", raising=False)
    monkeypatch.delenv("FEDLORA_SECRETS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, "relative")
    assert home.cache_folder() == tmp_path / ".cache" / "fedlora"
    assert paths.secret_file("x") == tmp_path / ".local" / "state" / "fedlora" / "secrets" / "x.key"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    assert home.cache_folder() == tmp_path / "there" / "fedlora"
    monkeypatch.setenv("FEDLORA_CACHE", "~/mine")
    assert home.cache_folder() == tmp_path / "mine"


def path_fields(config: type[Config]) -> list[str]:
    """The fields of a configuration that hold paths."""
    named = ("val_data_path",)
    return [name for name, field in config.model_fields.items() if "Path" in repr(field.annotation) or name in named]


NEEDED = {
    "compare": {"budget_steps": 1},
    "data hub": {"repository": "owner/name"},
    "reaggregate": {"weights": "uniform"},
}
CONFIGS = {name: command.config for name, command in COMMANDS.items()}


@pytest.mark.parametrize("command", CONFIGS)
def test_every_path_of_every_command_may_begin_at_home(command, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load(CONFIGS[command])
    needed = {
        "compare": {"budget_steps": 1},
        "data hub": {"repository": "owner/name"},
        "reaggregate": {"weights": "uniform"},
    }.get(command, {})
    for name in path_fields(config):
        more = {"data_path": tmp_path} if (command, name) == ("compare", "test_file_path") else {}
        found = config.of(**needed, **more, **{name: "~/place.jsonl"})
        assert str(getattr(found, name)) == str(tmp_path / "place.jsonl"), name


def test_a_configuration_file_and_what_it_names_may_lie_at_home(world, monkeypatch, tmp_path, capsys):
    """Relative paths count from the working directory, wherever the file lies."""
    monkeypatch.setenv("HOME", str(world))
    monkeypatch.chdir(tmp_path)
    (world / "home.yaml").write_text(
        "data: ~/silos\nmodel: ~/base\nmodel_dir: here\nval_data_path: ~/test.jsonl\nname: home\nrounds: 1\n"
        "client_fraction: 1\ntemplate: chat\nepochs: 1\nbatch_size: 4\ndevice: cpu\n"
    )
    assert main(["train", "~/home.yaml"]) == 0
    recorded = json.loads((tmp_path / "here" / "home" / "run.json").read_text())
    assert recorded["base_model"] == "~/base"
    assert fl.open("here/home").record.base_identity == recorded["base_identity"]
    capsys.readouterr()
    assert main(["loss", "home", "--model_dir", "here", "--test", "~/test.jsonl", "--device", "cpu"]) == 0
    assert [run.name for run in fl.runs("~/models").lines] == ["run"]
    assert fl.open("~/models/run").folder == world / "models" / "run"


def test_paths_within_fields_may_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.csv").write_text("instruction,output\na,b\n")
    compared = CompareConfig.of(data={"input_file": "~/rows.csv"}, budget_steps=1)
    assert compared.silos is None
    assert CompareConfig.of(data="~", budget_steps=1).silos == tmp_path
    node = NodeConfig.of(base_models="~/llama,tiny=~/other")
    assert node.base_models == (f"{tmp_path}/llama", f"tiny={tmp_path}/other")
    assert expand_home("~nobody-of-this-name/x") == "~nobody-of-this-name/x"
    assert expand_home("a/~/b") == "a/~/b"


def test_training_works_inside_a_running_loop(world, monkeypatch):
    monkeypatch.chdir(world)
    options = {"client_fraction": 1, "rounds": 1, "epochs": 1, "batch_size": 2, "template": "chat", "device": "cpu"}

    async def cell() -> list[int]:
        looped = fl.rounds(data="silos", model="base", name="looped", progress=False, **options)
        numbers = [each.number for each in looped]
        answers = fl.open("models/looped").answer(["Grüße"], max_new_tokens=2, progress=False)
        assert list(answers) == ["global"]
        return numbers

    assert asyncio.run(cell()) == [1]


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the variables of proxies, and no other of them."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")

    def set_only(**variables: str) -> None:
        for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_only


def test_behind_a_proxy_the_hub_is_in_reach_where_the_proxy_is(proxied, monkeypatch):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        there = f"127.0.0.1:{listening.getsockname()[1]}"
        for variables in (
            {"http_proxy": f"http://{there}"},
            {"HTTP_PROXY": there},
            {"ALL_PROXY": f"socks5://me:secret@{there}"},
        ):
            proxied(**variables)
            assert not hub.is_offline(), variables
        proxied(http_proxy=f"http://{there}", no_proxy="127.0.0.1")
        assert hub.is_offline()
    monkeypatch.setattr(hub, "find_spec", lambda name: True)
    for address in (f"http://{there}", "socks5://127.0.0.1:9", "http://127.0.0.1:port", "nonsense://", ":"):
        proxied(all_proxy=address)
        assert hub.is_offline(), address


def test_a_judge_behind_a_socks_proxy_without_its_package_is_one_message(proxied, monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio", None)
    proxied(all_proxy="socks5://me:hunter2@127.0.0.1:9")
    with pytest.raises(UsageError, match="the proxy that the environment names cannot be used") as caught:
        _make_http_client(trust_env=True)
    assert "ALL_PROXY" in caught.value.hint
    assert "hunter2" not in f"{caught.value}{caught.value.hint}"
