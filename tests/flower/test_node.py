"""One owner's node: what it refuses, what it keeps, what it lets out, and the socket of its worker."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from small_federation import SIZES, Federation
from torch.multiprocessing.reductions import StorageWeakRef

from fedlora.engines.messages import pack, unpack_outcome
from fedlora.errors import LockedError, UsageError
from fedlora.federated.adapters import make_adapter
from fedlora.flower import worker
from fedlora.flower.codec import from_content, to_content
from fedlora.flower.frames import frame
from fedlora.flower.guard import BundleRefusedError, bundle_folder, guard_install, make_bundle
from fedlora.flower.messenger import handle, reply
from fedlora.flower.node import Node
from fedlora.flower.node_config import NodeConfig
from fedlora.flower.node_replies import ask_facts, ask_update, read_facts
from fedlora.flower.policy import accept_config
from fedlora.llm.base_model import load_outline
from fedlora.llm.lora import LoraModel, LoraSpec
from fedlora.types import ClientFailure, ClientUpdate, Download, TrainTask

CANARY = "CANARY-55e1"


@pytest.fixture
def federation(tiny_model, make_clients, tmp_path):
    data = make_clients(SIZES)
    for file in data.rglob("local_training_*.json"):
        rows = json.loads(file.read_text())
        rows[-1]["output"] += f" {CANARY}"
        file.write_text(json.dumps(rows))
    return Federation(tmp_path, data, tiny_model)


@pytest.fixture
def start(tiny_model):
    """An untrained adapter of the tiny model."""
    base = load_outline(str(tiny_model), device="cpu", dtype="float32")
    return make_adapter(LoraModel(base.model, LoraSpec(4, 16, 4.0, 0.0, ("q_proj", "v_proj"), False)).shapes(), 42)


def task_of(start, number: int = 1, accepted: int | None = None, **changes) -> TrainTask:
    fields = {"id": f"task-{number}", "round": number, "wave": 0, "client_id": 0, "rows_of": (0,), **changes}
    return TrainTask(**fields, download=Download(start), accepted=accepted)


def answer(node: Node, task: TrainTask, config) -> ClientUpdate | ClientFailure:
    return unpack_outcome(node.answer(ask_update(task, config)))[0]


REFUSED = {
    "rank": ({"lora_r": 65}, {}, "lora_r=65 is above this node's bound of 64"),
    "epochs": ({"local_num_epochs": 11}, {}, "local_num_epochs=11 is above"),
    "rounds": ({"num_communication_rounds": 1001}, {}, "num_communication_rounds=1001 is above"),
    "length": ({"cutoff_len": 4097}, {}, "cutoff_len=4097 is above"),
    "model": ({"base_model": "someone/else"}, {}, "base_model='someone/else' is not allowed"),
    "method": ({"federation_mode": "seq"}, {"federation_modes": ["homo"]}, "federation_mode=seq is not allowed"),
    "pooled": ({"federation_mode": "pooled"}, {}, "no row leaves this node"),
    "foreign code": ({"trust_remote_code": True}, {}, "runs no code"),
    "a loss of few rows": ({"local_val_set_size": 1}, {"min_examples": 2}, "local_val_set_size=1 is below"),
    "only the last step": ({"weight_decay": 100.0}, {}, "local_learning_rate times weight_decay is 1 or more"),
    "a pass of any size": ({"tokens_per_pass": 65_537}, {}, "tokens_per_pass=65537 is above this node's bound"),
    "a pattern that takes ages": ({"lora_target_modules": ["re:(.+)+x"]}, {}, "no expressions after re:"),
    "few rows": ({}, {"min_examples": 4}, "fewer rows to train on than the 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_beyond_the_owner_s_bounds_is_refused_with_its_reason(federation, name):
    asked, bounds, reason = REFUSED[name]
    node = Node(federation.policy(0, **bounds))
    told = read_facts(node.answer(ask_facts(federation.config("x", **asked))))
    assert isinstance(told, ClientFailure)
    assert told.kind == "refused"
    assert reason in told.reason


def test_a_run_cannot_say_which_columns_of_the_owner_are_trained_on(federation):
    asked = federation.config("x", columns="instruction=patient,response=secret", row_kind="instruction").record()
    theirs = accept_config(federation.policy(0), asked)
    assert (dict(theirs.columns), theirs.row_kind) == ({}, "auto")
    ours = accept_config(federation.policy(0, columns="instruction=question", row_kind="instruction"), asked)
    assert (dict(ours.columns), ours.row_kind) == ({"instruction": "question"}, "instruction")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"client_id": 1}, "this node is client 0"),
        ({"rows_of": (0, 1)}, "trains only on this client"),
        ({"number": 3}, "round 3 is not one of the run's 2"),
        ({"accepted": 1}, "not before its own"),
        ({"client_id": 0.0}, "not whole ones"),
        ({"rows_of": (False,)}, "not whole ones"),
        ({"number": 1.0}, "not whole ones"),
        ({"number": 2, "accepted": True}, "not whole ones"),
    ],
)
def test_a_task_for_somebody_else_is_refused(federation, start, changes, reason):
    told = answer(Node(federation.policy(0)), task_of(start, **changes), federation.config("x"))
    assert told.kind == "refused"
    assert reason in told.reason


def test_a_run_cannot_name_the_rows_or_the_device(federation, start, tmp_path):
    other = tmp_path / "other.json"
    other.write_text("[]")
    config = federation.config("x", data_path=other, device="cuda:7")
    assert isinstance(answer(Node(federation.policy(0)), task_of(start), config), ClientUpdate)
    request = pack({"more": {"kind": "facts", "config": {**config.record(), "data_path": str(other)}}}, {})
    assert read_facts(Node(federation.policy(0)).answer(request)).facts.num_examples == SIZES[0]


@pytest.mark.parametrize("request_", [b"", b"[]", b"\xff" * 99, b"[" * 100_000, pack({"more": {"kind": "train"}}, {})])
def test_a_request_without_sense_is_a_failure_and_the_node_lives(federation, start, request_):
    node = Node(federation.policy(0))
    assert unpack_outcome(node.answer(request_))[0].kind == "crashed"
    assert isinstance(answer(node, task_of(start), federation.config("x")), ClientUpdate)


def test_the_model_of_one_run_has_left_memory_when_that_of_the_next_comes(federation, start, monkeypatch):
    from fedlora.flower import node as module

    node = Node(federation.policy(0))
    kept, alive = [], []
    make = module.make_workbench

    def watched(*arguments, **options):
        alive.append([not weight.expired() for weight in kept])
        bench = make(*arguments, **options)
        kept.extend(StorageWeakRef(parameter.untyped_storage()) for parameter in bench.base.model.parameters())
        return bench

    monkeypatch.setattr(module, "make_workbench", watched)
    for name in ("first", "second", "third"):
        # without a budget of its own a run counts what a token takes, on a pass through the model
        config = federation.config(name, tokens_per_pass=None)
        assert isinstance(answer(node, task_of(start), config), ClientUpdate)
    assert [any(of_then) for of_then in alive] == [False] * 3
    assert len(alive[2]) > len(alive[1]) > 0


def test_the_same_update_asked_for_twice_is_trained_once(federation, start, monkeypatch):
    node, config = Node(federation.policy(0)), federation.config("x")
    first = node.answer(ask_update(task_of(start), config))
    # another process, and one that could not train
    again = Node(federation.policy(0))
    monkeypatch.setattr("fedlora.engines.simulation.SimulatedClients.train_one", None)
    assert again.answer(ask_update(task_of(start), config)) == first


def test_an_update_that_was_not_accepted_never_counts(federation, start):
    config = federation.config("x", "none", num_communication_rounds=3)
    node = Node(federation.policy(0, share_own_adapter=True))
    first = answer(node, task_of(start, 1), config)
    # the second round's update is made and lost on the way: the third starts from the first
    answer(node, task_of(start, 2, accepted=1), config)
    third = answer(node, task_of(start, 3, accepted=1), config)
    fresh = Node(federation.policy(0, share_own_adapter=True))
    assert answer(fresh, task_of(start, 3, accepted=1), config).started_from == third.started_from
    from fedlora.federated.adapters import fingerprint

    assert third.started_from == fingerprint(first.memory.adapter)


def test_memory_that_is_gone_or_damaged_is_a_failure_and_not_a_new_beginning(federation, start):
    config = federation.config("x", "none")
    node = Node(federation.policy(0))
    answer(node, task_of(start, 1), config)
    (file,) = (federation.root / "nodes" / "0").rglob("1.update")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    told = answer(node, task_of(start, 2, accepted=1), config)
    assert told.kind == "data"
    assert str(federation.root) not in told.reason


def test_old_memory_is_forgotten_and_what_a_resumption_may_need_is_kept(federation, start):
    config = federation.config("x", num_communication_rounds=9)
    node = Node(federation.policy(0, keep_rounds=2))
    for number in range(1, 8):
        answer(node, task_of(start, number, accepted=number - 1 or None), config)
    kept = sorted(int(file.stem) for file in (federation.root / "nodes" / "0").rglob("*.update"))
    assert kept == [4, 5, 6, 7]


def test_what_is_never_accepted_does_not_pile_up(federation, start):
    config = federation.config("x", num_communication_rounds=9)
    node = Node(federation.policy(0, keep_rounds=2))
    for number in range(1, 8):
        answer(node, task_of(start, number), config)
    kept = sorted(int(file.stem) for file in (federation.root / "nodes" / "0").rglob("*.update"))
    assert kept == [5, 6, 7]


def test_a_new_run_is_refused_while_earlier_ones_fill_the_node(federation, start):
    small = {"max_state_gb": 1e-6}
    first = federation.config("first")
    assert isinstance(answer(Node(federation.policy(0, **small)), task_of(start), first), ClientUpdate)
    again = Node(federation.policy(0, **small))
    assert answer(again, task_of(start), federation.config("second")) == ClientFailure(
        0, "refused", "this node keeps as much of earlier runs as its owner lets it"
    )
    # the one that has its place goes on
    assert isinstance(answer(again, task_of(start, 2, accepted=1), first), ClientUpdate)


def test_what_is_the_client_s_alone_is_not_sent_because_a_server_asks_for_it(federation, start):
    """In `finetune` some rounds send and others keep; which is which is not the server's choice after the fact."""
    node, config = Node(federation.policy(0)), federation.config("x", "finetune", personal_rounds=1)
    keeps = replace(task_of(start), download=Download(start, travels="both", shared=None))
    kept = answer(node, keeps, config)
    assert (kept.upload, kept.adapter_stays) == (None, True)
    wants = replace(task_of(start, 2, accepted=1), download=Download(start, travels=None, shared="both"))
    assert answer(node, wants, config).kind == "crashed"


