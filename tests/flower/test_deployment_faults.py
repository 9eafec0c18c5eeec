"""Real processes killed in the middle of a round: what goes on, what is missing, what comes back."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from deployment import SIZES, Deployment
from test_deployment import adapters

from fedlora.config.train import TrainConfig
from fedlora.stages import train

pytestmark = pytest.mark.flower
LONG = 150
"""Local epochs after which a round has taken long enough to be interrupted."""


@pytest.fixture
def deployment(tmp_path_factory):
    from tiny_run import make_client_files, make_tiny_model

    root = tmp_path_factory.mktemp("f")
    data = make_client_files(root / "data", SIZES)
    made = Deployment(root, make_tiny_model(root / "model"), data)
    try:
        made.start_server()
        for client in range(len(SIZES)):
            made.start_node(client)
        yield made
    finally:
        made.stop_all()


def simulated(deployment: Deployment, name: str, mode: str, **changes: object) -> dict[str, str]:
    return adapters(train.run(TrainConfig.make({}, file=deployment.config(name, mode, **changes))).root)


def quarantined(deployment: Deployment, name: str, number: int) -> list[int]:
    manifest = json.loads((deployment.root / "models" / name / str(number) / "manifest.json").read_text())
    return [failure["client_id"] for failure in manifest["quarantined"]]


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
    assert adapters(deployment.root / "models" / "worker") == simulated(deployment, "here", "none", **options)


def test_the_superlink_is_killed_and_the_run_survives(deployment):
    options = {"local_num_epochs": LONG, "num_communication_rounds": 3}
    deployment.start_run(deployment.config("superlink", "homo", **options))
    wait_for_round(deployment.root / "models" / "superlink", 1)
    assert deployment.kill("server", "flower-superlink") == 1
    deployment.wait_for("server", "superlink ended with code -9")
    assert deployment.finish_run() == 0, deployment.log("run")
    assert adapters(deployment.root / "models" / "superlink") == simulated(deployment, "here", "homo", **options)


def test_the_server_app_is_killed_and_the_run_resumes_to_the_same_bytes(deployment):
    options = {"local_num_epochs": LONG, "num_communication_rounds": 3}
    file = deployment.config("serverapp", "homo", **options)
    deployment.start_run(file)
    wait_for_round(deployment.root / "models" / "serverapp", 1)
    assert deployment.kill("server", "flwr-serverapp") >= 1
    assert deployment.finish_run() == 4
    done = deployment.run(file)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on behind round" in done.stderr
    assert adapters(deployment.root / "models" / "serverapp") == simulated(deployment, "here", "homo", **options)


def test_a_node_that_is_killed_is_missing_for_its_round_and_takes_part_again_later(deployment):
    options = {"local_num_epochs": LONG, "num_communication_rounds": 14, "client_retries": 0}
    deployment.start_run(deployment.config("node", "homo", **options))
    run = deployment.root / "models" / "node"
    wait_for_round(run, 1)
    deployment.kill_all("node-2")
    began = time.monotonic()
    deployment.start_node(2)
    deployment.wait_for("run", "client 2 is left out of the round", 100)
    assert time.monotonic() - began < 90
    assert deployment.finish_run(400) == 0, deployment.log("run")[-3000:]
    missing = [number for number in range(1, 15) if quarantined(deployment, "node", number)]
    assert missing
    assert max(missing) < 14
    assert all(quarantined(deployment, "node", number) == [2] for number in missing)


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
    assert adapters(deployment.root / "models" / "quorum") == simulated(deployment, "here", "homo", **options)
