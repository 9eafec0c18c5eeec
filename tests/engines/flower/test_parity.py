"""Nodes of a Grid give the bytes of a simulation, and only what may travel does."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from small_federation import SIZES, Federation, adapters

from fedlora.config.runs import VerifyConfig
from fedlora.federated.adapters import fingerprint, shapes_of
from fedlora.llm.adapter_files import BIN_NAME, load_adapter
from fedlora.stages import verify


@pytest.fixture
def federation(tiny_model, make_clients, tmp_path):
    return Federation(tmp_path, make_clients(SIZES), tiny_model)


def shared(files: dict[str, str]) -> dict[str, str]:
    """What the server has in both: global adapters and its state."""
    return {name: digest for name, digest in files.items() if name.count("/") == 1}


@pytest.mark.parametrize("mode", ["homo", "seq", "scaffold", "fedadam", "rolora"])
def test_nodes_give_the_bytes_of_a_simulation(federation, mode):
    here = adapters(federation.simulate("here", mode))
    there = federation.serve("there", mode)
    assert shared(adapters(there)) == shared(here)
    assert {name for name in adapters(there) if name.endswith(".bin")} == {
        name for name in here if name.endswith(".bin")
    }
    assert all(here[name] == digest for name, digest in adapters(there).items() if name.endswith(".bin"))
    assert not list(there.rglob("private"))
    verify.run(VerifyConfig.of(exp_name="there", model_dir=there.parent))


@pytest.mark.parametrize("mode", ["none", "fedsa"])
def test_an_adapter_of_the_client_s_own_stays_with_it(federation, mode):
    here = federation.simulate("here", mode)
    there = federation.serve("there", mode)
    assert shared(adapters(there)) == shared(adapters(here))
    assert not list(there.rglob("client_*/adapter_model.*"))
    for client, node in federation.nodes.items():
        kept = node._run.store.read_memory(client, 2).adapter
        own = load_adapter(here / "2" / f"client_{client}" / BIN_NAME, shapes_of(kept))
        assert fingerprint(kept) == fingerprint(own)
    verify.run(VerifyConfig.of(exp_name="there", model_dir=there.parent))


@pytest.mark.parametrize("mode", ["none", "fedsa"])
def test_an_owner_may_let_its_adapter_out(federation, mode):
    here = federation.simulate("here", mode)
    there = federation.serve("there", mode, federation.grid(share_own_adapter=True))
    assert adapters(there) == adapters(here)
    verify.run(VerifyConfig.of(exp_name="there", model_dir=there.parent))


def test_kept_moments_stay_with_the_client(federation):
    here = federation.simulate("here", optimizer_state="keep")
    there = federation.serve("there", optimizer_state="keep")
    assert shared(adapters(there)) == shared(adapters(here))
    assert not list(there.rglob("private"))


def test_rows_held_back_are_validated_where_they_lie(federation):
    here = federation.simulate("here", local_val_set_size=1)
    there = federation.serve("there", local_val_set_size=1)
    assert shared(adapters(there)) == shared(adapters(here))
    rows = [json.loads(line) for line in (there / "metrics.jsonl").read_text().splitlines()]
    told = [row for row in rows if row["kind"] == "client"]
    assert len(told) == 6
    assert all(row["val_loss_before"] != row["val_loss_after"] for row in told)