def test_what_is_kept_for_one_run_is_not_for_another_that_computes_the_same(federation, start):
    """Two folders of runs with one experiment's name: the memory of the one is not where the other starts."""
    node, config = Node(federation.policy(0)), federation.config("x", "none")

    def ask(run_id: str, number: int, accepted: int | None = None) -> ClientUpdate | ClientFailure:
        request = ask_update(task_of(start, number, accepted), config, run_id=run_id)
        return unpack_outcome(node.answer(request))[0]

    assert isinstance(ask("a", 1), ClientUpdate)
    assert ask("b", 2, accepted=1).kind == "data"
    assert isinstance(ask("a", 2, accepted=1), ClientUpdate)


@pytest.mark.parametrize("mode", ["homo", "none", "scaffold", "fedsa"])
def test_no_word_of_a_row_is_in_any_message(federation, mode):
    heard: list[bytes] = []
    grid = federation.grid()
    for number, handler in list(grid.nodes.items()):

        def listen(message, handler=handler):
            reply = handler(message)
            heard.append(from_content(reply.content))
            return reply

        grid.nodes[number] = listen
    federation.serve("listened", mode, grid)
    assert len(heard) == 9
    assert not any(CANARY.encode() in message for message in heard)
    assert not any(b"local_training" in message or str(federation.data).encode() in message for message in heard)


