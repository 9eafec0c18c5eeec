import pytest
import torch
from torch import nn

from fedlora.llm.local_gradient import GradientTerms
from fedlora.methods.hetlora import TailPenalty
from fedlora.types import Phase


@pytest.fixture
def factor():
    """A factor at (1, 2) whose loss has the gradient (10, 20)."""
    factor = nn.Parameter(torch.tensor([1.0, 2.0]))
    factor.grad = torch.tensor([10.0, 20.0])
    return factor


def state(*values: float) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor(values)}


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ({}, (10.0, 20.0)),
        ({"correction": state(0.5, -3.0)}, (10.5, 17.0)),
        ({"proximal_mu": 2.0, "anchor": state(0.0, 5.0)}, (12.0, 14.0)),
        ({"proximal_mu": 2.0, "anchor": state(0.0, 5.0), "correction": state(1.0, 1.0)}, (13.0, 15.0)),
        ({"proximal_mu": 0.0, "anchor": state(0.0, 5.0)}, (10.0, 20.0)),
    ],
)
def test_terms_are_added_to_the_gradient(factor, terms, expected):
    GradientTerms(Phase({}, **terms), {"x": factor}, needs_mean=False).add()
    assert tuple(factor.grad.tolist()) == expected


def test_the_mean_is_of_what_the_optimizer_gets_less_the_correction(factor):
    terms = GradientTerms(Phase({}, correction=state(1.0, 1.0)), {"x": factor}, needs_mean=True)
    terms.add()
    factor.grad *= 0.5  # clipped
    terms.count()
    factor.grad = torch.tensor([20.0, 0.0])
    terms.add()
    terms.count()
    assert terms.mean()["x"].tolist() == [(5.5 + 21.0) / 2 - 1.0, (10.5 + 1.0) / 2 - 1.0]
    assert GradientTerms(Phase({}), {"x": factor}, needs_mean=False).mean() is None


def test_a_factor_that_no_token_reached_has_the_gradient_of_the_terms_alone(factor):
    factor.grad = None
    GradientTerms(Phase({}, correction=state(0.5, -3.0)), {"x": factor}, needs_mean=False).add()
    assert factor.grad.tolist() == [0.5, -3.0]


def test_a_term_without_a_tensor_for_a_trained_factor_is_an_error(factor):
    with pytest.raises(KeyError):
        GradientTerms(Phase({}, correction={"y": torch.zeros(2)}), {"x": factor}, needs_mean=False)


def factors_of(rank: int) -> dict[str, nn.Parameter]:
    """One layer's factors with a loss's gradient of ones."""
    draw = torch.Generator().manual_seed(rank)
    shapes = {"l.lora_A.weight": (rank, 5), "l.lora_B.weight": (3, rank)}
    factors = {key: nn.Parameter(torch.randn(shape, generator=draw)) for key, shape in shapes.items()}
    for factor in factors.values():
        factor.grad = torch.ones_like(factor)
    return factors


def test_the_penalty_on_the_tail_has_the_gradient_of_the_product_of_its_norms():
    factors = factors_of(4)
    GradientTerms(Phase({}, terms=(TailPenalty(0.7, 2),)), factors, needs_mean=False).add()
    a, b = (factors[f"l.lora_{half}.weight"].detach().clone().requires_grad_() for half in "AB")
    (0.7 * a[2:].norm() * b[:, 2:].norm()).backward()
    for half, expected in (("A", a.grad), ("B", b.grad)):
        torch.testing.assert_close(factors[f"l.lora_{half}.weight"].grad, 1 + expected)
    assert bool((factors["l.lora_A.weight"].grad[:2] == 1).all())


def test_where_a_norm_is_zero_the_penalty_pulls_at_nothing_and_is_a_number():
    factors = factors_of(4)
    with torch.no_grad():
        factors["l.lora_B.weight"].zero_()
    GradientTerms(Phase({}, terms=(TailPenalty(0.7, 4),)), factors, needs_mean=False).add()
    GradientTerms(Phase({}, terms=(TailPenalty(0.7, 2),)), factors, needs_mean=False).add()
    assert all(bool((factor.grad == 1).all()) for factor in factors.values())


def test_terms_of_a_client_of_smaller_rank_act_on_its_directions_alone():
    factors = factors_of(4)
    start = {key: value.detach()[:2] if "lora_A" in key else value.detach()[:, :2] for key, value in factors.items()}
    with torch.no_grad():
        factors["l.lora_A.weight"][2:].zero_()
        factors["l.lora_B.weight"][:, 2:].zero_()
    phase = Phase(start, proximal_mu=2.0, anchor={key: value + 1 for key, value in start.items()}, correction=start)
    terms = GradientTerms(phase, factors, needs_mean=True)
    terms.add()
    terms.count()
    grad = factors["l.lora_A.weight"].grad
    torch.testing.assert_close(grad[:2], 1 - 2.0 + start["l.lora_A.weight"])
    assert bool((grad[2:] == 1).all())
    assert {key: value.shape for key, value in terms.mean().items()} == {k: v.shape for k, v in start.items()}
