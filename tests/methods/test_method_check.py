"""The public check of a method: which laws it reports as held, broken or not applicable."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import client_mutants
import pytest
import server_mutants
import torch
from installed_method import EXAMPLE
from method_properties import PROPERTIES
from test_mutations import MUTATIONS

import fedlora as fl
from fedlora.cli import main
from fedlora.errors import TrainingError, UsageError
from fedlora.federated.adapters import combine, weighted_mean
from fedlora.laws.method_check import try_laws
from fedlora.methods import FedAvg, Method, TrainAndSend
from fedlora.methods.choosing import load_method
from fedlora.types import Upload

PLACE = f"{EXAMPLE}:part_way"


def outcomes(checked) -> dict[str, str]:
    return {law.name: law.outcome for law in checked.laws}


def broken(row: Method, **promises) -> dict[str, str]:
    return {law.name: law.detail for law in fl.check_method(row, **promises).broken}


def test_the_example_keeps_every_law_that_applies():
    checked = fl.check_method(PLACE)
    assert checked.is_sound
    assert outcomes(checked)["sees the mean"] == "held"
    assert {law.name: law.detail for law in checked.laws}["combination"] == "`combines` is not promised"
    more = fl.check_method(PLACE, combines="factors", plain={"step": "1"})
    assert more.is_sound
    assert outcomes(more)["combination"] == outcomes(more)["one step is centralised"] == "held"
    assert "0 broken" in str(more)
    assert more.as_dict()["laws"]["weights"]["outcome"] == "held"


def test_a_promise_that_holds_with_some_options_only_is_broken_with_others_and_says_by_how_much():
    found = broken(load_method("homo"), combines="products")
    assert "the mean of products" in found["combination"]
    assert "away" in found["combination"]
    assert "combination" in {law.name for law in fl.check_method(PLACE, combines="factors").broken}
    assert fl.check_method(PLACE, combines="factors", options={"step": 1.0}).is_sound


@dataclass(frozen=True)
class OrderCounts(FedAvg):
    def aggregate(self, state, updates, context):
        last = list(updates)[-1]
        return replace(super().aggregate(state, updates, context), adapter=last.upload)


@dataclass(frozen=True)
class WritesIntoTheState(FedAvg):
    def aggregate(self, state, updates, context):
        mean = super().aggregate(state, updates, context)
        for key, value in state.adapter.items():
            value.copy_(mean.adapter[key])
        return state


@dataclass(frozen=True)
class EvenMean(FedAvg):
    def aggregate(self, state, updates, context):
        return replace(state, adapter=weighted_mean((one.upload, 1.0) for one in updates) or state.adapter)


@dataclass(frozen=True)
class NotANumber(FedAvg):
    def aggregate(self, state, updates, context):
        mean = super().aggregate(state, updates, context).adapter
        return replace(state, adapter=combine(lambda value: value / 0 * 0, mean))


@dataclass(frozen=True)
class TakesTheMiddle(FedAvg):
    def aggregate(self, state, updates, context):
        sent = [one.upload for one in updates]
        middle = {key: torch.stack([one[key] for one in sent]).median(0).values for key in sent[0]} if sent else {}
        return replace(state, adapter={**state.adapter, **middle})


@dataclass(frozen=True)
class Raises(FedAvg):
    def aggregate(self, state, updates, context):
        raise KeyError("velocity")


@dataclass(frozen=True)
class Remembers(FedAvg):
    seen: ClassVar[list] = []

    def aggregate(self, state, updates, context):
        self.seen.append(1)
        mean = super().aggregate(state, updates, context).adapter
        return replace(state, adapter=combine(lambda value: value * (1 + len(self.seen) / 100), mean))


@dataclass(frozen=True)
class SendsMore(TrainAndSend):
    sends: ClassVar[tuple[str, ...]] = ("norms",)

    def upload(self, results, download, memory):
        sent, kept = super().upload(results, download, memory)
        return Upload(sent.adapter, {"norms": dict(sent.adapter)}), kept


MEAN = {"server_sees": "mean", "rows_weigh": True}
BAD = {
    "the last client wins": (Method("bad", server=OrderCounts(), **MEAN), "order", "is 3|is 2|away"),
    "it writes into the state": (
        Method("bad", server=WritesIntoTheState(), **MEAN),
        "inputs stay",
        "inputs are changed",
    ),
    "rows do not weigh": (Method("bad", server=EvenMean(), **MEAN), "weights", "rows do not weigh"),
    "no numbers": (Method("bad", server=NotANumber(), **MEAN), "shapes", "is not finite"),
    "more than the mean": (
        Method("bad", server=TakesTheMiddle(), **MEAN),
        "sees the mean",
        "more than the mean counts",
    ),
    "it raises": (Method("bad", server=Raises(), **MEAN), "order", "raised KeyError"),
    "it remembers": (Method("bad", server=Remembers(), **MEAN), "resume", "other bits"),
    "it sends more": (Method("bad", client=SendsMore(), **MEAN), "states server sees", "further tensors: norms"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_faulty_method_is_reported_with_the_law_that_it_breaks(name):
    row, law, what = BAD[name]
    found = broken(row)
    assert law in found
    assert any(part in found[law] for part in what.split("|"))


@pytest.mark.parametrize(
    ("fact", "law"),
    [
        ({"trains": "twice"}, "states trains"),
        ({"keeps_personal_model": True}, "states keeps personal model"),
        ({"adds_to_base": True}, "states adds to base"),
        ({"has_global_model": False}, "shapes"),
        ({"ranks_may_differ": True}, "states ranks may differ"),
        ({"server_sees": "nothing"}, "states server sees"),
    ],
)
def test_a_fact_of_the_row_that_does_not_hold_is_reported(fact, law):
    assert law in broken(Method("claims", **fact))


def test_a_client_that_trains_otherwise_than_the_row_says_is_reported():
    row = replace(load_method("fedprox"), changes_client_training=False)
    assert "terms of its own" in broken(row)["states changes client training"]


def test_what_a_row_does_not_state_is_not_tried():
    found = outcomes(fl.check_method(Method("silent", server=EvenMean())))
    assert found["weights"] == found["sees the mean"] == found["states trains"] == "not applicable"
    assert "broken" not in found.values()


GENERAL = [one for one in MUTATIONS if one.mutant is not None and one.check.__module__.startswith("fedlora.laws")]


@pytest.mark.thorough
@pytest.mark.parametrize("mutation", GENERAL, ids=lambda mutation: mutation.pitfall)
def test_known_faults_are_reported_by_the_public_check(mutation, monkeypatch):
    monkeypatch.setattr(client_mutants.Shelf, "last", None)
    monkeypatch.setattr(server_mutants.Velocity, "kept", None)
    found = {law.name for law in try_laws(mutation.apply(monkeypatch), PROPERTIES[mutation.mode]).broken}
    assert mutation.check.__name__.removeprefix("check_").replace("_", " ") in found


@pytest.mark.thorough
@pytest.mark.parametrize("mode", PROPERTIES)
def test_every_built_in_method_passes_the_public_check(mode):
    assert not fl.check_method(mode).broken


def test_wrong_promises_and_options_are_named():
    for given, what in (
        ({"combine": "factors"}, "combine is no promise"),
        ({"combines": "everything"}, "combines='everything'"),
        ({"plain": {"stp": 1}}, "has no option stp"),
        ({"options": {"step": "much"}}, "step='much'"),
    ):
        with pytest.raises(UsageError, match=what):
            fl.check_method(PLACE, **given)
    with pytest.raises(UsageError, match="needs 9 clients"):
        fl.check_method("krum", options={"num_hostile": 3})


def test_the_command_ends_with_an_exit_code_of_its_own(capsys, tmp_path):
    assert main(["methods", "check", PLACE, "--combines", "factors", "--plain", "step=1"]) == 0
    assert "0 broken" in capsys.readouterr().out
    faulty = tmp_path / "faulty.py"
    faulty.write_text(Path(EXAMPLE).read_text().replace("update.num_examples", "1.0"))
    assert main(["methods", "check", f"{faulty}:part_way", "--json"]) == TrainingError.exit_code
    shown = capsys.readouterr()
    assert json.loads(shown.out)["laws"]["weights"]["outcome"] == "broken"
    assert "breaks" in shown.err
    assert main(["methods", "check", f"{faulty}:nothing"]) == UsageError.exit_code
