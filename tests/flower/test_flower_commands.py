"""The commands of a federation across machines, as far as no process is started."""

from __future__ import annotations

import ipaddress
import itertools
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from filelock import FileLock

from fedlora import cli
from fedlora.config.train import TrainConfig
from fedlora.errors import DataError, FedloraError, LockedError, TrainingError, UsageError, error_of
from fedlora.files import write_json
from fedlora.flower import programs
from fedlora.flower.command_lines import make_node_environment, superlink_command, supernode_command
from fedlora.flower.flower_config import ServerConfig, SubmitConfig
from fedlora.flower.folders import ServerFolder
from fedlora.flower.following import follow_to_end
from fedlora.flower.node_config import NodeConfig
from fedlora.flower.programs import Program, running
from fedlora.flower.request import exit_line, make_request, read_exit


@pytest.fixture
def made(tmp_path):
    folder = tmp_path / "federation"
    arguments = ["flower", "init", "--folder", str(folder), "--nodes", "2", "--hosts", "10.0.0.7", "fed.example.org"]
    assert cli.main(arguments) == 0
    return folder


def test_init_makes_an_authority_a_certificate_and_keys_that_are_their_owners(made):
    authority = x509.load_pem_x509_certificate((made / "server" / "ca.crt").read_bytes())
    certificate = x509.load_pem_x509_certificate((made / "server" / "server.crt").read_bytes())
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.IPAddress) == list(map(ipaddress.ip_address, ("10.0.0.7", "127.0.0.1")))
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    for secret in ("server/ca.key", "server/server.key", "server/superexec.secret", "client-1/node.key"):
        assert stat.S_IMODE((made / secret).stat().st_mode) == 0o600
    for folder in ("server", "client-0", "client-1"):
        assert stat.S_IMODE((made / folder).stat().st_mode) == 0o700
    key = load_ssh_private_key((made / "client-1" / "node.key").read_bytes(), None)
    assert key.curve.name == "secp384r1"
    assert not list((made / "client-0").rglob("ca.key"))


def test_what_init_writes_is_read_by_the_commands(made):
    server = ServerConfig.make({}, file=made / "server" / "server.yaml")
    node = NodeConfig.make({}, file=made / "client-1" / "node.yaml")
    assert server.host == "127.0.0.1"
    assert (node.client_id, node.server, node.base_models) == (1, "10.0.0.7:9092", ("smollm2-135m",))


def test_behind_a_proxy_the_server_listens_on_a_port_of_its_own(tmp_path):
    folder = tmp_path / "federation"
    ports = ["--port", "443", "--listen_port", "9092"]
    assert cli.main(["flower", "init", "--folder", str(folder), "--hosts", "fed.example.org", *ports]) == 0
    assert ServerConfig.make({}, file=folder / "server" / "server.yaml").port == 9092
    assert NodeConfig.make({}, file=folder / "client-0" / "node.yaml").server == "fed.example.org:443"


def test_init_writes_over_no_key(made, capsys):
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    assert cli.main(["flower", "init", "--folder", str(made)]) == 2
    assert "never written over" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}


def test_flower_is_started_with_safe_flags(made):
    command = " ".join(superlink_command(ServerConfig.make({}, file=made / "server" / "server.yaml")))
    for flag in (
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        "--isolation process",
        "--superexec-auth-secret-file",
        "--database",
        "--ssl-certfile",
    ):
        assert flag in command
    assert "--insecure" not in command
    node = NodeConfig.make({}, file=made / "client-0" / "node.yaml")
    assert "--auth-supernode-private-key" in supernode_command(node)
    assert "--insecure" not in " ".join(supernode_command(node))
    environment = make_node_environment(node, "abc")
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["PATH"].split(":")[0] == str((made / "client-0" / "bin").resolve())
    assert (made / "client-0" / "bin" / "flwr-clientapp").stat().st_mode & stat.S_IXUSR


