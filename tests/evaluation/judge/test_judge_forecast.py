"""What judging will take, against the questions that the stage would ask."""

from __future__ import annotations

import pytest

from fedlora.evaluation.judge.judge_forecast import forecast_judging
from fedlora.evaluation.judge.spending import Prices, judge_prices
from fedlora.rows import Row, Turn

ROWS = [Row(f"task {number}", "", f"answer {number}", "c") for number in range(45)]


def forecast(rows, batch_size=20):
    return forecast_judging(rows, batch_size=batch_size, judge="j", seed=1, count_tokens=len)


@pytest.mark.parametrize(("count", "batch", "calls"), [(45, 20, 6), (40, 20, 4), (1, 20, 2), (45, 100, 2), (45, 1, 90)])
def test_every_sample_is_asked_in_both_orders(count, batch, calls):
    found = forecast(ROWS[:count], batch)
    assert (found.num_samples, found.num_calls) == (count, calls)


def test_equal_rows_share_their_verdict():
    assert forecast([*ROWS[:20], ROWS[0]]).num_calls == 2


def test_longer_answers_cost_more_to_send_and_not_to_judge():
    short, long = (forecast([Row("task", "", "x" * length, "c")]) for length in (10, 110))
    # both answers and the reference, in both orders
    assert long.tokens_in - short.tokens_in == 100 * 3 * 2
    assert long.tokens_out == short.tokens_out


def test_prices_are_for_a_million_tokens():
    found = forecast(ROWS)
    assert found.cost([Prices(2.0, 8.0)]) == pytest.approx((2 * found.tokens_in + 8 * found.tokens_out) / 1e6)


def test_the_turns_before_are_sent_too():
    turns = [(Turn("system", "x" * length),) for length in (10, 110)]
    short, long = (forecast([Row("task", "", "yes", "c", before)]) for before in turns)
    assert long.tokens_in - short.tokens_in == 100 * 2


def test_a_forecast_of_several_judges_and_repeats_is_that_of_one_as_often():
    found = forecast(ROWS)
    thrice = found.times(3)
    assert (thrice.num_samples, thrice.num_calls) == (found.num_samples, 3 * found.num_calls)
    dear, cheap = judge_prices((2.0, 1.0), (8.0,), 2)
    assert found.cost([dear, cheap]) == pytest.approx((3 * found.tokens_in + 16 * found.tokens_out) / 1e6)
