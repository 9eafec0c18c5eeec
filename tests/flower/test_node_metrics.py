"""Private metrics across machines: the numbers of a simulation, where owners allow them, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from flwr.app import Message
from memory_grid import Handler
from small_federation import SIZES, Federation

from fedlora.engines.messages import pack, unpack
from fedlora.flower.codec import to_content

ASKED = {"private_metrics": "loss,exact", "private_metrics_min": 3, "private_metrics_tokens": 3}
ALLOWED = {"private_metrics": ["loss", "exact", "chrf"], "private_metrics_min": 3}
CANARY = "CANARY-77b2"


@pytest.fixture
def federation(tiny_model: Path, make_clients: Any, tmp_path: Path) -> Federation:
    data = make_clients(SIZES)
    for client in range(len(SIZES)):
        rows = [{"instruction": f"say {client} {number}", "output": f"red {CANARY} {number}"} for number in range(4)]
        file = data / str(len(SIZES)) / f"{client}.test.json"
        file.write_text(json.dumps(rows))
    return Federation(tmp_path, data, tiny_model)


def lines(run: Path) -> dict[tuple[int, int], dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(row["round"], row["client_id"]): row for row in rows if row["kind"] == "private"}


@pytest.mark.parametrize(
    "mode", ["homo", *(pytest.param(one, marks=pytest.mark.thorough) for one in ("none", "flora"))]
)
def test_nodes_give_the_numbers_of_a_simulation(federation: Federation, mode: str) -> None:
    here = federation.simulate("here", mode, **ASKED)
    there = federation.serve("there", mode, federation.grid(**ALLOWED), **ASKED)
    assert lines(there) == lines(here)
    assert len(lines(here)) == len(SIZES)
    models = lines(there)[2, 0]["models"]
    assert set(models) == ({"base", "personal"} if mode == "none" else {"base", "global", "personal"})


def test_without_the_owner_s_leave_a_node_trains_and_gives_no_number(federation: Federation) -> None:
    grid = federation.grid()
    grid.nodes[102] = federation.handler(2, private_metrics=["loss"], private_metrics_min=4)
    there = lines(federation.serve("there", "homo", grid, **ASKED))
    for client in (0, 1):
        assert there[2, client]["withheld"] == "the owner of this node allows none of these private metrics"
    assert set(there[2, 2]["models"]["base"]) == {"loss"}, "what the owner allows is given"


def test_an_owner_s_own_minimum_holds(federation: Federation) -> None:
    grid = federation.grid(**{**ALLOWED, "private_metrics_min": 5})
    there = lines(federation.serve("there", "homo", grid, **ASKED))
    assert {line["withheld"] for line in there.values()} == {"fewer than 5 test rows with different prompts"}


@pytest.mark.thorough
def test_no_text_of_a_test_row_is_in_a_reply(federation: Federation) -> None:
    federation.serve("there", "homo", federation.grid(**ALLOWED), **ASKED)
    client, request = federation.asked[-1]
    assert unpack(request)[0]["more"]["kind"] == "measure"
    assert CANARY.encode() not in federation.nodes[client].answer(request)


LIES = {
    "too few rows": {"num_rows": 2, "num_prompts": 2, "models": {}, "differences": {}},
    "a row's text": {"num_rows": 4, "num_prompts": 4, "models": {}, "differences": {}, "text": CANARY},
    "a metric nobody asked for": {
        **{"num_rows": 4, "num_prompts": 4, "differences": {}},
        "models": {"base": {"f1": {"mean": 0.5, "se": 0.1}}},
    },
}


@pytest.mark.thorough
@pytest.mark.parametrize("lie", LIES)
def test_a_reply_that_breaks_the_rules_is_not_recorded(federation: Federation, lie: str) -> None:
    def lies(honest: Handler) -> Handler:
        def answer(message: Message) -> Message | None:
            reply = honest(message)
            if unpack(federation.asked[-1][1])[0]["more"]["kind"] != "measure":
                return reply
            return Message(to_content(pack({"numbers": LIES[lie]}, {})), reply_to=message)

        return answer

    run = federation.serve("there", "homo", federation.grid({1: lies}, **ALLOWED), **ASKED)
    assert lines(run)[2, 1]["withheld"] == "its node's numbers are not what was asked for"
    assert "models" in lines(run)[2, 0]
    assert CANARY not in (run / "metrics.jsonl").read_text()
