"""A run that goes on: for which nodes it waits, for how long, and for which it does not."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from memory_grid import MemoryGrid
from small_federation import QUICK, SIZES, Federation, adapters, arrives_at, interrupted

from fedlora.errors import UsageError
from fedlora.flower import server
from fedlora.flower.pool import Patience


@pytest.fixture
def federation(tiny_model, make_clients, tmp_path):
    return Federation(tmp_path, make_clients(SIZES), tiny_model)


def quarantined(run: Path, number: int) -> list[dict[str, Any]]:
    return json.loads((run / str(number) / "manifest.json").read_text())["quarantined"]


def served_again(federation: Federation, name: str, grid: MemoryGrid, patience: Patience, **changes) -> Path:
    config = federation.config(name, client_retries=0, **changes)
    return server.run(grid, config, dataclasses.replace(QUICK, wave=patience)).root


def test_a_run_that_goes_on_waits_for_its_nodes(federation, monkeypatch):
    interrupted(federation, "there", client_retries=0)
    grid = federation.grid()
    looks = arrives_at(grid, 102, 20, monkeypatch)
    run = served_again(federation, "there", grid, Patience(poll=0.0, absent=0.0, wave=5.0, again=5.0))
    assert next(looks) > 20
    assert adapters(run) == adapters(federation.simulate("here"))


def test_a_run_that_goes_on_does_not_wait_for_ever_and_not_at_all_when_it_is_done(federation, capsys):
    interrupted(federation, "there", client_retries=0)
    grid = federation.grid()
    gone = grid.nodes.pop(102)
    patience = Patience(poll=0.0, absent=0.0, wave=5.0, again=0.2)
    run = served_again(federation, "there", grid, patience)
    assert "clients [2] are not connected after 0.2 s" in capsys.readouterr().err
    assert [failure["client_id"] for failure in quarantined(run, 2)] == [2]
    began = time.monotonic()
    served_again(federation, "there", MemoryGrid({}), dataclasses.replace(patience, again=60.0))
    assert time.monotonic() - began < 30
    # a run that grew is one that goes on
    grid.nodes[102] = gone
    assert not quarantined(served_again(federation, "there", grid, patience, num_communication_rounds=3), 3)


def test_a_node_that_is_still_loading_its_model_is_not_away(federation):
    interrupted(federation, "there", client_retries=0)
    grid = federation.grid()
    grid.names = {100 + client: f"client-{client}" for client in range(len(SIZES))}
    grid.late = 30
    run = served_again(federation, "there", grid, Patience(poll=0.0, absent=0.0, wave=5.0))
    assert adapters(run) == adapters(federation.simulate("here"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"run_id": 7}'])
def test_a_run_whose_name_at_the_nodes_is_damaged_is_refused_before_anybody_is_asked(federation, content):
    """Under another name the nodes would have no memory of it."""
    federation.serve("there", "none", num_communication_rounds=1)
    file = federation.root / "models" / "there" / "nodes.json"
    whole, asked = file.read_text(), len(federation.asked)
    file.write_text(content)
    with pytest.raises(UsageError, match=r"nodes\.json: "):
        federation.serve("there", "none")
    assert len(federation.asked) == asked
    file.write_text(whole)
    federation.serve("there", "none")


def test_a_server_needs_no_weights_of_the_base(federation, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(federation.model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    grid = federation.grid(base_models=[f"{bare}={federation.model}"])
    run = federation.serve("bare", "homo", grid, base_model=str(bare))
    assert adapters(run) == adapters(federation.simulate("here"))
    with pytest.raises(UsageError, match="no weights"):
        federation.simulate("nowhere", base_model=str(bare))
