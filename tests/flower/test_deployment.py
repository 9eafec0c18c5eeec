"""SuperLink and three SuperNodes with TLS and node keys: the bytes of a simulation, and who is refused."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import ssl
import subprocess
import time
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

import torch
from deployment import SIZES, Deployment, free_ports
from relay import Relay
from test_parity import OPTIONS

from fedlora.config.runs import VerifyConfig
from fedlora.config.train import TrainConfig
from fedlora.engines.messages import unpack_outcome
from fedlora.files import sha256_of
from fedlora.flower.certificates import make_key, private_ssh
from fedlora.flower.command_lines import make_node_environment, supernode_command, write_connection
from fedlora.flower.flower_config import ServerConfig
from fedlora.flower.frames import unframe
from fedlora.flower.node_config import NodeConfig
from fedlora.methods.table import METHODS
from fedlora.stages import train, verify

pytestmark = pytest.mark.flower
CANARY = "CANARY-7f3a9c"

HOSTILE_CLIENT = """
import pathlib
pathlib.Path({marker!r}).touch()
from flwr.clientapp import ClientApp
app = ClientApp()
"""

HOSTILE_SERVER = """
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    sent = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    for reply in grid.send_and_receive(sent, timeout=60):
        print("REPLY", reply.error.code if reply.has_error() else "ok", flush=True)
