"""Rounds that fit into a budget."""

from __future__ import annotations

import pytest

from fedlora.comparing.round_budget import RowCount, count_round, fit_rounds
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.methods.choosing import choose_method

CLIENTS = {0: RowCount(5, 100), 1: RowCount(8, 200), 2: RowCount(1, 10)}


def config(**changes):
    return TrainConfig.of(**{"client_selection_frac": 1.0, "local_batch_size": 4, "local_num_epochs": 2, **changes})


def test_a_round_takes_every_client_s_steps_the_last_smaller_one_included():
    assert count_round(config(), choose_method(config()), CLIENTS, "steps", 1) == 2 * (2 + 2 + 1)


def test_a_pooled_round_cuts_its_steps_from_all_rows_together():
    assert (
        count_round(
            config(federation_mode="pooled"), choose_method(config(federation_mode="pooled")), CLIENTS, "steps", 1
        )
        == 2 * 4
    )


def test_a_round_takes_the_tokens_of_its_cohort_once_per_epoch():
    assert count_round(config(), choose_method(config()), CLIENTS, "tokens", 1) == 2 * 310


def test_the_most_rounds_that_fit_are_taken_and_not_one_more():
    fits = {budget: fit_rounds(config(), CLIENTS, unit="steps", budget=budget) for budget in (10, 29, 30)}
    assert [(share.rounds, share.expected) for share in fits.values()] == [(1, 10), (2, 20), (3, 30)]


def test_a_method_that_costs_twice_as_much_gets_half_the_rounds():
    assert fit_rounds(config(), CLIENTS, unit="steps", budget=40, cost=2.0).rounds == 2


def test_cohorts_are_those_of_the_run_round_by_round():
    from fedlora.engines.rounds import choose_cohort

    drawn = config(client_selection_frac=0.3, seed=7)
    tokens = [
        sum(CLIENTS[c].num_tokens for c in choose_cohort(drawn, choose_method(drawn), list(CLIENTS), number))
        for number in (1, 2, 3)
    ]
    share = fit_rounds(drawn, CLIENTS, unit="tokens", budget=2 * sum(tokens))
    assert share.rounds >= 3
    assert count_round(drawn, choose_method(drawn), CLIENTS, "tokens", 2) == 2 * tokens[1]


def test_a_budget_of_less_than_a_round_is_refused():
    with pytest.raises(UsageError, match="less than one round of homo, which takes 10"):
        fit_rounds(config(), CLIENTS, unit="steps", budget=9)


def test_a_method_that_trains_twice_takes_twice_as_much_in_a_round():
    assert (
        count_round(
            config(federation_mode="ditto"), choose_method(config(federation_mode="ditto")), CLIENTS, "steps", 1
        )
        == 2 * 10
    )


def test_rounds_for_everybody_at_the_end_are_counted_wherever_the_end_is():
    """One of three clients a round, and everybody in the last."""
    drawn = config(federation_mode="finetune", client_selection_frac=0.3, seed=7)
    for budget in (30, 60, 100):
        share = fit_rounds(drawn, CLIENTS, unit="steps", budget=budget)
        run = drawn.model_copy(update={"num_communication_rounds": share.rounds})
        taken = [
            count_round(run, choose_method(run), CLIENTS, "steps", number) for number in range(1, share.rounds + 1)
        ]
        assert (sum(taken), taken[-1]) == (share.expected, 10)
        assert budget - 8 <= share.expected <= budget
    with pytest.raises(UsageError, match="less than the fewest rounds, 2, of finetune"):
        fit_rounds(drawn, CLIENTS, unit="steps", budget=9)
