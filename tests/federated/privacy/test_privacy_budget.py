"""What is spent, the limit on it, and which configurations may spend at all."""

from __future__ import annotations

import json

import pytest

from fedlora.config.train import TrainConfig
from fedlora.errors import BudgetError, UsageError
from fedlora.federated.privacy.accountant import epsilon
from fedlora.federated.privacy.budget import check_limit, describe_spent, make_budget
from fedlora.methods.combinations import why_not_client_level, why_not_example_level
from fedlora.methods.table import METHODS

CLIENT = {"dp_noise_multiplier": 1.0, "dp_clip": 0.5}
EXAMPLE = {"dp_example_noise_multiplier": 1.0, "dp_example_clip": 0.5}


def test_every_round_counts_whoever_was_drawn():
    budget = make_budget(TrainConfig.of(**CLIENT, client_selection_frac=0.1), {})
    spent = None
    for number in range(1, 21):
        spent = budget.spend(spent, [3] if number % 2 else [])
        assert spent["rounds"] == number
        assert spent["epsilon"] == pytest.approx(epsilon(0.1, 1.0, number, 1e-5), abs=1e-4)
        assert spent["epsilon"] >= epsilon(0.1, 1.0, number, 1e-5)
    assert spent["epsilon"] == pytest.approx(4.2243, rel=1e-3)
    assert spent == budget.forecast(20, [])
    assert json.loads(json.dumps(spent)) == spent


def test_a_client_spends_in_the_rounds_it_took_part_in_and_the_run_what_the_largest_spender_did():
    config = TrainConfig.of(**EXAMPLE, local_batch_size=4, local_num_epochs=2)
    budget = make_budget(config, {0: 40, 1: 10, 2: 3})
    first = budget.spend(None, [0, 2])
    assert first["steps"] == {"0": 20, "2": 2}
    second = budget.spend(first, [1, 2])
    assert second["steps"] == {"0": 20, "1": 6, "2": 4}
    costs = {0: epsilon(0.1, 1.0, 20, 1e-5), 1: epsilon(0.4, 1.0, 6, 1e-5), 2: epsilon(1.0, 1.0, 4, 1e-5)}
    assert second["epsilon"] == pytest.approx(max(costs.values()), abs=1e-4)
    assert second["epsilon"] < sum(costs.values())
    assert first["steps"] == {"0": 20, "2": 2}, "the state before is not changed"
    assert budget.forecast(2, [0, 1, 2])["steps"] == {"0": 40, "1": 12, "2": 4}
    assert json.loads(json.dumps(second)) == second


def test_the_limit_stops_before_the_round_that_would_go_above_it():
    budget = make_budget(TrainConfig.of(**CLIENT, client_selection_frac=0.1), {})
    state = budget.forecast(10, [])
    check_limit(budget.spend(state, []), None, 11)
    check_limit(budget.spend(state, []), budget.spend(state, [])["epsilon"], 11)
    with pytest.raises(BudgetError, match="round 11 would bring the client-level epsilon") as caught:
        check_limit(budget.spend(state, []), state["epsilon"], 11)
    assert caught.value.exit_code == 8
    assert "--max_epsilon" in caught.value.hint


def test_without_noise_there_is_no_guarantee_and_none_is_written():
    spent = make_budget(TrainConfig.of(dp_noise_multiplier=0.0, dp_clip=0.5), {}).spend(None, [])
    assert spent["epsilon"] is None
    assert "no client-level privacy" in describe_spent(spent)
    with pytest.raises(BudgetError, match="without bound"):
        check_limit(spent, 100.0, 1)


def test_no_flags_no_budget():
    assert make_budget(TrainConfig.of(), {}) is None


def test_every_method_is_private_or_refused_with_its_reason():
    for name, method in METHODS.items():
        for flags, reason in ((CLIENT, why_not_client_level(method)), (EXAMPLE, why_not_example_level(method))):
            if reason is None:
                assert TrainConfig.of(federation_mode=name, **flags).is_private
                continue
            with pytest.raises(UsageError, match=f"federation_mode={name} is not supported: it ") as caught:
                TrainConfig.of(federation_mode=name, **flags)
            assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"dp_clip": 1.0}, "dp_clip without dp_noise_multiplier"),
        ({"dp_noise_multiplier": 1.0}, "dp_noise_multiplier without dp_clip"),
        ({"dp_example_clip": 1.0}, "dp_example_clip without"),
        ({**CLIENT, **EXAMPLE}, "two guarantees"),
        ({**CLIENT, "client_selection_strategy": "round_robin"}, "drawn with probability"),
        ({**CLIENT, "client_selection_strategy": "all"}, "drawn with probability"),
        ({**CLIENT, "max_update_norm": 1.0}, "already bounds every update"),
        ({**CLIENT, "max_client_weight": 0.5}, "all weigh the same"),
        ({**CLIENT, "min_clients": 2}, "any size"),
        ({**EXAMPLE, "group_by_length": True}, "random sample"),
        ({"max_epsilon": 3.0}, "there is no epsilon"),
        ({"dp_noise_multiplier": 0.0, "dp_clip": 1.0, "max_epsilon": 3.0}, "no epsilon is finite"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_the_reason(flags, reason):
    with pytest.raises(UsageError, match=reason):
        TrainConfig.of(**flags)


@pytest.mark.parametrize(
    "flags",
    [{"dp_clip": float("inf"), "dp_noise_multiplier": 1}, {"dp_noise_multiplier": float("nan"), "dp_clip": 1}],
)
def test_flags_are_finite(flags):
    with pytest.raises(UsageError, match=r"finite|greater"):
        TrainConfig.of(**flags)


def test_the_limit_may_change_when_a_run_goes_on_and_the_noise_may_not():
    one, other = (TrainConfig.of(**CLIENT, max_epsilon=limit) for limit in (2.0, 8.0))
    assert one.identity() == other.identity()
    assert one.identity() != TrainConfig.of(dp_noise_multiplier=1.1, dp_clip=0.5).identity()
