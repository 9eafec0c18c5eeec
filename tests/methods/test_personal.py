"""Models of one's own beside a global one: what their weights do at the ends, and what stays at home."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.laws.federation_of_one_round import adapter, close, product
from fedlora.llm.background import as_background
from fedlora.llm.local_gradient import GradientTerms
from fedlora.methods.choosing import choose_method, load_method
from fedlora.methods.ditto import TrainBoth
from fedlora.methods.feddpa import LOCAL, TrainLocalBeside, mix_outputs
from fedlora.methods.finetune import AverageThenPart, SendThenKeep
from fedlora.methods.table import METHODS
from fedlora.types import ClientMemory, Download, LocalResult, Phase, ServerState

LAYERS = ("wide", "tall", "square", "thin")


def descend(phase: Phase, optimum: dict[str, torch.Tensor], rate: float, steps: int) -> dict[str, torch.Tensor]:
    """Plain gradient descent of a phase on `1/2 ||x - optimum||^2`."""
    factors = {key: nn.Parameter(value.clone()) for key, value in phase.start.items()}
    terms = GradientTerms(phase, factors, needs_mean=False)
    for _ in range(steps):
        for key, factor in factors.items():
            factor.grad = factor.detach() - optimum[key]
        terms.add()
        with torch.no_grad():
            for factor in factors.values():
                factor -= rate * factor.grad
    return {key: factor.detach() for key, factor in factors.items()}


@pytest.mark.parametrize("pull", [0.0, 0.1, 1.0, 1e4])
def test_ditto_ends_where_its_loss_is_least_between_the_local_optimum_and_the_global_adapter(pull):
    sent, optimum = adapter(1), adapter(2)
    phase = TrainBoth(ditto_lambda=pull).phases(Download(sent), ClientMemory(adapter(3)))[1]
    found = descend(phase, optimum, 1 / (1 + pull), 60)
    assert close(found, {key: (optimum[key] + pull * sent[key]) / (1 + pull) for key in sent})
    if pull == 0:
        assert close(found, optimum)
    if pull == 1e4:
        assert close(found, sent, 1e-3)


def test_ditto_is_pulled_to_what_was_sent_and_starts_from_its_own_model_once_it_has_one():
    rule, sent, own = TrainBoth(), adapter(1), adapter(2)
    shared, first = rule.phases(Download(sent), ClientMemory())
    assert shared == Phase(sent)
    assert (first.start, first.anchor, first.proximal_mu) == (sent, sent, 0.1)
    assert rule.phases(Download(sent), ClientMemory(own))[1].start is own


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_the_mix_is_that_of_the_products_as_one_adapter_of_the_sum_of_the_ranks(weight):
    shared, own = adapter(1, rank=2), adapter(2, rank=3)
    mixed = mix_outputs(shared, own, weight)
    for layer in LAYERS:
        assert len(mixed[f"{layer}.lora_A.weight"]) == 5
        expected = (1 - weight) * product(shared, layer) + weight * product(own, layer)
        assert torch.allclose(product(mixed, layer), expected, rtol=0, atol=1e-12)


def test_mixed_factors_would_be_another_model():
    shared, own = adapter(1), adapter(2)
    factors = {key: (shared[key] + own[key]) / 2 for key in shared}
    mixed = mix_outputs(shared, own, 0.5)
    assert not torch.allclose(product(factors, "wide"), product(mixed, "wide"), atol=1e-2)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_what_feddpa_trains_is_the_model_that_it_keeps(weight):
    """Background plus weighted adapter, as the layers add them, against the stack at the run's scaling."""
    scaling = 4.0
    rule, sent, local = TrainLocalBeside(personal_weight=weight, lora_scaling=scaling), adapter(1), adapter(2)
    phase = rule.phases(Download(sent), ClientMemory(slots={LOCAL: local}))[1]
    assert phase.start is local
    _, memory = rule.upload([LocalResult(adapter(3)), LocalResult(local)], Download(sent), ClientMemory())
    for layer in LAYERS:
        trained = phase.weight * scaling * product(phase.start, layer)
        if phase.background is not None:
            trained = trained + product(phase.background, layer)
        assert torch.allclose(trained, scaling * product(memory.adapter, layer), rtol=0, atol=1e-12)
        assert torch.allclose(product(as_background(memory.adapter, scaling), layer), trained, rtol=0, atol=1e-12)
        ends = {0.0: sent, 1.0: local}
        if weight in ends:
            assert torch.allclose(trained, scaling * product(ends[weight], layer), rtol=0, atol=1e-12)