def test_a_broken_row_is_told_to_the_owner_and_not_to_the_server(federation, start, capsys):
    file = federation.data / str(len(SIZES)) / "local_training_0.json"
    file.write_text(f'[{{"instruction": "{CANARY}", "output": 7}}]')
    told = answer(Node(federation.policy(0)), task_of(start), federation.config("x"))
    assert told == ClientFailure(
        0, "data", "its data cannot be used, or has changed; the log of the node has the details"
    )
    assert "local_training_0.json" in capsys.readouterr().err


def test_rows_that_are_left_out_are_named_to_the_owner_once(federation, start, capsys):
    file = federation.data / str(len(SIZES)) / "local_training_0.json"
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([{"instruction": CANARY, "output": 7}, *rows]))
    node, config = Node(federation.policy(0)), federation.config("x", skip_bad=1)
    for number in (1, 2):
        assert isinstance(answer(node, task_of(start, number), config), ClientUpdate)
    told = capsys.readouterr().err
    assert told.count("local_training_0.json") == told.count("the row is left out (1 of at most 1)") == 1


def test_what_a_node_tells_of_its_file_cannot_be_looked_up(federation):
    from fedlora.files import sha256_of

    config = federation.config("x")
    facts = [read_facts(Node(federation.policy(0, **more)).answer(ask_facts(config))).facts for more in ({}, {})]
    assert facts[0] == facts[1]
    assert facts[0].sha256 != sha256_of(federation.policy(0).data_path)
    assert facts[0].categories == {}


