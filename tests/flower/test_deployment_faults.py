"""Real processes killed in the middle of a round: what goes on, what is missing, what comes back."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from deployment import SIZES, Deployment
from relay import Relay
from test_deployment import adapters

from fedlora.config.train import TrainConfig
from fedlora.stages import train

pytestmark = pytest.mark.flower
ROUNDS = 7
LONG = 150
"""Local epochs after which a round has taken long enough to be interrupted."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    from tiny_run import make_client_files, make_tiny_model

    root = tmp_path_factory.mktemp("f")
    data = make_client_files(root / "data", SIZES)
    made = Deployment(root, make_tiny_model(root / "model"), data)
    try:
        yield made
    finally:
        made.stop_all()


@pytest.fixture
def deployment(federation):
    """Server and three honest nodes that are connected."""
    federation.wait_until_online()
    yield federation
    if "run" in federation.processes:  # a test that failed
        federation.stop_all()


def assert_simulated(deployment: Deployment, name: str, mode: str, **changes: object) -> None:
    """A run left what the same run leaves in one process."""
    here = train.run(TrainConfig.make({}, file=deployment.config(f"{name}-here", mode, **changes))).root
    assert adapters(deployment.root / "models" / name) == adapters(here)


def failures(deployment: Deployment, name: str, number: int) -> list[dict[str, Any]]:
    file = deployment.root / "models" / name / str(number) / "manifest.json"
    return json.loads(file.read_text())["quarantined"]


def quarantined(deployment: Deployment, name: str, number: int) -> list[int]:
    return [failure["client_id"] for failure in failures(deployment, name, number)]


