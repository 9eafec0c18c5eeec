"""The likelihood of continuations: what a plain forward pass gives, however rows are merged, cut and shared."""

from __future__ import annotations

import random

import pytest
import torch

from fedlora.llm import likelihood
from fedlora.llm.base_model import BaseModel, load_base_model
from fedlora.llm.likelihood import Continuation, score_continuations


@pytest.fixture(scope="module")
def base(tiny_model) -> BaseModel:
    return load_base_model(str(tiny_model), device="cpu", dtype="float32")


def plainly(base: BaseModel, one: Continuation) -> tuple[float, bool]:
    """One row alone through the model's own forward pass."""
    ids = torch.tensor([list(one.ids)])
    with torch.no_grad():
        logits = base.model(input_ids=ids[:, :-1]).logits[0].double()
    found = logits[one.start - 1 :]
    targets = ids[0, one.start :]
    chosen = found.log_softmax(-1).gather(1, targets[:, None])
    return float(chosen.sum()), bool((found.argmax(-1) == targets).all())


def draw_questions(count: int, *, context: int, choices: int, length: int) -> list[Continuation]:
    """Contexts that begin alike, each with several continuations."""
    draw = random.Random(1)
    shots = [draw.randrange(3, 250) for _ in range(context)]
    found = []
    for _ in range(count):
        own = [*shots, *(draw.randrange(3, 250) for _ in range(draw.randrange(1, 9)))]
        for _ in range(choices):
            after = [draw.randrange(3, 250) for _ in range(draw.randrange(1, length + 1))]
            found.append(Continuation([*own, *after], len(own)))
    return found


def check(base: BaseModel, asked: list[Continuation], budget: int = 2048) -> None:
    found = score_continuations(base, asked, tokens_per_pass=budget)
    for one, expected in zip(found, (plainly(base, each) for each in asked), strict=True):
        assert one.log_probability == pytest.approx(expected[0], abs=2e-4)
        assert one.is_greedy == expected[1]


@pytest.mark.parametrize(("context", "length"), [(0, 6), (40, 1), (200, 5)])
@pytest.mark.parametrize("budget", [1, 700, 2048])
def test_every_continuation_has_the_likelihood_of_a_row_alone(base, context, length, budget):
    check(base, draw_questions(5, context=context, choices=3, length=length), budget)


def test_the_most_probable_continuation_is_greedy_and_any_other_is_not(base):
    ids = [5, 9, 77]
    with torch.no_grad():
        for _ in range(3):
            ids.append(int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 250]
    found = score_continuations(base, [Continuation(ids, 3), Continuation(other, 3)], tokens_per_pass=64)
    assert [one.is_greedy for one in found] == [True, False]


def test_one_context_with_several_last_tokens_goes_through_the_model_once(base, monkeypatch):
    seen = []
    make = likelihood._make_batch
    monkeypatch.setattr(likelihood, "_make_batch", lambda *of: (batch := make(*of), seen.append(batch))[0])
    asked = [Continuation([4, 8, 15, last], 3) for last in (16, 23, 42, 108)]
    check(base, [*asked, Continuation([4, 8, 15, 16, 23], 3)])
    assert sum(len(batch.ids) for batch in seen) == 2


def test_a_long_context_of_several_choices_goes_through_the_model_once(base, monkeypatch):
    seen = []
    make = likelihood._make_batch
    monkeypatch.setattr(likelihood, "_make_batch", lambda *of: (batch := make(*of), seen.append(batch))[0])
    asked = draw_questions(6, context=300, choices=4, length=3)
    check(base, asked)
    assert sum(len(batch.prefix) + batch.ids.numel() for batch in seen) < sum(len(one.ids) for one in asked) / 4


def test_nothing_asked_is_nothing_found(base):
    assert score_continuations(base, [], tokens_per_pass=64) == []