@pytest.fixture
def served(tmp_path):
    """A worker that turns its requests round, on a socket; returns path and what it was asked."""
    path, asked, stop = tmp_path / "s" / "worker.sock", [], threading.Event()

    def turn(request: bytes) -> bytes:
        asked.append(request)
        return request[::-1]

    thread = threading.Thread(target=worker.serve, args=(path, turn, 1000), kwargs={"until": stop.is_set})
    thread.start()
    while not path.exists():
        time.sleep(0.01)
    yield path, asked
    stop.set()
    thread.join()
    assert not path.exists()


def ask(path, request: bytes) -> bytes:
    return worker.ask(path, request, 1000, connect_seconds=0.1, answer_seconds=5)


def test_a_worker_answers_on_a_socket_that_is_its_owner_s(served):
    path, _ = served
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ask(path, b"abc") == b"cba"


def test_what_is_too_large_or_cut_is_dropped_and_the_worker_lives(served):
    import socket

    path, asked = served
    with pytest.raises((EOFError, OSError)):
        ask(path, b"x" * 1001)
    with socket.socket(socket.AF_UNIX) as half:
        half.connect(str(path))
        half.sendall(frame(b"abc")[:-1])
    assert ask(path, b"abc") == b"cba"
    assert asked == [b"abc"]


def test_a_second_worker_is_refused_and_the_socket_of_a_dead_one_is_not_in_the_way(served, tmp_path):
    import socket

    path, _ = served
    with pytest.raises(LockedError):
        worker.serve(path, bytes, 10, until=lambda: True)
    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(dead))
    worker.serve(dead, bytes, 10, until=lambda: True)
    with pytest.raises(UsageError, match="too long"):
        worker.serve(tmp_path / ("x" * 100) / "w", bytes, 10, until=lambda: True)


def test_the_shim_hands_bytes_on_and_keeps_the_words_of_errors(served, capsys):
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    path, _ = served
    message = Message(to_content(b"abc"), 1, "train")
    settings = {"socket": str(path), "max-message-mb": 1}
    context = Context(1, 1, settings, RecordDict(), {})
    assert from_content(handle(message, context).content) == b"cba"
    settings["socket"] = str(path.with_name("SECRET.sock"))
    import fedlora.flower.messenger as client

    client_seconds, client.CONNECT_SECONDS = client.CONNECT_SECONDS, 0.0
    try:
        payload = from_content(handle(message, context).content)
    finally:
        client.CONNECT_SECONDS = client_seconds
    failure = unpack_outcome(payload)[0]
    assert failure.kind == "lost"
    assert b"SECRET" not in payload
    assert "Traceback" in capsys.readouterr().err


