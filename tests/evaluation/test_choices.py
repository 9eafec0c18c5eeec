"""Choices by likelihood: which reply has the least loss."""

from __future__ import annotations

import pytest

from fedlora.evaluation.choices import read_choice
from fedlora.rows import Row


def row(*choices: str, output: str = "b") -> Row:
    return Row("q", "", output, "c", more={"choices": list(choices)})


def test_the_right_one_is_found_among_the_choices_and_each_is_a_row() -> None:
    choice = read_choice(row("a", "b ", "ccc"))
    assert choice is not None
    assert choice.right == 1
    assert [one.output for one in choice.candidates] == ["a", "b ", "ccc"]
    assert {one.instruction for one in choice.candidates} == {"q"}
    assert read_choice(Row("q", "", "b", "c")) is None


@pytest.mark.parametrize(
    ("losses", "whole", "by_byte"),
    [
        ([2.0, 1.0, 4.0], True, True),
        ([0.5, 1.0, 4.0], False, False),
        # 4 over six bytes is less than 1 over one
        ([2.0, 1.0, 4.0, 4.0], True, False),
        # a tie is no choice
        ([1.0, 1.0, 4.0], False, False),
    ],
)
def test_the_least_loss_is_the_choice(losses: list[float], whole: bool, by_byte: bool) -> None:
    choice = (
        read_choice(row("a", "b", "ccc", "\u00e9\u00e9\u00e9"))
        if len(losses) > 3
        else read_choice(row("a", "b", "ccc"))
    )
    assert choice is not None
    assert choice.is_right(losses) is whole
    assert choice.is_right(losses, per_byte=True) is by_byte