def wait_for_round(run: Path, number: int, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not (run / str(number)).is_dir():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_worker_that_is_killed_is_started_again_and_the_bytes_are_those_of_an_unbroken_run(deployment):
    options = {"local_num_epochs": LONG, "num_communication_rounds": 2}
    deployment.start_run(deployment.config("worker", "none", **options))
    wait_for_round(deployment.root / "models" / "worker", 1)
    deployment.wait_for("node-2", "round 1: trained")
    time.sleep(1.5)
    assert deployment.kill("node-2", "worker.yaml") == 1
    assert deployment.finish_run() == 0, deployment.log("run")
    assert "worker ended with code -9; it is started again" in deployment.log("node-2")
    assert_simulated(deployment, "worker", "none", **options)


def test_the_superlink_is_killed_and_the_run_survives(deployment):
    options = {"local_num_epochs": LONG, "num_communication_rounds": 3}
    deployment.start_run(deployment.config("superlink", "homo", **options))
    wait_for_round(deployment.root / "models" / "superlink", 1)
    assert deployment.kill("server", "flower-superlink") == 1
    deployment.wait_for("server", "superlink ended with code -9")
    assert deployment.finish_run() == 0, deployment.log("run")
    assert_simulated(deployment, "superlink", "homo", **options)


def test_the_server_app_is_killed_and_the_run_resumes_to_the_same_bytes(deployment):
    options = {"local_num_epochs": LONG, "num_communication_rounds": 3}
    file = deployment.config("serverapp", "homo", **options)
    deployment.start_run(file)
    wait_for_round(deployment.root / "models" / "serverapp", 1)
    assert deployment.kill("server", "flwr-serverapp") >= 1
    assert deployment.finish_run() == 4
    done = deployment.run(file)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumes after round" in done.stderr
    assert_simulated(deployment, "serverapp", "homo", **options)


def test_a_run_can_be_left_followed_stopped_and_gone_on_with(deployment):
    options = {"local_num_epochs": LONG, "num_communication_rounds": 3}
    file, run = deployment.config("left", "homo", **options), deployment.root / "models" / "left"
    heard = len(deployment.log("run"))
    deployment.start_run(file)
    wait_for_round(run, 1)
    deployment.processes["run"].send_signal(signal.SIGINT)
    assert deployment.finish_run() == 130
    number = re.search(r"run (\d+) is submitted", deployment.log("run")[heard:])[1]
    where = ("--server", str(deployment.server))
    deployment.start("follow", "flower", "follow", number, *where)
    deployment.wait_for("follow", "round 1 of 3")
    assert deployment.call("flower", "stop", number, *where).returncode == 0
    assert deployment.processes.pop("follow").wait(60) == 4
    assert f"run {number} was stopped" in deployment.log("follow")
    assert not (run / "3").exists()
    done = deployment.run(file)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumes after round" in done.stderr
    assert_simulated(deployment, "left", "homo", **options)
    assert deployment.call("flower", "stop", number, *where).returncode == 5


def test_a_node_that_is_killed_is_missing_for_its_round_and_takes_part_again_later(deployment):
    options = {"local_num_epochs": LONG, "num_communication_rounds": ROUNDS, "client_retries": 0}
    deployment.start_run(deployment.config("node", "homo", **options))
    run = deployment.root / "models" / "node"
    wait_for_round(run, 1)
    deployment.kill_all("node-2")
    began = time.monotonic()
    deployment.start_node(2)
    deployment.wait_for("run", "client 2 is left out of the round", 100)
    assert time.monotonic() - began < 90
    assert deployment.finish_run(400) == 0, deployment.log("run")[-3000:]
    check_missed_and_came_back(deployment, "node")


def check_missed_and_came_back(deployment: Deployment, name: str) -> None:
    """Client 2 was missing in some rounds, nobody else ever, and in the last round it took part."""
    missing = {number: clients for number in range(1, ROUNDS + 1) if (clients := quarantined(deployment, name, number))}
    assert set(map(tuple, missing.values())) == {(2,)}
    assert max(missing) < ROUNDS


def test_a_node_that_is_cut_off_from_the_network_is_missing_and_takes_part_again(deployment):
    options = {"local_num_epochs": LONG, "num_communication_rounds": ROUNDS, "client_retries": 0}
    run = deployment.root / "models" / "cut"
    deployment.stop("node-2")
    with Relay(deployment.port) as network:
        deployment.start_node(2, "--server", f"localhost:{network.port}")
        deployment.wait_until_online()
        deployment.start_run(deployment.config("cut", "homo", **options))
        wait_for_round(run, 1)
        began, heard = time.monotonic(), len(deployment.log("run"))
        network.cut()
        deployment.wait_for("run", "client 2 is left out of the round", 100, since=heard)
        assert time.monotonic() - began < 90
        network.restore()
        assert deployment.finish_run(500) == 0, deployment.log("run")[-3000:]
        check_missed_and_came_back(deployment, "cut")
        deployment.stop("node-2")


def test_a_worker_without_memory_costs_its_client_the_round(deployment):
    from tiny_run import make_client_files

    data = make_client_files(deployment.root / "long", SIZES)
    rows = data / str(len(SIZES)) / "local_training_2.json"
    rows.write_text(json.dumps([{**row, "output": "long " * 170} for row in json.loads(rows.read_text())]))
    deployment.stop("node-0")
    deployment.stop("node-2")
    # with more threads it would be the start of a thread that fails, and OpenMP then ends the process
    deployment.start_node(2, "--data_path", str(rows), OMP_NUM_THREADS="1")
    options = {"num_communication_rounds": 2, "client_retries": 0, "data_path": str(data), "tokens_per_pass": 1024}
    heard = len(deployment.log("node-2"))
    known = set(deployment.state_of(2).rglob("layout.json"))
    deployment.start_run(deployment.config("memory", "homo", **options))
    # it has told what it has, and trains as soon as the third node is there
    until = time.monotonic() + 120
    while set(deployment.state_of(2).rglob("layout.json")) == known:
        assert time.monotonic() < until
        time.sleep(0.1)
    time.sleep(2)
    (worker,) = deployment.family("node-2", ["worker.yaml"])
    worker.rlimit(psutil.RLIMIT_AS, (worker.memory_info().vms + (1 << 20), psutil.RLIM_INFINITY))
    deployment.start_node(0)
    deployment.wait_for("node-2", "no update", 120, since=heard)
    worker.rlimit(psutil.RLIMIT_AS, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
    assert deployment.finish_run() == 0, deployment.log("run")[-3000:]
    first, second = (failures(deployment, "memory", number) for number in (1, 2))
    assert [(failure["client_id"], failure["kind"]) for failure in first] == [(2, "out_of_memory")]
    assert first[0]["reason"] == "out of memory; the log of the node has the details"
    assert second == []
    deployment.stop("node-2")


def test_answers_with_nan_and_with_wrong_keys_are_quarantined_and_the_run_goes_on(deployment):
    deployment.stop("node-2")
    script = Path(__file__).with_name("hostile_worker.py")
    deployment.start_node_with(script, 2, json.dumps({"1": "nan", "2": "keys"}))
    deployment.wait_until_online()
    done = deployment.run(deployment.config("hostile", "homo", num_communication_rounds=3))
    assert done.returncode == 0, done.stderr[-3000:]
    found = [failures(deployment, "hostile", number) for number in (1, 2, 3)]
    told = [[(failure["client_id"], failure["kind"]) for failure in of_round] for of_round in found]
    assert told == [[(2, "invalid")], [(2, "invalid")], []]
    assert "non-finite tensor" in found[0][0]["reason"]
    assert "missing keys" in found[1][0]["reason"]
    for name in ("node-2", "worker-2"):
        deployment.stop(name)


def test_without_a_quorum_the_run_fails_and_goes_on_once_the_nodes_are_back(deployment):
    options = {"local_num_epochs": LONG, "num_communication_rounds": 2, "min_clients": 3, "client_retries": 0}
    file = deployment.config("quorum", "homo", **options)
    deployment.start_run(file)
    wait_for_round(deployment.root / "models" / "quorum", 1)
    deployment.stop("node-2")
    assert deployment.finish_run() == 4
    assert "usable updates of the 3" in deployment.log("run")
    assert "give the same command again" in deployment.log("run")
    deployment.start_node(2)
    done = deployment.run(file)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_simulated(deployment, "quorum", "homo", **options)