"""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    from tiny_run import make_client_files, make_tiny_model

    # short: a Unix socket's path has room for a hundred characters
    root = tmp_path_factory.mktemp("f")
    data = make_client_files(root / "data", SIZES)
    for file in data.rglob("*.json"):
        rows = json.loads(file.read_text())
        rows[0]["output"] = f"{CANARY} {rows[0]['output']}"
        file.write_text(json.dumps(rows))
    made = Deployment(root, make_tiny_model(root / "model"), data)
    try:
        made.wait_until_online()
        yield made
    finally:
        made.stop_all()


def adapters(run: Path) -> dict[str, str]:
    return {
        path.relative_to(run).as_posix(): sha256_of(path)
        for path in sorted(run.rglob("*"))
        if path.suffix in (".bin", ".safetensors") and path.parent.name != "private"
    }


REST = sorted(METHODS.keys() - {"homo", "pooled"})
OTHERS = [tuple(REST[first : first + 10]) for first in range(0, len(REST), 10)]
"""All others, several at a time: most of a round is waiting."""
SERVERS_OWN = {
    *("fedavgm", "fedadagrad", "fedadam", "fedyogi", "diloco"),
    *("median", "trimmed_mean", "krum", "multi_krum", "geometric_median"),
}
"""Modes whose clients and messages are those of homo: a second round of them shows nothing new of the way."""


def test_real_nodes_give_the_bytes_of_a_simulation(deployment):
    done = deployment.run(deployment.config("homo", "homo"))
    assert done.returncode == 0, done.stderr[-3000:]
    there = deployment.root / "models" / "homo"
    assert done.stdout.strip() == str(there)
    here = train.run(TrainConfig.make({}, file=deployment.config("homo-here", "homo"))).root
    assert adapters(there) == adapters(here)
    assert len(adapters(here)) >= 6
    verify.run(VerifyConfig.of(exp_name="homo", model_dir=there.parent))
    assert " (homo): finished:completed, round 2 of 2 is done\n" in online(deployment)


@pytest.mark.parametrize("modes", OTHERS, ids=" ".join)
def test_nodes_take_part_in_several_runs_at_a_time(deployment, modes):
    def config(name: str, mode: str) -> Path:
        rounds = 1 if mode in SERVERS_OWN else 2
        return deployment.config(name, mode, num_communication_rounds=rounds, **OPTIONS.get(mode, {}))

    processes = [deployment.popen(*deployment.run_arguments(config(mode, mode))) for mode in modes]
    runs = {mode: train.run(TrainConfig.make({}, file=config(f"{mode}-here", mode))).root for mode in modes}
    assert [process.wait(400) for process in processes] == [0] * len(modes)
    for mode, here in runs.items():
        assert adapters(deployment.root / "models" / mode) == adapters(here)
        assert len(adapters(here)) >= (5 if mode in SERVERS_OWN else 6)
        verify.run(VerifyConfig.of(exp_name=mode, model_dir=here.parent))


def test_no_row_is_in_what_the_server_has_or_anybody_prints(deployment):
    searched = 0
    for folder in (deployment.server, deployment.logs, deployment.root / "models"):
        for path in folder.rglob("*"):
            if path.is_file():
                searched += 1
                assert CANARY.encode() not in path.read_bytes(), path
    assert searched > 30
    rows = (deployment.data / str(len(SIZES))).glob("*.json")
    assert all(CANARY in file.read_text() for file in rows if "manifest" not in file.name)


def test_no_row_is_in_what_a_node_and_its_server_say_to_each_other(deployment):
    deployment.stop("node-0")
    with Relay(deployment.port, deployment.server) as wire:
        try:
            deployment.start_node(0, "--server", f"localhost:{wire.port}", "--share_own_adapter", "false")
            deployment.wait_until_online()
            began = time.time()
            configs = [deployment.config(f"heard-{mode}", mode, local_val_set_size=1) for mode in ("homo", "fedsa")]
            processes = [deployment.popen(*deployment.run_arguments(file)) for file in configs]
            assert [process.wait(200) for process in processes] == [0, 0]
        finally:
            deployment.stop("node-0")
        heard = bytes(wire.heard)
    assert CANARY.encode() not in heard
    # this one hears: what the client sent, and what it was sent in the next round
    run = deployment.root / "models" / "heard-homo"
    for file in (run / "1" / "client_0" / "adapter_model.bin", run / "1" / "global_adapter_model.bin"):
        assert any(value.numpy().tobytes() in heard for value in torch.load(file, weights_only=True).values())
    # and what fedsa leaves on the node is in no byte
    files = [file for file in deployment.state_of(0).rglob("2.update") if file.stat().st_mtime > began]
    kept = [unpack_outcome(unframe(file.read_bytes()))[0].memory.adapter for file in files]
    (adapter,) = [adapter for adapter in kept if adapter]
    halves = {half: [value for key, value in adapter.items() if f"lora_{half}" in key] for half in "AB"}
    assert all(value.numpy().tobytes() in heard for value in halves["A"])
    assert not any(value.numpy().tobytes() in heard for value in halves["B"])


def test_a_request_beyond_the_nodes_bounds_is_refused_with_its_reason(deployment):
    deployment.wait_until_online()
    done = deployment.run(deployment.config("greedy", "homo", lora_r=128))
    assert done.returncode == 4
    assert "takes no part: lora_r=128 is above this node's bound of 64" in done.stderr
    assert "a node refuses this run: client-" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (deployment.root / "models" / "greedy" / "1").exists()


def supernode(deployment: Deployment, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """A SuperNode with the files of `folder`, by itself."""
    (port,) = free_ports(1)
    policy = NodeConfig.of(folder=folder, server=f"127.0.0.1:{deployment.port}", runtime_port=port)
    command = [*supernode_command(policy), "--max-retries", "1", *more]
    with (deployment.logs / "intruders.log").open("ab") as log:
        return subprocess.Popen(command, env=dict(make_node_environment(policy, "")), stdout=log, stderr=log)


def online(deployment: Deployment) -> str:
    return deployment.call("flower", "status", "--server", str(deployment.server)).stdout


def test_the_server_may_be_started_again_and_its_nodes_find_it(deployment):
    deployment.stop("server")
    heard = len(deployment.log("server"))
    deployment.start_server()
    assert "registered" not in deployment.log("server")[heard:]
    deployment.wait_until_online()
    assert {f"client-{client}: online" for client in range(len(SIZES))} <= set(online(deployment).splitlines())


INTRUDERS = {"unknown key": [], "wrong authority": [], "plain text": ["--insecure"]}
INTRUDER_SECONDS = 25


def test_nodes_that_cannot_prove_themselves_do_not_get_in(deployment, tmp_path):
    other = deployment.call("flower", "init", "--folder", str(tmp_path / "other"), "--nodes", "1")
    assert other.returncode == 0
    deployment.wait_until_online()
    before = online(deployment)
    assert before.count("online") == len(SIZES)
    with contextlib.ExitStack() as stack:
        processes = {}
        for how, flags in INTRUDERS.items():
            source = tmp_path / "other" if how == "wrong authority" else deployment.folder
            folder = tmp_path / how.replace(" ", "-")
            folder.mkdir()
            shutil.copy(source / "client-0" / "ca.crt", folder)
            (folder / "node.key").write_bytes(private_ssh(make_key()))
            processes[how] = supernode(deployment, folder, *flags)
            stack.callback(processes[how].kill)
        until = time.monotonic() + INTRUDER_SECONDS
        while time.monotonic() < until and any(process.poll() is None for process in processes.values()):
            time.sleep(0.5)
        # one that has not ended goes on trying
        assert 0 not in {process.poll() for process in processes.values()}
        assert online(deployment) == before


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_an_owner_makes_its_key_itself_and_is_let_in_while_the_server_runs(deployment):
    folder = deployment.folder / "client-3"
    folder.mkdir()
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(folder / "node.key")]
    subprocess.run(command, check=True)
    shutil.copy(deployment.folder / "client-0" / "ca.crt", folder)
    (deployment.server / "nodes" / "client-4.pub").write_text("no key")
    deployment.wait_for("server", "client-4 takes no part", 30)
    shutil.copy(folder / "node.key.pub", deployment.server / "nodes" / "client-3.pub")
    deployment.wait_for("server", "registered client-3", 30)
    settings = {
        **NodeConfig.make({}, file=deployment.folder / "client-0" / "node.yaml").model_dump(mode="json"),
        **{"folder": str(folder), "client_id": 3, "state_dir": str(folder / "state"), "device": "cpu"},
        "data_path": str(deployment.data / str(len(SIZES)) / "local_training_0.json"),
        "runtime_port": free_ports(1)[0],
    }
    (folder / "node.yaml").write_text(json.dumps(settings))
    deployment.start("node-3", "flower", "node", str(folder / "node.yaml"))
    until = time.monotonic() + 60
    while "client-3: online" not in online(deployment):
        assert time.monotonic() < until, deployment.log("node-3")
    deployment.stop("node-3")


def test_a_bundle_that_is_not_on_the_list_is_not_run(deployment, tmp_path):
    from fedlora.flower.command_lines import CONNECTION, flwr_command
    from fedlora.flower.guard import bundle_folder

    marker = tmp_path / "it-ran"
    app = tmp_path / "app"
    (app / "fedlora_flower").mkdir(parents=True)
    project = (bundle_folder() / "pyproject.toml").read_text().replace('name = "fedlora-flower"', 'name = "hostile"')
    assert tomllib.loads(project)["project"]["name"] == "hostile"
    (app / "pyproject.toml").write_text(project)
    (app / "fedlora_flower" / "__init__.py").write_text("")
    (app / "fedlora_flower" / "client_app.py").write_text(HOSTILE_CLIENT.format(marker=str(marker)))
    (app / "fedlora_flower" / "server_app.py").write_text(HOSTILE_SERVER)
    environment = write_connection(ServerConfig.make({}, file=deployment.server / "server.yaml"))
    command = flwr_command("run", str(app), CONNECTION, "--stream")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.count("REPLY 2") == len(SIZES), done.stdout + done.stderr
    assert not marker.exists()


@pytest.fixture
def proxy(deployment, tmp_path):
    """nginx with the configuration that is shipped, places and ports changed; returns its port."""
    nginx = shutil.which("nginx")
    if nginx is None:
        pytest.skip("nginx is not installed")
    (port,) = free_ports(1)
    text = (Path(__file__).parents[2] / "deploy" / "nginx.conf").read_text()
    changes = {
        "/etc/fedlora/server": str(deployment.server),
        "443 ssl": f"127.0.0.1:{port} ssl",
        "127.0.0.1:9092": f"127.0.0.1:{deployment.port}",
        "federation.example.org": "localhost",
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    places = "".join(
        f"{name}_temp_path {tmp_path / name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    whole = f"pid {tmp_path / 'pid'};\nerror_log stderr;\nevents {{}}\nhttp {{\naccess_log off;\n{places}{text}\n}}\n"
    (tmp_path / "nginx.conf").write_text(whole)
    command = [nginx, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-g", "daemon off;"]
    with (
        (deployment.logs / "nginx.log").open("ab") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        yield port
        process.terminate()


def status_of(deployment: Deployment, port: int, path: str) -> int:
    context = ssl.create_default_context(cafile=str(deployment.server / "ca.crt"))
    connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=10)
    until = time.monotonic() + 10
    while True:
        try:
            with contextlib.closing(connection):
                connection.request("POST", path, body=b"")
                return connection.getresponse().status
        except ConnectionRefusedError:
            assert time.monotonic() < until
            time.sleep(0.1)


def test_through_the_proxy_nodes_train_and_nobody_controls(deployment, proxy):
    paths = ("/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/openapi.json", "/v1/fleet/../control/x")
    assert {path: status_of(deployment, proxy, path) for path in paths} == dict.fromkeys(paths, 403)
    allowed = status_of(deployment, proxy, "/v1/fleet/pull-messages")
    assert allowed not in (403, 404, 502)
    # however it is spelt: the SuperLink gets the path that was compared
    assert status_of(deployment, proxy, "/v1/control/%2e%2e/fleet//pull-messages") == allowed
    assert status_of(deployment, deployment.port, "/v1/control/start-run") != 403
    deployment.stop("node-0")
    deployment.start_node(0, "--server", f"localhost:{proxy}")
    done = deployment.run(deployment.config("proxied", "homo"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert adapters(deployment.root / "models" / "proxied") == adapters(deployment.root / "models" / "homo")
