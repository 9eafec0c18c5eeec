"""Signals whose exception gets lost: in the server's process, whose handlers are Flower's, and in a node's worker."""

from __future__ import annotations

import itertools
import signal

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from lost_signals import lose_signal
from small_federation import SIZES, Federation, adapters

from fedlora.flower import post, server
from fedlora.flower.node import Node
from fedlora.flower.node_replies import ask_facts
from fedlora.flower.request import make_request
from fedlora.stopping import stop_on_signals

pytestmark = pytest.mark.usefixtures("handlers")


@pytest.fixture
def federation(tiny_model, make_clients, tmp_path):
    return Federation(tmp_path, make_clients(SIZES), tiny_model)


@pytest.mark.parametrize("place", ["pool.read_update", "roster.read_facts"])
def test_a_reply_whose_reading_a_signal_ended_is_no_fault_of_its_node(federation, monkeypatch, capsys, place):
    """As under Flower, whose handler has done its work when the exception is lost."""

    def gracefully(number, frame):
        raise SystemExit(0)

    def losing(*arguments):
        lose_signal(ValueError("could not determine the shape"))

    request = make_request(federation.config("there"), start=5.0, absent=0.05, wave=5.0)
    signal.signal(signal.SIGTERM, gracefully)
    with monkeypatch.context() as patch:
        patch.setattr(f"fedlora.flower.{place}", losing)
        with pytest.raises(SystemExit) as stopped:
            server.serve(federation.grid(), request)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "cannot be read" not in capsys.readouterr().err
    server.serve(federation.grid(), request)
    assert adapters(federation.root / "models" / "there") == adapters(federation.simulate("here"))


@pytest.mark.parametrize(
    "act", [lambda grid: post.push(grid, 100, b"", "query", 1.0), lambda grid: list(post.pull(grid, ["1"]))]
)
def test_a_message_on_whose_way_a_signal_came_is_not_tried_again(federation, monkeypatch, act):
    grid, calls = federation.grid(), itertools.count()

    def losing(*arguments):
        next(calls)
        lose_signal(ValueError("no message"))

    monkeypatch.setattr(grid, "push_messages", losing)
    monkeypatch.setattr(grid, "pull_messages", losing)
    with pytest.raises(SystemExit), stop_on_signals():
        act(grid)
    assert next(calls) == 1


def test_a_node_that_is_stopped_does_not_say_that_it_crashed(federation, monkeypatch):
    node = Node(federation.policy(0))
    monkeypatch.setattr(node, "_open", lambda asked: lose_signal(ValueError("could not determine the shape")))
    with pytest.raises(SystemExit), stop_on_signals():
        node.answer(ask_facts(federation.config("there")))
