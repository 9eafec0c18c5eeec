"""How much privacy a number of noisy, Poisson-sampled sums costs: epsilon at a given delta.

The Renyi divergence of the sampled Gaussian mechanism (Mironov, Talwar, Zhang 2019, arXiv 1908.10530) is integrated
numerically on an even grid in float64: the integrand is analytic and falls off at both ends, so the error of the grid
is below that of the arithmetic, and orders need not be whole numbers. (dp-accounting bounds fractional orders from
above, by a series without its signs, which is up to a hundredth more.) The conversion to (epsilon, delta) is that of
Canonne, Kamath, Steinke (arXiv 2004.00010, proposition 12). All this is an upper bound; the `pld` accountant (library
dp-accounting, optional) is tighter, often by a tenth.
"""

from __future__ import annotations

import importlib
import math
from functools import lru_cache
from typing import Any, Literal

import torch

from fedlora.errors import UsageError

Accountant = Literal["rdp", "pld"]

LEAST_NOISE = 0.05
"""Below this noise multiplier the grid would grow past memory, and no epsilon there means anything: it is infinite."""

ORDERS = (
    *(1 + step / 10 for step in range(1, 100)),
    *(float(order) for order in range(11, 64)),
    *(128.0, 256.0, 512.0, 1024.0),
)
"""Orders of the Renyi divergence among which the best one is taken: those of dp-accounting, so that figures compare."""


def epsilon(rate: float, noise: float, steps: int, delta: float, *, accountant: Accountant = "rdp") -> float:
    """The epsilon at `delta` of `steps` sums over Poisson samples, for adding or removing one member.

    `rate` in (0, 1] is the probability with which each member is in a sum, `noise` the standard deviation of the
    sum's Gaussian noise in units of one member's largest contribution. 0 without steps, infinite without noise.
    Raises ValueError outside these ranges, UsageError when `pld` is asked for and its library is missing.
    """
    if not (0 < rate <= 1 and noise >= 0 and steps >= 0 and 0 < delta < 1):
        raise ValueError(f"rate {rate}, noise {noise}, steps {steps}, delta {delta}: out of range")
    if steps == 0:
        return 0.0
    if noise < LEAST_NOISE:
        return math.inf
    if accountant == "pld":
        return _pld_epsilon(rate, noise, steps, delta)
    bounds = [
        _to_epsilon(order, steps * divergence, delta)
        for order, divergence in zip(ORDERS, _divergences(rate, noise), strict=True)
    ]
    return max(0.0, min(bounds))


@lru_cache(maxsize=256)
def _divergences(rate: float, noise: float) -> tuple[float, ...]:
    return tuple(renyi_divergence(rate, noise, order) for order in ORDERS)


def renyi_divergence(rate: float, noise: float, order: float) -> float:
    """Renyi divergence of `order` > 1 of one sum: `log E[(1 - q + q e^((2x-1)/(2 z^2)))^a] / (a - 1)`, x ~ N(0, z^2).

    Of the two directions (a member more, a member less) this is the larger one.
    """
    if rate == 1:
        return order / (2 * noise**2)
    # the mass lies around x = 0 and x = order; the integrand's branch points lie pi z^2 off the real axis
    step = min(noise, noise**2) / 4
    first, last = -12 * noise, order + 12 * noise
    x = torch.linspace(first, last, math.ceil((last - first) / step) + 1, dtype=torch.float64)
    spacing = (last - first) / (len(x) - 1)
    ratio = torch.logaddexp(
        torch.tensor(math.log1p(-rate), dtype=torch.float64), math.log(rate) + (2 * x - 1) / (2 * noise**2)
    )
    density = -(x**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    log_moment = float(torch.logsumexp(density + order * ratio, 0)) + math.log(spacing)
    return max(0.0, log_moment) / (order - 1)


def _to_epsilon(order: float, divergence: float, delta: float) -> float:
    return divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


@lru_cache(maxsize=256)
def _pld_epsilon(rate: float, noise: float, steps: int, delta: float) -> float:
    losses = load_pld()
    one = losses.from_gaussian_mechanism(standard_deviation=noise, sampling_prob=rate)
    return float(one.self_compose(steps).get_epsilon_for_delta(delta))


def load_pld() -> Any:
    """dp-accounting's module of privacy loss distributions; UsageError when the library is not installed."""
    try:
        return importlib.import_module("dp_accounting.pld.privacy_loss_distribution")
    except ImportError as error:
        raise UsageError(
            f"dp_accountant=pld needs the library dp-accounting ({error})",
            hint="pip install 'fedlora[dp]', or use --dp_accountant rdp",
        ) from None
