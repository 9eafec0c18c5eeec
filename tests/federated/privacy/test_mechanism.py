"""The noisy mean and the draws behind it: bounds, noise, cohorts, and that no strategy can see around it."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from fedlora.engines.private_run import PrivateRun, find_doubts, make_private_run
from fedlora.federated.adapters import combine, difference_norm, pick_half, zeros_like
from fedlora.federated.privacy.budget import ClientBudget
from fedlora.federated.privacy.mechanism import ClientMechanism, clip_change
from fedlora.federated.privacy.randomness import Secret
from fedlora.laws.federation_of_one_round import LAYERS, adapter, aggregate, close, context, product, update
from fedlora.methods.choosing import load_method
from fedlora.methods.combinations import why_not_client_level
from fedlora.methods.table import METHODS
from fedlora.types import Download

SECRET = Secret(bytes(range(32)))
OTHER = Secret(bytes(range(1, 33)))


def private_mean(sent, *, rate=1.0, clip=1.0, noise=0.0, clients=None, secret=SECRET, number=1, start=None):
    start = start if start is not None else adapter(0)
    mechanism = ClientMechanism(rate, clip, noise)
    return mechanism.private_mean(start, sent, len(sent) if clients is None else clients, secret, number)


def test_a_change_is_clipped_by_one_norm_over_all_its_tensors():
    start = adapter(0)
    for seed in range(1, 5):
        change = clip_change(start, adapter(seed), 0.7)
        assert difference_norm(change, zeros_like(change)) == pytest.approx(0.7, rel=1e-12)


def test_a_change_within_the_bound_stays_as_it_is_and_none_at_all_is_no_division_by_zero():
    start, sent = adapter(0), adapter(1)
    whole = combine(lambda x, y: y - x, start, sent)
    assert close(clip_change(start, sent, 1e9), whole, 0)
    assert not any(value.any() for value in clip_change(start, start, 0.5).values())


def test_what_is_not_bounded_is_not_summed():
    with pytest.raises(ValueError, match="other tensors"):
        clip_change(adapter(0), {**adapter(1), "more": torch.ones(1)}, 1.0)


def test_without_noise_and_bound_and_with_everybody_it_is_the_plain_mean():
    sent = [adapter(seed) for seed in range(1, 6)]
    mean = combine(lambda *values: sum(values[1:]) / 5, adapter(0), *sent)
    assert close(private_mean(sent, clip=1e9), mean)


def test_the_denominator_is_the_expected_cohort_whoever_comes():
    start, sent = adapter(0), [adapter(1), adapter(2)]
    total = combine(lambda x, y, z: x + (y - x + z - x) / (0.25 * 40), start, *sent)
    assert close(private_mean(sent, clip=1e9, rate=0.25, clients=40), total)


def test_one_client_more_moves_the_sum_by_no_more_than_the_clip():
    sent = [combine(lambda x: 1e6 * x, adapter(seed)) for seed in range(1, 6)]
    with_all = private_mean(sent, clip=0.3, noise=1.0, rate=0.5, clients=10)
    without = private_mean(sent[:-1], clip=0.3, noise=1.0, rate=0.5, clients=10)
    assert difference_norm(with_all, without) * 0.5 * 10 <= 0.3 * (1 + 1e-9)


def test_noise_has_the_promised_deviation():
    """The sum of squares of d normal numbers lies within five deviations of d: chi-squared, d = 2e5."""
    start = {"l.lora_B.weight": torch.zeros(400, 500, dtype=torch.float64)}
    noise = private_mean([], rate=0.2, clip=0.5, noise=3.0, clients=50, start=start)["l.lora_B.weight"]
    scaled = noise / (3.0 * 0.5 / (0.2 * 50))
    size = scaled.numel()
    assert abs(float(scaled.square().sum()) - size) < 5 * math.sqrt(2 * size)
    assert abs(float(scaled.sum())) < 5 * math.sqrt(size)


def test_noise_is_normal_and_its_numbers_are_not_the_same_twice():
    draws = SECRET.normal((1000, 1000), "test")
    ordered = draws.flatten().sort().values
    expected = torch.special.ndtr(ordered)
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    assert float((expected - steps).abs().max()) < 1.95 / math.sqrt(len(ordered)), "Kolmogorov and Smirnov, p = 0.001"
    assert abs(float(draws.std()) - 1) < 0.005
    assert len(ordered.unique()) == len(ordered)
    halves = draws.flatten().view(2, -1)
    assert abs(float((halves[0] * halves[1]).mean())) < 5 / math.sqrt(halves.shape[1])


@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (2, 5)])
def test_any_number_of_draws_can_be_had(shape):
    draws = SECRET.normal(shape, "test")
    assert draws.shape == shape
    assert bool(draws.isfinite().all())


def test_every_tensor_round_purpose_and_secret_has_noise_of_its_own():
    start = {f"{name}.lora_B.weight": torch.zeros(3, 3, dtype=torch.float64) for name in "abc"}
    first = private_mean([], noise=1.0, clients=1, start=start)
    assert not torch.equal(first["a.lora_B.weight"], first["b.lora_B.weight"])
    for changed in ({"number": 2}, {"secret": OTHER}):
        other = private_mean([], noise=1.0, clients=1, start=start, **changed)
        assert not any(torch.equal(first[key], other[key]) for key in start)
    again = private_mean([], noise=1.0, clients=1, start=start)
    assert all(torch.equal(first[key], again[key]) for key in start)
    assert not torch.equal(SECRET.normal((3,), "one"), SECRET.normal((3,), "two"))


def test_a_cohort_is_poisson_and_can_be_empty():
    mechanism, clients = ClientMechanism(0.1, 1.0, 1.0), range(20)
    cohorts = [mechanism.draw_cohort(clients, SECRET, number) for number in range(1, 2001)]
    sizes = [len(cohort) for cohort in cohorts]
    assert statistics.mean(sizes) == pytest.approx(2, abs=5 * math.sqrt(20 * 0.09 / 2000))
    assert statistics.variance(sizes) == pytest.approx(20 * 0.09, rel=0.2)
    assert sizes.count(0) / 2000 == pytest.approx(0.9**20, abs=0.04)
    assert all(list(cohort) == sorted(cohort) for cohort in cohorts)
    assert cohorts != [mechanism.draw_cohort(clients, OTHER, number) for number in range(1, 2001)]


def test_a_rate_of_one_takes_everybody_and_one_client_more_changes_nobody_else_s_draw():
    assert ClientMechanism(1.0, 1.0, 1.0).draw_cohort([2, 0, 1], SECRET, 1) == (0, 1, 2)
    mechanism = ClientMechanism(0.5, 1.0, 1.0)
    for number in range(1, 50):
        few, many = (mechanism.draw_cohort(range(size), SECRET, number) for size in (9, 10))
        assert few == tuple(client for client in many if client < 9)


def test_a_secret_shows_itself_in_no_text():
    assert SECRET.content.hex() not in repr(SECRET)
    assert str(list(SECRET.content)[:3])[1:-1] not in repr(SECRET)
    assert SECRET.id not in SECRET.content.hex()
    assert SECRET.id != OTHER.id
    with pytest.raises(ValueError, match="32 bytes"):
        Secret(b"short")
    assert Secret.draw().content != Secret.draw().content


@pytest.mark.parametrize("mode", [name for name, row in METHODS.items() if why_not_client_level(row) is None])
def test_a_strategy_sees_one_update_in_which_rows_do_not_weigh(mode):
    """Whatever a strategy does, it does with the private mean: its result is that of one client who sent the mean."""
    strategy = load_method(mode).server
    state = strategy.init(adapter(0), range(4))
    download = strategy.broadcast(state, 0, 1)
    keys = [key for key in adapter(0) if download.shared == "both" or f".lora_{download.shared}." in key]
    sent = [{key: value for key, value in adapter(seed).items() if key in keys} for seed in range(1, 5)]
    mechanism = ClientMechanism(1.0, 0.8, 0.5)
    run = PrivateRun(ClientBudget(mechanism, 1e-5, "rdp"), None, (mechanism, SECRET))
    results = []
    for rows in ([1, 1, 1, 1], [1000, 1, 50, 3]):
        updates = [update(client, one, rows=n) for client, (one, n) in enumerate(zip(sent, rows, strict=True))]
        hidden = run.hide(updates, download, context(1, 4))
        assert len(hidden) == len(list(hidden)) == 1
        results.append(strategy.aggregate(state, hidden, context(1, 4)))
    start = {key: adapter(0)[key] for key in keys}
    mean = private_mean(sent, clip=0.8, noise=0.5, start=start)
    expected = aggregate(strategy, state, [mean])
    for result in results:
        assert close(result.adapter, expected.adapter, 0)


def test_without_updates_a_round_is_noise_alone():
    mechanism = ClientMechanism(0.5, 1.0, 1.0)
    run = PrivateRun(ClientBudget(mechanism, 1e-5, "rdp"), None, (mechanism, SECRET))
    strategy = load_method("homo").server
    state = strategy.init(adapter(0), range(4))
    left = strategy.aggregate(state, run.hide([], Download(state.adapter), context(1, 4)), context(1, 4))
    assert close(left.adapter, private_mean([], rate=0.5, noise=1.0, clients=4), 0)
    assert not any(torch.equal(left.adapter[key], state.adapter[key]) for key in state.adapter)


def test_client_level_privacy_without_a_secret_is_refused():
    from fedlora.config.train import TrainConfig

    config = TrainConfig.of(dp_noise_multiplier=1.0, dp_clip=1.0)
    with pytest.raises(ValueError, match="secret"):
        make_private_run(config, {0: 3}, None)
    assert make_private_run(TrainConfig.of(), {0: 3}, None) is None


def test_few_clients_and_a_large_delta_are_said_in_plain_words():
    from fedlora.config.train import TrainConfig

    def doubts(clients: int, **changes) -> str:
        config = TrainConfig.of(dp_noise_multiplier=1.0, dp_clip=1.0, **changes)
        return "\n".join(find_doubts(config, dict.fromkeys(range(clients), 5)))

    assert "below 100" in doubts(99)
    assert "below 100" not in doubts(100)
    assert "dp_delta=0.01 is at least 1/100" in doubts(100, dp_delta=1e-2)
    assert "must not be published" in doubts(100)
    example = TrainConfig.of(dp_example_noise_multiplier=1.0, dp_example_clip=1.0, dp_example_delta=0.4)
    assert "at least 1/3" in "\n".join(find_doubts(example, {0: 3, 1: 50}))


@pytest.mark.parametrize("half", ["both", pytest.param("B", marks=pytest.mark.thorough)])
def test_noise_in_a_product_is_what_sun_et_al_say_with_two_noisy_factors_and_with_one(half):
    """`s^2 (d_out |A|^2 + d_in |B|^2) + s^4 r d_in d_out`, for B alone `s^2 d_out |A|^2` (arXiv 2403.12313)."""
    start, noise, draws = adapter(0), 0.7, 3000
    sent = pick_half(start, half)
    for layer, (d_out, d_in) in {"wide": LAYERS["wide"], "tall": LAYERS["tall"]}.items():
        a, b = start[f"{layer}.lora_A.weight"], start[f"{layer}.lora_B.weight"]
        part = {key: value for key, value in sent.items() if key.startswith(f"{layer}.")}
        total = 0.0
        for number in range(draws):
            noisy = {**start, **private_mean([], noise=noise, clients=1, start=part, number=number)}
            total += float((product(noisy, layer) - b @ a).square().sum())
        both = noise**2 * d_in * float(b.square().sum()) + noise**4 * len(a) * d_in * d_out if half == "both" else 0.0
        expected = noise**2 * d_out * float(a.square().sum()) + both
        assert total / draws == pytest.approx(expected, rel=0.05)