def test_the_mix_begins_as_the_global_model():
    rule, sent = TrainLocalBeside(personal_weight=0.3), adapter(1)
    local = rule.phases(Download(sent), ClientMemory())[1].start
    mixed = mix_outputs(sent, local, 0.3)
    assert all(torch.allclose(product(mixed, layer), product(sent, layer)) for layer in LAYERS)


@pytest.mark.parametrize("mode", ["ditto", "feddpa"])
def test_what_is_sent_is_the_first_phase_and_nothing_of_the_second(mode):
    """A canary: whatever the client's own training leaves, the upload is the same tensors."""
    rule, sent, trained = load_method(mode).client, adapter(1), adapter(2)
    uploads = []
    for canary in (3, 4):
        memory = ClientMemory(adapter(canary), slots={LOCAL: adapter(canary)})
        upload, kept = rule.upload([LocalResult(trained), LocalResult(adapter(canary))], Download(sent), memory)
        assert upload is not None
        assert (upload.adapter, upload.extra) == (trained, {})
        assert kept.adapter is not None
        uploads.append(upload)
    assert uploads[0] == uploads[1]


def test_finetune_averages_up_to_its_last_rounds_and_then_hands_out_what_it_has_once():
    strategy = AverageThenPart(personal_rounds=2, num_communication_rounds=5)
    state = ServerState(adapter(1))
    sent = [strategy.broadcast(state, 0, number) for number in range(1, 6)]
    assert [download.shared for download in sent] == ["both", "both", "both", None, None]
    assert [download.travels for download in sent] == ["both", "both", "both", "both", None]
    assert [strategy.asks_everybody(number) for number in range(1, 6)] == [False] * 3 + [True] * 2


def test_finetune_goes_on_from_its_own_model_once_it_has_one_and_keeps_none_before():
    rule, sent, trained = SendThenKeep(), adapter(1), adapter(2)
    upload, memory = rule.upload([LocalResult(trained)], Download(sent), ClientMemory())
    assert (upload.adapter, memory.adapter) == (trained, None)
    alone = Download(sent, shared=None)
    assert rule.phases(alone, memory)[0].start is sent
    upload, memory = rule.upload([LocalResult(trained)], alone, memory)
    assert (upload, memory.adapter) == (None, trained)
    assert rule.phases(alone, memory)[0].start is trained


def test_personal_modes_have_a_global_model_and_models_of_their_own():
    for mode in ("ditto", "feddpa", "finetune"):
        assert load_method(mode).has_global_model
        assert load_method(mode).keeps_personal_model
    personal = {name for name, mode in METHODS.items() if mode.keeps_personal_model}
    assert personal >= {name for name, mode in METHODS.items() if not mode.has_global_model}
    assert "homo" not in personal


def test_a_half_is_told_of_its_run_by_the_configuration():
    mode = choose_method(TrainConfig.of(federation_mode="feddpa", lora_r=4, lora_alpha=10, personal_weight=0.25))
    assert mode.client == TrainLocalBeside(personal_weight=0.25, lora_scaling=2.5)
    mode = choose_method(TrainConfig.of(federation_mode="finetune", num_communication_rounds=7, personal_rounds=3))
    assert mode.server == replace(AverageThenPart(), personal_rounds=3, num_communication_rounds=7)
    assert math.isclose(TrainLocalBeside().personal_weight, 0.5)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"federation_mode": "ditto", "optimizer_state": "keep"}, "one's moments are not the other's"),
        ({"federation_mode": "feddpa", "optimizer_state": "keep"}, "one's moments are not the other's"),
        (
            {"federation_mode": "finetune", "num_communication_rounds": 2, "personal_rounds": 2},
            "personal_rounds=2 is not below num_communication_rounds=2",
        ),
        ({"federation_mode": "homo", "personal_rounds": 1}, "homo has no personal_rounds"),
        ({"federation_mode": "ditto", "personal_weight": 0.5}, "ditto has no personal_weight"),
    ],
)
def test_what_would_mix_models_or_leave_none_is_refused(changes, what):
    with pytest.raises(UsageError, match=what):
        choose_method(TrainConfig.of(**changes))


def test_only_finetune_s_rounds_depend_on_their_number():
    for mode, is_bound in (("ditto", False), ("feddpa", False), ("finetune", True)):
        assert ("num_communication_rounds" in TrainConfig.of(federation_mode=mode).identity()) == is_bound