def test_a_worker_that_ends_over_a_message_is_told_in_one_line(capsys):
    def ask_worker(request):
        raise EOFError("the stream ended after 0 of 48 bytes")

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    failure = unpack_outcome(from_content(reply(Message(to_content(b"abc"), 1, "train"), ask_worker, 99).content))[0]
    assert failure.kind == "lost"
    assert capsys.readouterr().err.splitlines() == [
        "a message could not be answered: the worker is gone, or ended over it"
    ]


def test_the_bundle_holds_two_shims_and_nothing_else():
    import io
    import zipfile

    with zipfile.ZipFile(io.BytesIO(make_bundle())) as bundle:
        names = set(bundle.namelist())
    shims = {f"fedlora_flower/{name}.py" for name in ("__init__", "client_app", "server_app")}
    assert names == {"pyproject.toml", ".info/CONTENT", *shims}
    assert make_bundle() == make_bundle()
    kept = {path.name for path in bundle_folder().rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert kept == {"pyproject.toml", "__init__.py", "client_app.py", "server_app.py"}


def test_only_bundles_on_the_list_are_installed():
    import hashlib

    installed = []
    guarded = guard_install(
        lambda content, **options: installed.append(options), frozenset({hashlib.sha256(b"own").hexdigest()})
    )
    guarded(b"own", skip_prompt=True)
    with pytest.raises(BundleRefusedError):
        guarded(b"other", skip_prompt=True)
    with pytest.raises(BundleRefusedError):
        guarded("own.fab", skip_prompt=True)
    assert installed == [{"skip_prompt": True}]


def test_the_name_that_the_guard_stands_in_for_is_there():
    from flwr.supernode.runtime import run_clientapp

    assert callable(run_clientapp.install_from_fab)


def test_a_guarded_app_process_is_flowers_without_its_supernode():
    script = """
import sys
from fedlora.flower.guard import main
sys.argv = ["flwr-clientapp", "--help"]
try:
    main()
except SystemExit as ended:
    assert not ended.code
import flwr.supernode.runtime.run_clientapp as run_clientapp
assert run_clientapp.install_from_fab.__name__ == "install_allowed"
print([name for name in sys.modules if name.split(".")[0] in ("sqlalchemy", "alembic", "torch")])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: flwr-clientapp" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("models", [{"small": "/models/small"}, ["small=/models/small"], "small=/models/small"])
def test_allowed_models_are_names_or_names_with_a_folder(models):
    policy = NodeConfig.of(base_models=models)
    assert policy.find_model("small") == "/models/small"
    assert policy.find_model("large") is None
    assert NodeConfig.of(base_models=["a/b"]).find_model("a/b") == "a/b"


def test_a_few_bytes_do_not_stand_for_ranks_without_end(federation):
    ranks = ",".join(["1x100000"] * 50)
    asked = {**federation.config("x").record(), "client_ranks": ranks}
    tracemalloc.start()
    try:
        told = read_facts(Node(federation.policy(0)).answer(pack({"more": {"kind": "facts", "config": asked}}, {})))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert told.kind == "refused"
    assert most < 20e6


def test_a_node_s_rows_may_lie_in_a_folder_of_files(federation, tmp_path):
    file = federation.policy(0).data_path
    folder = tmp_path / "parts"
    folder.mkdir()
    rows = json.loads(file.read_text())
    (folder / "1.json").write_text(json.dumps(rows[:1]))
    (folder / "2.json").write_text(json.dumps(rows[1:]))
    node = Node(federation.policy(0, data_path=folder))
    facts = [read_facts(node.answer(ask_facts(federation.config("x")))).facts]
    assert facts[0].num_examples == len(rows)
    (folder / "3.json").write_text(json.dumps([rows[0] | {"instruction": "one more"}]))
    facts.append(read_facts(node.answer(ask_facts(federation.config("x")))).facts)
    assert facts[1].num_examples == len(rows) + 1
    assert facts[0].sha256 != facts[1].sha256
