"""Nodes that answer badly, late, not at all or for somebody else: the round goes on, and says why they are missing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time

import pytest
import torch

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from memory_grid import Handler, MemoryGrid
from small_federation import BAD, QUICK, SIZES, Federation, adapters, arrives_at, instead, interrupted, is_training

from fedlora.engines.messages import pack, pack_outcome, unpack_outcome
from fedlora.errors import TrainingError, UsageError
from fedlora.flower import server
from fedlora.flower.codec import from_content, to_content
from fedlora.flower.messenger import _failure
from fedlora.flower.node_replies import read_facts
from fedlora.types import ClientFailure, ClientMemory, ClientUpdate


@pytest.fixture
def federation(tiny_model, make_clients, tmp_path):
    return Federation(tmp_path, make_clients(SIZES), tiny_model)


def with_update(change):
    """A node whose updates are changed before they leave."""

    def make(message: Message, answer: Message) -> Message:
        outcome, more = unpack_outcome(from_content(answer.content))
        return Message(to_content(pack_outcome(change(outcome), more)), reply_to=message)

    return instead(make)


def spoiled(update: ClientUpdate, value: float) -> ClientUpdate:
    upload = {key: tensor.clone() for key, tensor in update.upload.items()}
    next(iter(upload.values())).view(-1)[0] = value
    return dataclasses.replace(update, upload=upload)


def metric(**changes):
    return with_update(lambda update: dataclasses.replace(update, metrics={**update.metrics, **changes}))


def changed_payload(change):
    def make(message: Message, answer: Message) -> Message:
        array = answer.content["fedlora"]["message"]
        data = change(array.data)
        other = Array(dtype="uint8", shape=(len(data),), stype=array.stype, data=data)
        return Message(RecordDict({"fedlora": ArrayRecord({"message": other})}), reply_to=message)

    return instead(make)


def flower_error(code: int):
    return instead(lambda message, answer: Message(Error(code, "ValueError: SECRET ROW"), reply_to=message))


FAULTS = {
    "nan": (with_update(lambda update: spoiled(update, math.nan)), "invalid", "non-finite tensor"),
    "a wrong key": (
        with_update(lambda u: dataclasses.replace(u, upload={f"x{key}": t for key, t in u.upload.items()})),
        "invalid",
        "missing keys",
    ),
    "bfloat16": (
        with_update(lambda u: dataclasses.replace(u, upload={k: t.bfloat16() for k, t in u.upload.items()})),
        "invalid",
        "has type torch.bfloat16",
    ),
    "another client's name": (
        with_update(lambda update: dataclasses.replace(update, client_id=0)),
        "invalid",
        "cannot be read",
    ),
    "a client that is nearly a number": (
        with_update(lambda update: dataclasses.replace(update, client_id=float(BAD))),
        "invalid",
        "cannot be read",
    ),
    "a client that is true": (
        with_update(lambda update: dataclasses.replace(update, client_id=True)),
        "invalid",
        "cannot be read",
    ),
    "a round that is nearly a number": (
        with_update(lambda update: dataclasses.replace(update, round=1.0)),
        "invalid",
        "cannot be read",
    ),
    "metrics beyond every sum": (metric(loss=1e308, num_response_tokens=1e10), "invalid", "the metric loss is 1e+308"),
    "a metric beyond every float": (metric(loss=10**400), "invalid", "the metric loss is 1000"),
    "a long metric": (metric(loss="\x1b]0;owned\x07\n" * 200), "invalid", "the metric loss is"),
    "a key that drives a terminal": (
        with_update(lambda u: dataclasses.replace(u, upload={**u.upload, "\nx\x1b[2J": torch.zeros(1)})),
        "invalid",
        "1 unknown keys: x[2J",
    ),
    "a metric that is the round's": (metric(round=7), "invalid", "cannot be read"),
    "a metric that is text": (metric(loss="low"), "invalid", "the metric loss is 'low'"),
    "nothing sent": (
        with_update(lambda update: dataclasses.replace(update, upload=None, adapter_stays=True)),
        "invalid",
        "cannot be read",
    ),
    "its moments": (
        with_update(lambda u: dataclasses.replace(u, memory=ClientMemory(optimizer={"step": torch.ones(1)}))),
        "invalid",
        "cannot be read",
    ),
    "a wrong hash": (changed_payload(lambda data: data[:-1] + bytes([data[-1] ^ 1])), "invalid", "FrameError"),
    "half a message": (changed_payload(lambda data: data[: len(data) // 2]), "invalid", "FrameError"),
    "a huge message": (changed_payload(lambda data: data + bytes(4 << 20)), "invalid", "FrameError"),
    "something else": (
        instead(lambda message, answer: Message(RecordDict({"x": ConfigRecord({"a": 1})}), reply_to=message)),
        "invalid",
        "FrameError",
    ),
    "a message without sense": (
        instead(lambda message, answer: Message(to_content(b"[" * 100_000), reply_to=message)),
        "invalid",
        "cannot be read",
    ),
    "a kind nobody knows": (
        instead(
            lambda message, answer: Message(
                to_content(pack_outcome(ClientFailure(BAD, "\x1b[2Jbored", "x" * 9999), {})), reply_to=message
            )
        ),
        "crashed",
        "x" * 300,
    ),
    "an exception": (flower_error(2), "crashed", "Flower's code 2"),
    "a dead process": (flower_error(8), "lost", "app process died"),
    "a dead node": (flower_error(5), "lost", "not available"),
}


def one_of_each_reason():
    """By default one node for each thing that the server may find; the others are thorough."""
    seen: set[str] = set()
    for name, (_, kind, reason) in FAULTS.items():
        found = f"{kind} {'a metric' if 'metric' in reason else reason}"
        yield pytest.param(name, marks=pytest.mark.thorough) if found in seen else name
        seen.add(found)


@pytest.mark.parametrize("name", list(one_of_each_reason()))
def test_a_bad_answer_costs_its_client_the_round_and_nobody_else_anything(federation, name, capfd):
    how, kind, reason = FAULTS[name]
    grid = federation.grid({BAD: how})
    run = federation.serve("bad", grid=grid, num_communication_rounds=1, client_retries=0)
    manifest = json.loads((run / "1" / "manifest.json").read_text())
    (failure,) = manifest["quarantined"]
    assert (failure["client_id"], failure["kind"]) == (BAD, kind)
    assert reason in failure["reason"]
    assert len(failure["reason"]) <= 300
    assert failure["reason"].isprintable()
    assert not (run / "1" / f"client_{BAD}").exists()
    told = capfd.readouterr().err + json.dumps(manifest)
    assert "SECRET ROW" not in told
    assert "\x1b" not in told


def test_the_others_average_is_that_of_a_federation_without_the_bad_client(federation, monkeypatch):
    run = federation.serve("bad", grid=federation.grid({BAD: FAULTS["nan"][0]}), num_communication_rounds=1)
    honest = federation.simulate("honest", num_communication_rounds=1)
    for client in (0, 2):
        name = f"1/client_{client}/adapter_model.bin"
        assert adapters(run)[name] == adapters(honest)[name]
    assert adapters(run)["1/global_adapter_model.bin"] != adapters(honest)["1/global_adapter_model.bin"]


def test_silence_ends_with_the_wave_s_deadline(federation):
    waits = dataclasses.replace(QUICK, wave=dataclasses.replace(QUICK.wave, wave=0.3, poll=0.01))
    grid = federation.grid({BAD: instead(lambda message, answer: None)})
    config = federation.config("silent", num_communication_rounds=1, client_retries=0)
    began = time.monotonic()
    run = server.run(grid, config, waits).root
    assert time.monotonic() - began < 10
    (failure,) = json.loads((run / "1" / "manifest.json").read_text())["quarantined"]
    assert failure == {"client_id": BAD, "kind": "late", "reason": "no answer within 0.3 s"}


def test_whoever_is_asked_again_has_what_is_left_of_the_wave_s_time(federation):
    waits = dataclasses.replace(QUICK, wave=dataclasses.replace(QUICK.wave, wave=0.4, poll=0.01))
    heard = itertools.count()

    def dies(message: Message, answer: Message) -> Message:
        next(heard)
        time.sleep(0.15)
        return Message(Error(5, ""), reply_to=message)

    grid = federation.grid({BAD: instead(dies)})
    run = server.run(grid, federation.config("late", num_communication_rounds=1, client_retries=20), waits).root
    (failure,) = json.loads((run / "1" / "manifest.json").read_text())["quarantined"]
    assert failure == {"client_id": BAD, "kind": "late", "reason": "no answer within 0.4 s"}
    assert 1 <= next(heard) <= 4


def test_whoever_is_lost_is_asked_again_and_answers_from_its_store(federation):
    lost = itertools.count()

    def once(message: Message, answer: Message) -> Message:
        return Message(Error(5, ""), reply_to=message) if next(lost) == 0 else answer

    grid = federation.grid({BAD: instead(once)})
    run = federation.serve("again", grid=grid)
    assert adapters(run) == adapters(federation.simulate("here"))
    trained = [client for client, request in federation.asked if b'"kind": "train"' in request]
    assert trained.count(BAD) == 3


def test_late_answers_count_until_the_deadline(federation):
    grid = federation.grid()
    grid.late = 5
    assert adapters(federation.serve("late", grid=grid)) == adapters(federation.simulate("here"))


def test_a_node_that_leaves_is_missing_and_takes_part_again_when_it_is_back(federation):
    grid = federation.grid()
    gone = {}

    def leave(honest: Handler) -> Handler:
        def handle(message: Message) -> Message | None:
            answer = honest(message)
            if is_training(message) and 102 in grid.nodes and not gone:
                gone[102] = grid.nodes.pop(102)
            elif gone and 102 not in grid.nodes:
                grid.nodes[102] = gone[102]
            return answer

        return handle

    grid.nodes[100] = leave(grid.nodes[100])
    run = federation.serve("leaving", grid=grid, client_retries=0)
    first, second = (json.loads((run / n / "manifest.json").read_text())["quarantined"] for n in ("1", "2"))
    assert [failure["client_id"] for failure in first] == [2]
    assert "not available" in first[0]["reason"]
    assert second == []


def test_no_quorum_ends_the_run_and_it_goes_on_to_the_bytes_of_an_unbroken_one(federation):
    calls = itertools.count()

    def dies_later(message: Message, answer: Message) -> Message:
        return answer if next(calls) == 0 else Message(Error(5, ""), reply_to=message)

    grid = federation.grid({BAD: instead(dies_later)})
    with pytest.raises(TrainingError, match="round 2: 2 usable updates of the 3") as error:
        federation.serve("quorum", grid=grid, min_clients=3, client_retries=0)
    assert error.value.exit_code == 4
    run = federation.serve("quorum", min_clients=3)
    assert adapters(run) == adapters(federation.simulate("here"))


@pytest.mark.parametrize("mode", [pytest.param("none", marks=pytest.mark.thorough), "scaffold"])
def test_a_server_that_was_killed_goes_on_with_nodes_that_started_anew(federation, mode):
    here = federation.simulate("here", mode, num_communication_rounds=3)
    interrupted(federation, "there", mode, policy={"share_own_adapter": True}, num_communication_rounds=3)
    run = federation.serve("there", mode, federation.grid(share_own_adapter=True), num_communication_rounds=3)
    names = [name for name in adapters(here) if name.endswith(("adapter_model.bin", "state.safetensors"))]
    assert {name: adapters(run)[name] for name in names} == {name: adapters(here)[name] for name in names}


def test_clients_that_never_come_end_the_wait(federation):
    grid = MemoryGrid({100: federation.handler(0)})
    waits = dataclasses.replace(QUICK, start=0.2)
    with pytest.raises(TrainingError, match=r"1 of 3 clients are there after 0.2 s; missing: \[1, 2\]"):
        server.run(grid, federation.config("waiting"), waits)
    assert not (federation.root / "models" / "waiting").exists()


@pytest.mark.parametrize("names", [{}, {99: "client-9"}])
def test_a_refusal_of_a_node_that_is_none_of_the_run_s_ends_nothing(federation, names, monkeypatch):
    grid = federation.grid()
    grid.nodes[99] = federation.handler(0, client_id=9, max_lora_r=2)
    grid.names = names
    # after the refusal
    arrives_at(grid, 102, 5, monkeypatch)
    federation.serve("others", grid=grid, lora_r=4, num_communication_rounds=1)


@pytest.mark.parametrize("client", ["x", None, 0.0, True])
def test_a_failure_of_nobody_is_no_answer(client):
    payload = pack({"failure": {"client_id": client, "kind": "refused", "reason": "no"}, "more": {}}, {})
    with pytest.raises(ValueError, match="not a whole number"):
        read_facts(payload)


def test_a_regular_expression_that_no_node_would_match_is_refused_at_the_start(federation):
    config = federation.config("pattern", lora_target_modules=["re:.*_proj"])
    with pytest.raises(UsageError, match="no regular expression of a server"):
        server.run(federation.grid(), config, QUICK)
    run = federation.serve("stars", lora_target_modules=["*.1.mlp.*"])
    found = json.loads((run / "1" / "adapter_config.json").read_text())
    assert found["target_modules"] == [f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")]


def test_a_refusal_ends_the_wait_at_once(federation):
    waits = dataclasses.replace(QUICK, start=60.0)
    grid = federation.grid(max_lora_r=2)
    grid.names = {101: "client-1"}
    began = time.monotonic()
    with pytest.raises(TrainingError, match=r"refuses this run: .*client-1: lora_r=4 is above this node's bound"):
        server.run(grid, federation.config("greedy", lora_r=4), waits)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("names", "reason"),
    [({103: "client-9"}, "registered as client-9"), ({}, "client 0 is node 100 already")],
)
def test_a_second_node_cannot_take_a_client_s_place(federation, names, reason, capsys):
    grid = federation.grid()
    grid.nodes[103] = federation.handler(0)
    grid.names = names
    federation.serve("twice", grid=grid, num_communication_rounds=1)
    assert f"{names.get(103, 'node 103')} takes no part: " in (told := capsys.readouterr().err)
    assert reason in told


def test_a_node_with_another_model_takes_no_part(federation, capsys):
    from fedlora.flower.node_replies import read_facts

    def lie(honest: Handler) -> Handler:
        def handle(message: Message) -> Message | None:
            answer = honest(message)
            if is_training(message):
                return answer
            payload = from_content(answer.content)
            read_facts(payload)
            header = json.loads(payload.partition(b"\n")[0])["header"]
            return Message(to_content(pack({**header, "shapes": "0" * 64}, {})), reply_to=message)

        return handle

    waits = dataclasses.replace(QUICK, start=0.2)
    with pytest.raises(TrainingError, match="2 of 3 clients"):
        server.run(federation.grid({BAD: lie}), federation.config("other"), waits)
    assert "another base model" in capsys.readouterr().err


def test_rows_are_never_brought_together(federation):
    with pytest.raises(UsageError, match="pooled"):
        federation.serve("pooled", "pooled")


def test_the_shim_s_failure_is_what_the_codec_writes():
    assert unpack_outcome(_failure("lost", "why")) == (ClientFailure(0, "lost", "why"), {})


class FaultyGrid(MemoryGrid):
    """One whose server goes away: `faults` names what each call of a kind raises, call by call, None for nothing."""

    def __init__(self, grid: MemoryGrid, **faults) -> None:
        super().__init__(grid.nodes)
        self.faults = {name: iter(errors) for name, errors in faults.items()}

    def _raise(self, name: str) -> None:
        if (error := next(self.faults.get(name, iter(())), None)) is not None:
            raise error

    def get_nodes(self):
        self._raise("get_nodes")
        return super().get_nodes()

    def push_messages(self, messages):
        self._raise("push")
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        self._raise("pull")
        return super().pull_messages(message_ids)


def test_a_server_that_goes_away_between_any_two_calls_costs_nobody_a_round(federation):
    import httpx
    from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

    gone = [httpx.ConnectError("gone"), None, httpx.ReadTimeout("slow"), ConnectionResetError(), None, None] * 3
    forgotten = [None, ObjectPushError("object", 1, "session"), None, ObjectPushError("object", 1, "session")] * 4
    grid = FaultyGrid(federation.grid(), get_nodes=gone, push=forgotten, pull=gone)
    waits = dataclasses.replace(QUICK, wave=dataclasses.replace(QUICK.wave, poll=0.0))
    run = server.run(grid, federation.config("away"), waits).root
    manifests = [json.loads((run / number / "manifest.json").read_text()) for number in ("1", "2")]
    assert [manifest["quarantined"] for manifest in manifests] == [[], []]
    assert adapters(run) == adapters(federation.simulate("here"))


def test_a_reply_that_cannot_be_unpacked_is_its_sender_s_fault_alone(federation):
    from flwr.supercore.inflatable.inflatable_object import UnexpectedObjectContentError

    class Unpacking(MemoryGrid):
        def pull_messages(self, message_ids):
            found = super().pull_messages(message_ids)
            for message in found:
                if message.metadata.src_node_id == 100 + BAD and self.sent[-1].metadata.message_type == "train":
                    raise UnexpectedObjectContentError("object", "not what it says")
            return found

    run = federation.serve("spoiled", grid=Unpacking(federation.grid().nodes), num_communication_rounds=1)
    (failure,) = json.loads((run / "1" / "manifest.json").read_text())["quarantined"]
    assert failure == {"client_id": BAD, "kind": "invalid", "reason": "its reply cannot be unpacked"}
