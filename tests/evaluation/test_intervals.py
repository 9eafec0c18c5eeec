"""Intervals cover as often as they say, at the few seeds and rows that there are."""

import math

import numpy as np
import pytest

from fedlora.evaluation.intervals import (
    bootstrap_interval,
    bootstrap_weights,
    macro_interval,
    mean_interval,
    seed_interval,
    share_interval,
    sign_test,
    student_quantile,
)


def test_student_s_quantiles_are_scipy_s():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (*range(1, 40), 100, 101, 1000):
        for level in (0.5, 0.9, 0.95, 0.999):
            assert student_quantile(degrees, level) == pytest.approx(stats.t.ppf((1 + level) / 2, degrees), rel=1e-9)


def test_student_s_quantiles_are_those_of_the_printed_tables():
    found = [round(student_quantile(degrees), 3) for degrees in (1, 2, 3, 4, 9, 30)]
    assert found == [12.706, 4.303, 3.182, 2.776, 2.262, 2.042]


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_the_interval_over_seeds_covers_the_mean_as_often_as_it_says(seeds):
    draws = np.random.default_rng(seeds).normal(1.5, 0.3, size=(8000, seeds))
    intervals = [seed_interval(values) for values in draws.tolist()]
    covered = np.mean([low <= 1.5 <= high for low, high in filter(None, intervals)])
    assert covered == pytest.approx(0.95, abs=0.01)


def test_the_interval_over_three_seeds_is_the_one_worked_out_by_hand():
    # mean 7/3, standard deviation 1.5275, 4.3027 * 1.5275 / sqrt(3) = 3.7946
    assert seed_interval([1.0, 2.0, 4.0]) == pytest.approx((7 / 3 - 3.7946, 7 / 3 + 3.7946), abs=1e-4)
    assert seed_interval([2.0, 2.0]) == (2.0, 2.0)


def test_one_seed_has_no_interval():
    assert seed_interval([3.0]) is None


def test_nothing_right_of_ten_may_be_a_quarter_and_everything_right_three_quarters():
    # Wilson's limits of 0 of n are 0 and z^2 / (n + z^2)
    assert share_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert share_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert share_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


@pytest.mark.parametrize("count", [5, 10, 40])
def test_wilson_s_interval_covers_a_share_about_as_often_as_it_says(count):
    intervals = [share_interval(right / count, count) for right in range(count + 1)]

    def coverage(share: float) -> float:
        chance = [math.comb(count, right) * share**right * (1 - share) ** (count - right) for right in range(count + 1)]
        return sum(one for one, (low, high) in zip(chance, intervals, strict=True) if low <= share <= high)

    assert np.mean([coverage(share) for share in np.linspace(0.01, 0.99, 99)]) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("shares", [(0.0, 0.1, 0.9, 1.0), (0.5, 0.6, 0.7, 0.8), (0.05, 0.05, 0.1, 0.1)])
def test_the_interval_of_the_mean_over_categories_covers_it_as_often_as_it_says(shares):
    right = np.random.default_rng(7).binomial(10, shares, size=(4000, 4))
    counts = dict.fromkeys("abcd", 10)
    intervals = [macro_interval(dict(zip("abcd", line, strict=True)), counts) for line in (right / 10).tolist()]
    covered = np.mean([low <= sum(shares) / 4 <= high for low, high in intervals])
    # where a category is always right or never, its interval is wider than it need be
    assert 0.92 <= covered <= (0.97 if min(shares) > 0.2 else 1.0)


def test_the_interval_of_the_mean_narrows_with_more_rows_and_has_a_width_where_all_is_right_or_wrong():
    shares = {"a": 0.2, "b": 0.9}
    low, high = macro_interval(shares, {"a": 20, "b": 20})
    assert low < 0.55 < high
    narrow_low, narrow_high = macro_interval(shares, {"a": 2000, "b": 2000})
    assert narrow_high - narrow_low < (high - low) / 5
    assert macro_interval(dict(reversed(shares.items())), {"b": 20, "a": 20}) == (low, high)
    assert macro_interval({"x": 0.0}, {"x": 10}) == pytest.approx(share_interval(0.0, 10))
    low, high = macro_interval({"a": 0.0, "b": 1.0}, {"a": 5, "b": 5})
    assert low < 0.3 < 0.7 < high


def test_rows_of_one_prompt_are_drawn_together_and_each_resample_has_as_many_prompts_as_there_are():
    weights = np.concatenate(list(bootstrap_weights(["a", "b", "a", "c"], draws=500)))
    assert weights.shape == (500, 4)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert weights[:, 1].mean() == pytest.approx(1, abs=0.15)


def test_blocks_of_resamples_do_not_change_what_is_drawn(monkeypatch):
    whole = np.concatenate(list(bootstrap_weights(range(7), draws=50)))
    monkeypatch.setattr("fedlora.evaluation.intervals._MOST_NUMBERS", 7 * 20)
    blocks = list(bootstrap_weights(range(7), draws=50))
    assert [len(block) for block in blocks] == [20, 20, 10]
    assert (np.concatenate(blocks) == whole).all()


def test_the_bootstrap_of_a_mean_is_near_the_interval_in_closed_form():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    reach = 1.96 * values.std() / 20
    assert mean_interval(values, range(400)) == pytest.approx((values.mean() - reach, values.mean() + reach), abs=0.03)
    # every row twice says nothing new; twice as many prompts would
    twice = mean_interval(np.repeat(values, 2), np.repeat(range(400), 2))
    assert twice == mean_interval(values, range(400))


def test_values_that_are_not_there_are_not_counted():
    nan = math.nan
    assert mean_interval([nan, 2.0, nan, 2.0], range(4)) == (2.0, 2.0)
    assert all(map(math.isnan, mean_interval([nan, nan], range(2))))


def test_a_measure_of_several_columns_is_taken_on_the_weights():
    right, count = np.array([1.0, 0.0, 2.0, 3.0] * 20), np.array([2.0, 1.0, 4.0, 3.0] * 20)
    low, high = bootstrap_interval(lambda weights: (weights @ right) / (weights @ count), range(80))
    assert low < 0.6 < high
    assert high - low < 0.2


@pytest.mark.thorough
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_the_bootstrap_covers_a_mean_of_200_prompts_as_often_as_it_says(share):
    draws = np.random.default_rng(3).binomial(1, share, size=(1000, 200)).astype(float)
    intervals = [mean_interval(values, range(200), draws=500, seed=number) for number, values in enumerate(draws)]
    assert 0.93 <= np.mean([low <= share <= high for low, high in intervals]) <= 0.97


def test_the_sign_test_is_the_binomial_test():
    # 8 of 10: 2 * (1 + 10 + 45) / 1024
    assert sign_test(8, 2) == sign_test(2, 8) == pytest.approx(112 / 1024)
    assert sign_test(0, 0) == sign_test(5, 5) == 1.0
    stats = pytest.importorskip("scipy.stats")
    for more, fewer in ((1, 0), (13, 4), (210, 190), (5200, 4800)):
        assert sign_test(more, fewer) == pytest.approx(stats.binomtest(more, more + fewer).pvalue, rel=1e-6)
