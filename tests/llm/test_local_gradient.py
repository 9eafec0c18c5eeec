import pytest
import torch
from torch import nn

from fedlora.llm.local_gradient import GradientTerms
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


def test_the_mean_is_of_the_loss_s_own_gradients(factor):
    terms = GradientTerms(Phase({}, correction=state(1.0, 1.0)), {"x": factor}, needs_mean=True)
    terms.add()
    factor.grad = torch.tensor([20.0, 0.0])
    terms.add()
    assert terms.mean()["x"].tolist() == [15.0, 10.0]
    assert GradientTerms(Phase({}), {"x": factor}, needs_mean=False).mean() is None


def test_a_term_without_a_tensor_for_a_trained_factor_is_an_error(factor):
    with pytest.raises(KeyError):
        GradientTerms(Phase({}, correction={"y": torch.zeros(2)}), {"x": factor}, needs_mean=False)