def test_a_node_starts_no_app_but_the_guarded_one(made):
    """Whoever controls the server chooses the kind of app; Flower starts each kind by its command's name."""
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

    environment = dict(make_node_environment(NodeConfig.make({}, file=made / "client-0" / "node.yaml"), "abc"))
    others = set(TASK_TYPE_TO_COMMAND.values()) - {"flwr-clientapp"}
    assert {"flwr-agentapp", "flwr-serverapp"} <= others
    for name in others:
        found = shutil.which(name, path=environment["PATH"])
        assert Path(found).parent == (made / "client-0" / "bin").resolve()
        done = subprocess.run([found, "--help"], env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"this node runs no {name}" in done.stderr
    assert "guard" in Path(shutil.which("flwr-clientapp", path=environment["PATH"])).read_text()


def test_flower_itself_starts_an_agent_app_s_refusal_on_a_node(made):
    """As a SuperNode's executor does when the server says that a run is an agent app."""
    environment = dict(make_node_environment(NodeConfig.make({}, file=made / "client-0" / "node.yaml"), "abc"))
    script = """
import os
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import get_executor
from flwr.supercore.superexec.executor.types import ExecutionSpec
executor = get_executor("subprocess", executor_config=None, insecure=True, root_certificates_path=None)
executor.launch(ExecutionSpec(TaskType.AGENT_APP, "127.0.0.1:1", "token", True, None, False, None, False, 1))
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.split() == ["1"], done.stderr
    assert done.stderr.strip().splitlines()[-1] == "fedlora: this node runs no flwr-agentapp"


def test_a_submission_asks_for_the_run_that_train_would_do(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("exp_name: a\nbase_model: b\nlora_r: 4\nfederation_mode: seq\n")
    submitted = SubmitConfig.make({"server": str(tmp_path)}, file=file).training()
    assert submitted == TrainConfig.make({}, file=file)
    assert submitted.identity() == TrainConfig.make({}, file=file).identity()
    assert '"lora_r": 4' in make_request(submitted, start=1, absent=1, wave=1)


def test_a_server_that_is_not_there_is_told_in_a_line(made, capsys):
    assert cli.main(["flower", "status", "--server", str(made / "server")]) == 5
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "error: flwr supernode list: the server does not answer"
    assert "fedlora flower server" in told[1]


@pytest.fixture
def answers(made, monkeypatch):
    """What a server answers: its nodes and runs, which a test may change; and what it was asked."""
    told = {"supernode": {"nodes": []}, "list": {"runs": []}, "stop": {}, "asked": []}

    def call(arguments, environment):
        told["asked"].append(arguments)
        return told[arguments[0]]

    for module in ("control", "server_runs"):
        monkeypatch.setattr(f"fedlora.flower.{module}.call_json", call)
    return told


@pytest.mark.parametrize("known", [False, True])
def test_status_says_what_there_is_and_that_there_is_nothing(made, capsys, answers, tmp_path, known):
    folder = ServerFolder(made / "server")
    if known:
        answers["supernode"]["nodes"] = [{"node-id": "7", "status": "online"}]
        answers["list"]["runs"] = [{"run-id": str(number), "status": "running"} for number in (12, 13, 14)]
        write_json(folder.names_file, {"7": "client-0"})
        write_json(folder.run_file("12"), {"exp_name": "first", "model_dir": str(tmp_path / "models")})
        write_json(folder.run_file("13"), {"exp_name": "waits", "model_dir": str(tmp_path / "models")})
        (tmp_path / "models/first/1").mkdir(parents=True)
        shutil.copy(Path(__file__).parents[1] / "runs/recorded/run.json", tmp_path / "models/first/run.json")
    assert cli.main(["flower", "status", "--server", str(folder.root)]) == 0
    something = ["client-0: online", "run 12 (first): running, round 1 of 3 is done", "run 13 (waits): running"]
    expected = [*something, "run 14: running"] if known else ["no node is registered", "no run was submitted"]
    assert capsys.readouterr().out.splitlines() == expected


def test_the_only_open_run_needs_no_number(made, capsys, answers, monkeypatch):
    """follow shows one that has ended where no run is open; stop ends open ones only."""
    server = ["--server", str(made / "server")]
    followed = []
    monkeypatch.setattr("fedlora.flower.server_runs.follow_to_end", lambda number, *_: followed.append(number))
    old = {"run-id": "12", "status": "finished:completed"}
    new, other = {"run-id": "13", "status": "running"}, {"run-id": "14", "status": "pending"}
    answers["list"]["runs"] = [old, new]
    assert cli.main(["flower", "follow", *server]) == cli.main(["flower", "stop", *server]) == 0
    assert followed == ["13"]
    assert ["stop", "13", "fedlora"] in answers["asked"]
    answers["list"]["runs"] = [old]
    assert cli.main(["flower", "follow", *server]) == 0
    assert followed == ["13", "12"]
    assert cli.main(["flower", "stop", *server]) == 2
    assert "no run is open" in capsys.readouterr().err
    answers["list"]["runs"] = [old, new, other]
    for command in ("follow", "stop"):
        assert cli.main(["flower", command, *server]) == 2
        told = capsys.readouterr().err
        assert "run 13: running" in told
        assert "run 14: pending" in told
        assert "run 12" not in told
    assert cli.main(["flower", "follow", "14", *server]) == 0
    assert followed[-1] == "14"


def test_the_end_of_a_run_is_told_by_a_line():
    assert read_exit(exit_line(4, "no\nquorum", "again")) == (4, "no\nquorum", "again")
    assert read_exit("round 1 of 2") is None
    # what a node says stands behind other words
    assert read_exit(f"client-1 takes no part: {exit_line(0, '/models/first')}") is None
    for broken in ("0", "0 [", "x [1, 2]", "0 [1]", f"0 {'[' * 10_000}"):
        assert read_exit(f"fedlora flower: exit {broken}") is None
    assert isinstance(error_of(6, ""), LockedError)
    assert isinstance(error_of(2, ""), UsageError)
    assert [error_of(code, "").exit_code for code in range(1, 9)] == list(range(1, 9))


def test_a_program_that_ends_is_started_again_and_ends_with_its_crew(monkeypatch, tmp_path):
    monkeypatch.setattr("fedlora.flower.programs.RESTART_SECONDS", 0.0)
    log = tmp_path / "log"
    short = Program("short", [sys.executable, "-c", "print('up')"], {}, log)
    stays = Program("stays", ["sh", "-c", "echo $$; exec sleep 60"], {"PATH": "/usr/bin:/bin"}, tmp_path / "stays")
    with running([short, stays]) as crew:
        until = time.monotonic() + 10
        while (log.read_text().count("up") if log.is_file() else 0) < 3:
            assert time.monotonic() < until
            crew.look()
            time.sleep(0.05)
        number = int((tmp_path / "stays").read_text())
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert subprocess.run(["kill", "-0", str(number)], capture_output=True, check=False).returncode


@pytest.mark.parametrize(("code", "kind"), [(3, DataError), (1, FedloraError), (-9, TrainingError)])
def test_a_watched_program_that_ends_is_an_error_with_the_end_of_its_log(tmp_path, code, kind):
    """With the exit code that the program had."""
    log = tmp_path / "node-1.log"
    log.write_text("a line of an earlier call\n" * 20)
    end = f"os.kill(os.getpid(), {-code})" if code < 0 else f"os._exit({code})"
    says = "print('2026-11-30 10:00:00 fedlora: the worker listens'); print('rows.json: no such file', flush=True)"
    program = Program("node 1", [sys.executable, "-c", f"import os; {says}; {end}"], {}, log)
    stays = Program("node 2", ["sleep", "60"], {"PATH": "/usr/bin:/bin"}, tmp_path / "stays")
    with running([stays, program]) as crew:
        crew._running["node 1"].wait(20)
        with pytest.raises(kind) as caught:
            crew.check()
    first, *lines = str(caught.value).splitlines()
    assert first == f"node 1 ended {f'with code {code}' if code > 0 else 'by signal 9'}; the end of {log}:"
    assert [line.strip() for line in lines[-2:]] == ["the worker listens", "rows.json: no such file"]
    assert len(lines) == 8
    assert caught.value.exit_code == (code if code > 0 else 4)


def test_a_run_that_prints_nothing_is_followed_only_while_its_processes_live(monkeypatch):
    """The stream of a run may be silent for minutes."""
    monkeypatch.setattr("fedlora.flower.following.flwr_command", lambda *arguments: ["sleep", "60"])
    calls = itertools.count()

    def check():
        if next(calls) == 2:
            raise TrainingError("node 1 ended with code 1")

    began = time.monotonic()
    with pytest.raises(TrainingError, match="node 1 ended"):
        follow_to_end("12", dict(os.environ), check)
    assert time.monotonic() - began < 20


def test_lines_of_a_log_have_time_and_name_and_no_colours(tmp_path):
    """A server's own lines, those of Flower's programs, and those of the app, which are fedlora's too."""
    log = tmp_path / "server.log"
    script = r"""
import sys, time
from fedlora.console import log_lines, say
from fedlora.flower.programs import Program, running
lines = "print('\x1b[92mINFO \x1b[0m:      Starting'); print('2026-11-30 10:00:00 fedlora: round 1')"
with log_lines("fedlora"), running([Program("superlink", [sys.executable, "-c", lines], {})]) as crew:
    say("the server listens")
    time.sleep(1)
"""
    with log.open("wb") as output:
        subprocess.run([sys.executable, "-c", script], stderr=output, check=True, timeout=30)
    lines = [re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)", line) for line in log.read_text().splitlines()]
    assert all(lines), log.read_text()
    expected = {"fedlora: the server listens", "superlink: INFO :      Starting", "fedlora: round 1"}
    assert {line[2] for line in lines} == expected
    assert "2026-11-30 10:00:00" in {line[1] for line in lines}


def test_a_trial_keeps_no_state_of_an_earlier_one(made):
    """A second `flower local` would otherwise meet the tasks and the nodes of one that was interrupted."""
    trial = ServerConfig.make({"trial": "true"}, file=made / "server" / "server.yaml")
    assert "--database" not in superlink_command(trial)
    assert "--database" in superlink_command(ServerConfig.make({}, file=made / "server" / "server.yaml"))


def test_local_starts_a_trial_and_ends_with_the_first_of_its_processes(tmp_path, monkeypatch, make_clients, capsys):
    """Nodes are started once the server has their keys: it sends others away."""
    commands, start = [], programs._start
    lists = iter([[], [{"node-id": "1"}], [{"node-id": "1"}, {"node-id": "2"}]])

    def end_if_a_node(program):
        commands.append(program.command)
        code = "import time; time.sleep(60)" if program.name == "server" else "import sys; sys.exit(3)"
        return start(replace(program, command=[sys.executable, "-c", code]))

    def call(arguments, environment):
        assert len(commands) == 1 or arguments[0] != "supernode"
        return {"nodes": next(lists)} if arguments[0] == "supernode" else {"run-id": "12"}

    monkeypatch.setattr(programs, "_start", end_if_a_node)
    monkeypatch.setattr("fedlora.flower.control.call_json", call)
    monkeypatch.setattr("fedlora.flower.submit.call_json", call)
    monkeypatch.setattr("fedlora.flower.following.flwr_command", lambda *arguments: ["sleep", "60"])
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    options = ["--nodes", "2", "--data_path", str(make_clients([2, 2])), "--model_dir", str(tmp_path / "models")]
    code = cli.main(["flower", "local", "--folder", str(tmp_path / "federation"), "--port", port, *options])
    assert code == 3
    assert re.search(r"error: node \d ended with code 3", capsys.readouterr().err)
    assert len(commands) == 3
    assert all(command[command.index("--trial") + 1] == "true" for command in commands)


CREW = """
import sys
from pathlib import Path
from fedlora.flower.programs import Program, supervise
from fedlora.stopping import stop_on_signals
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
with stop_on_signals():
    supervise([Program("stubborn", [sys.executable, "-c", stubborn], {}, Path(sys.argv[1]))])
"""


def test_a_second_signal_leaves_nobody_behind(tmp_path):
    log = tmp_path / "log"
    with subprocess.Popen([sys.executable, "-c", CREW, str(log)], stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 20
        while not (log.is_file() and "up" in log.read_text()):
            assert time.monotonic() < until
            time.sleep(0.05)
        (child,) = psutil.Process(process.pid).children()
        for _ in range(2):
            process.terminate()
            time.sleep(0.5)
        assert process.wait(10) != 0
    assert not child.is_running()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells a process of its parent's end on Linux only")
def test_nobody_outlives_a_command_that_was_killed(tmp_path):
    log = tmp_path / "log"
    polite = CREW.replace("import signal, time; signal.signal(15, signal.SIG_IGN);", "import time;")
    with subprocess.Popen([sys.executable, "-c", polite, str(log)], stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 20
        while not (log.is_file() and "up" in log.read_text()):
            assert time.monotonic() < until
            time.sleep(0.05)
        (child,) = psutil.Process(process.pid).children()
        process.kill()
        process.wait(10)
    until = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("command", ["server", "node"])
def test_a_second_server_or_node_of_the_same_folder_is_refused(made, capsys, monkeypatch, command):
    settings = made / ("server/server.yaml" if command == "server" else "client-0/node.yaml")
    (made / "client-0" / "train.json").write_text("[]")
    running_as = made / "client-0" / "worker.yaml"
    running_as.write_text("the one that runs")
    with FileLock(settings.parent / ".lock"):
        assert cli.main(["flower", command, str(settings)]) == 6
    assert "is running already" in capsys.readouterr().err
    # a worker that dies is started again by this
    assert running_as.read_text() == "the one that runs"
    assert not (made / "server" / "flower" / "config.toml").exists()


def test_a_port_that_is_taken_is_told_before_anything_is_started(made, capsys, monkeypatch):
    monkeypatch.setattr("fedlora.flower.processes.PORT_SECONDS", 0.2)
    (made / "client-0" / "train.json").write_text("[]")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["flower", "server", str(made / "server" / "server.yaml"), "--port", port]) == 2
        assert f"port={port}: cannot listen on 127.0.0.1" in capsys.readouterr().err
        assert cli.main(["flower", "node", str(made / "client-0" / "node.yaml"), "--runtime_port", port]) == 2
        assert f"runtime_port={port}: cannot listen" in capsys.readouterr().err


DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.mark.parametrize("unit", ["fedlora-server.service", "fedlora-node.service"])
def test_the_units_start_a_command_that_there_is_and_never_give_up(unit, tmp_path, made, monkeypatch):
    text = (DEPLOY / unit).read_text()
    settings = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    assert (settings["Restart"], settings["StartLimitIntervalSec"]) == ("always", "0")
    assert int(settings["RestartSec"]) < 60
    program, *arguments = settings["ExecStart"].split()
    assert Path(program).name == "fedlora"
    started = []
    name = "run_server" if "server" in unit else "run_node"
    monkeypatch.setattr(f"fedlora.flower.processes.{name}", started.append)
    real = made / ("server" if "server" in unit else "client-0") / Path(arguments[-1]).name
    assert cli.main([*arguments[:-1], str(real)]) == 0
    assert len(started) == 1
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not installed; the rest holds")
    (tmp_path / unit).write_text(text.replace(program, sys.executable).replace("User=fedlora\n", ""))
    done = subprocess.run([analyze, "verify", str(tmp_path / unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if unit in line]) == (0, [])
