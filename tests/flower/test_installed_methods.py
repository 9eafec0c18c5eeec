"""A method of an installed package over Flower: nodes load it by its name, if the owner lists it and has the same."""

import json

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from installed_method import EXAMPLE, forget, install
from small_federation import SIZES, Federation, adapters

from fedlora.config.runs import VerifyConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.flower.flower_config import SubmitConfig
from fedlora.flower.node import Node
from fedlora.flower.node_replies import ask_facts, read_facts
from fedlora.flower.request import make_request
from fedlora.flower.server import serve
from fedlora.stages import verify

LISTED = {"federation_modes": ["homo", "part_way"]}


@pytest.fixture
def federation(tiny_model, make_clients, tmp_path):
    return Federation(tmp_path, make_clients(SIZES), tiny_model)


def test_a_listed_method_gives_the_bytes_of_a_simulation(federation, tmp_path, monkeypatch):
    install(tmp_path / "site", monkeypatch)
    here = federation.simulate("here", "part_way", step=0.3)
    there = federation.serve("there", "part_way", federation.grid(**LISTED), step=0.3)
    assert adapters(there) == adapters(here)
    # an entry point may be named by the run itself
    assert "ok" in verify.run(VerifyConfig.of(exp_name="there", model_dir=there.parent)).text()


@pytest.mark.parametrize("bounds", [{}, {"federation_modes": ["homo"]}])
def test_a_node_loads_no_package_that_its_owner_has_not_listed(federation, tmp_path, monkeypatch, bounds):
    install(tmp_path / "site", monkeypatch)
    request = ask_facts(federation.config("x", "part_way"))
    monkeypatch.setattr("fedlora.flower.policy.find_method", lambda name: pytest.fail("loaded"))
    told = read_facts(Node(federation.policy(0, **bounds)).answer(request))
    assert "federation_mode='part_way' is not in the federation_modes of this node" in told.reason


def test_a_node_refuses_a_source_that_is_not_the_server_s(federation, tmp_path, monkeypatch):
    file = install(tmp_path / "site", monkeypatch)
    request = ask_facts(federation.config("x", "part_way"))
    node = Node(federation.policy(0, **LISTED))
    assert read_facts(node.answer(request)).facts.num_examples == SIZES[0]
    file.write_text(file.read_text() + "# changed\n")
    forget(monkeypatch)
    told = read_facts(Node(federation.policy(0, **LISTED)).answer(request))
    assert (told.kind, "own-method 1.2" in told.reason) == ("refused", True)
    assert "another source on this node" in told.reason


def test_a_node_without_the_package_says_so(federation, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as there:
        install(tmp_path / "site", there)
        request = ask_facts(federation.config("x", "part_way"))
    told = read_facts(Node(federation.policy(0, **LISTED)).answer(request))
    assert "cannot be loaded on this node" in told.reason
    assert "is not a method" in capsys.readouterr().err


def test_a_method_of_a_file_is_refused_before_anything_is_sent(federation):
    place = f"{EXAMPLE}:part_way"
    with pytest.raises(UsageError, match="the name of an installed package") as caught:
        SubmitConfig.of(federation_mode=place)
    assert "examples/own_method" in caught.value.hint
    with pytest.raises(UsageError, match="the name of an installed package"):
        federation.serve("there", place)
    with pytest.raises(UsageError, match="names a file or module"):
        serve(None, f'{{"config": {{"federation_mode": "{place}"}}, "waits": {{}}}}')


def test_what_is_submitted_names_the_method_and_carries_no_code(federation, tmp_path, monkeypatch):
    install(tmp_path / "site", monkeypatch)
    asked = SubmitConfig.of(federation_mode="part_way", step=0.3, num_clients=3).training()
    fields = json.loads(make_request(asked, start=1.0, absent=1.0, wave=1.0))["config"]
    assert "method_row" not in fields
    made = TrainConfig.make(fields)
    assert (made.federation_mode, made.method_options, made.method.source) == (
        *("part_way", {"step": 0.3}, asked.method.source),
    )
