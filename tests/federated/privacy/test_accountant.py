"""What noisy sums cost, against published figures, closed forms and a second accountant."""

from __future__ import annotations

import math
import sys

import pytest

from fedlora.errors import UsageError
from fedlora.federated.privacy.accountant import epsilon, load_pld, renyi_divergence

GOLDEN = [
    # rate, noise, steps, delta, RDP, PLD: dp-accounting 0.6.0
    (0.1, 1.0, 100, 1e-5, 7.9039, 7.0466),
    (0.1, 1.0, 200, 1e-5, 11.0631, 9.9713),
    (0.1, 2.0, 200, 1e-5, 3.6797, 3.3597),
    (0.05, 1.0, 200, 1e-5, 5.3679, 4.7659),
    (1.0, 10.0, 100, 1e-5, 4.7285, 4.3772),
    (1.0, 1.0, 1, 1e-5, 4.7285, 4.3772),
    (0.01, 1.1, 10000, 1e-5, 5.6320, 5.1926),
    (0.2, 1.0, 50, 1e-3, 8.3118, 7.0658),
    (0.01, 1.0, 1000, 1e-5, 2.1014, 1.8282),
    (1.0, 1.0, 10, 1e-5, 19.0536, 17.8566),
    (0.1, 1.0, 20, 1e-5, 4.2243, 3.5907),
]


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "rdp", "pld"), GOLDEN)
def test_epsilon_is_the_published_one_and_never_below_the_tight_one(rate, noise, steps, delta, rdp, pld):
    found = epsilon(rate, noise, steps, delta)
    assert found == pytest.approx(rdp, rel=1e-2)
    # the published figures bound fractional orders from above; ours may be below them, never above
    assert pld < found < rdp + 1e-4


@pytest.mark.parametrize(("rate", "noise", "order"), [(0.1, 1.0, 2), (0.1, 1.0, 5), (0.3, 0.5, 8), (0.01, 4.0, 40)])
def test_whole_orders_agree_with_the_closed_form(rate, noise, order):
    terms = (
        math.comb(order, i) * (1 - rate) ** (order - i) * rate**i * math.exp((i * i - i) / (2 * noise**2))
        for i in range(order + 1)
    )
    assert renyi_divergence(rate, noise, order) == pytest.approx(math.log(sum(terms)) / (order - 1), rel=1e-10)


def test_orders_between_whole_ones_are_between_their_divergences():
    values = [renyi_divergence(0.1, 1.0, order) for order in (1.1, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)]
    assert values == sorted(values)
    assert renyi_divergence(0.1, 1.0, 2.5) == pytest.approx(0.02350372726100321, rel=1e-10), "by adaptive quadrature"


def test_a_rate_near_one_comes_near_to_the_plain_gaussian():
    assert renyi_divergence(1 - 1e-9, 2.0, 3.5) == pytest.approx(renyi_divergence(1.0, 2.0, 3.5), rel=1e-6)


def test_epsilon_grows_with_rounds_and_rate_and_falls_with_noise_and_delta():
    by_steps = [epsilon(0.1, 1.0, steps, 1e-5) for steps in (1, 2, 10, 100)]
    by_rate = [epsilon(rate, 1.0, 50, 1e-5) for rate in (0.01, 0.1, 0.5, 1.0)]
    by_noise = [epsilon(0.1, noise, 50, 1e-5) for noise in (4.0, 2.0, 1.0, 0.5)]
    by_delta = [epsilon(0.1, 1.0, 50, delta) for delta in (1e-3, 1e-5, 1e-7)]
    for values in (by_steps, by_rate, by_noise, by_delta):
        assert values == sorted(values)
        assert len(set(values)) == len(values)


@pytest.mark.parametrize("rounds", [4, 25])
def test_rounds_of_everybody_compose_as_one_round_with_less_noise(rounds):
    assert epsilon(1.0, 3.0, rounds, 1e-5) == pytest.approx(epsilon(1.0, 3.0 / math.sqrt(rounds), 1, 1e-5), rel=1e-9)


def test_nothing_spent_is_zero_and_no_noise_is_no_privacy():
    assert epsilon(0.1, 1.0, 0, 1e-5) == 0.0
    assert epsilon(0.1, 0.0, 1, 1e-5) == math.inf
    for wrong in ((0.0, 1.0, 1, 1e-5), (0.1, -1.0, 1, 1e-5), (0.1, 1.0, -1, 1e-5), (0.1, 1.0, 1, 0.0)):
        with pytest.raises(ValueError, match="out of range"):
            epsilon(*wrong)


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "delta", "rdp", "pld"),
    [*GOLDEN[:2], *(pytest.param(*row, marks=pytest.mark.thorough) for row in GOLDEN[2:])],
)
def test_the_tight_accountant_gives_its_published_figures(rate, noise, steps, delta, rdp, pld):
    pytest.importorskip("dp_accounting", reason="the extra dp is not installed")
    assert epsilon(rate, noise, steps, delta, accountant="pld") == pytest.approx(pld, rel=1e-3)


def test_the_tight_accountant_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    monkeypatch.setitem(sys.modules, "dp_accounting.pld.privacy_loss_distribution", None)
    with pytest.raises(UsageError, match="dp-accounting") as caught:
        load_pld()
    assert "fedlora[dp]" in caught.value.hint
    with pytest.raises(UsageError):
        epsilon(0.1, 3.14159, 7, 1e-5, accountant="pld")
