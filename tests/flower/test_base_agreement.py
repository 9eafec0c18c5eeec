"""Server and nodes agree on the base model by its identity, whatever they call it and wherever it lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from changed_bases import add_one, change_weights, put_into_hub_cache
from memory_grid import MemoryGrid
from small_federation import QUICK, SIZES, Federation, adapters, interrupted

from fedlora.engines.messages import pack, unpack
from fedlora.errors import TrainingError, UsageError
from fedlora.flower import server
from fedlora.flower.node import Node
from fedlora.flower.node_replies import NodeFacts, ask_facts, read_facts
from fedlora.flower.pool import Patience
from fedlora.llm.base_identity import identify


@pytest.fixture
def federation(tiny_model, make_clients, tmp_path):
    return Federation(tmp_path, make_clients(SIZES), tiny_model)


def at(federation: Federation, folder: Path) -> list[str]:
    """The base_models of a node that keeps the federation's base in `folder`."""
    return [f"{federation.model}={folder}"]


def grid_of(federation: Federation, folders: dict[int, Path]) -> MemoryGrid:
    more = {client: {"base_models": at(federation, folder)} for client, folder in folders.items()}
    return MemoryGrid({100 + client: federation.handler(client, **more.get(client, {})) for client in range(3)})


def recorded(run: Path) -> dict[str, str]:
    return json.loads((run / "run.json").read_text())["base_identity"]


def test_a_node_may_keep_the_base_at_another_place(federation, tmp_path):
    copy = Path(shutil.copytree(federation.model, tmp_path / "copy"))
    run = federation.serve("there", grid=grid_of(federation, {1: copy}))
    assert adapters(run) == adapters(federation.simulate("here"))
    assert recorded(run) == identify(federation.model).record()


def test_a_node_with_another_base_of_the_same_shapes_takes_no_part(federation, tmp_path, capsys):
    other = Path(shutil.copytree(federation.model, tmp_path / "other"))
    change_weights(other, "model.norm.weight", add_one)
    with pytest.raises(TrainingError, match=r"2 of 3 clients are there .* missing: \[1\]"):
        server.run(grid_of(federation, {1: other}), federation.config("there"), server.Waits(0.3, QUICK.wave))
    said = capsys.readouterr().err
    assert f"its identity is {identify(other)}, not {identify(federation.model)} (different: weights)" in said


def test_a_server_without_weights_records_those_of_its_nodes(federation, tmp_path, monkeypatch, capsys):
    name = "owner/name"
    snapshot = put_into_hub_cache(federation.model, name, tmp_path / "hub", monkeypatch)
    (snapshot / "model.safetensors").unlink()
    other = Path(shutil.copytree(federation.model, tmp_path / "other"))
    change_weights(other, "model.norm.weight", add_one)

    def serve(folder: Path, rounds: int, start: float) -> Path:
        places = {"base_models": [f"{name}={folder}"]}
        grid = federation.grid(**places)
        config = federation.config("there", base_model=name, num_communication_rounds=rounds, client_retries=0)
        return server.run(grid, config, server.Waits(start, Patience(poll=0.0, absent=0.05, wave=5.0))).root

    assert recorded(serve(federation.model, 1, 5.0)) == identify(federation.model).record()
    # the nodes of a run that resumes must have that base
    with pytest.raises(TrainingError, match="no client gave a usable update"):
        serve(other, 2, 0.3)
    assert "client 0 has another base model" in capsys.readouterr().err


def test_a_server_whose_base_has_moved_goes_on_and_another_base_is_refused(federation, tmp_path):
    moved = Path(shutil.copytree(federation.model, tmp_path / "moved"))
    interrupted(federation, "there", client_retries=0)
    change_weights(moved, "model.norm.weight", add_one)
    with pytest.raises(UsageError, match="is not the base that run there was trained on"):
        federation.serve("there", client_retries=0, base_model=str(moved))
    shutil.copy(federation.model / "model.safetensors", moved)
    run = federation.serve("there", client_retries=0, base_model=str(moved))
    assert adapters(run) == adapters(federation.simulate("here"))


@pytest.mark.parametrize("told", [None, {}, 7, {"weights": "x"}, {"weights": 7}, [["weights"]]])
def test_what_a_node_says_of_its_base_is_hashes_or_nothing(federation, told):
    header, _ = unpack(Node(federation.policy(0)).answer(ask_facts(federation.config("x"))))
    changed = {name: value for name, value in header.items() if name not in ("base", "tensors")}
    changed |= {} if told is None else {"base": told}
    if told:
        with pytest.raises(ValueError, match="identity of its base"):
            read_facts(pack(changed, {}))
    else:
        facts = read_facts(pack(changed, {}))
        assert isinstance(facts, NodeFacts)
        assert facts.base is None
