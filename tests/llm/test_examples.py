import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.llm.examples import Example, cut_passes, make_batch, order_steps


@given(st.lists(st.integers(1, 600), min_size=1, max_size=60), st.integers(1, 4096), st.none() | st.integers(1, 20))
def test_passes_cover_every_row_once_within_the_budget(lengths, budget, most_rows):
    passes = cut_passes(lengths, token_budget=budget, most_rows=most_rows)
    assert sorted(row for group in passes for row in group) == list(range(len(lengths)))
    for group in passes:
        assert len(group) == 1 or len(group) * max(lengths[row] for row in group) <= budget
        assert most_rows is None or len(group) <= most_rows


def test_a_long_row_is_not_padded_onto_many_short_ones():
    passes = cut_passes([500] + [20] * 30, token_budget=100_000)
    assert passes == [[0], list(range(1, 31))]


def test_rows_of_one_length_share_a_pass():
    assert len(cut_passes([50] * 16, token_budget=4096)) == 1


def examples_of(lengths: list[int]) -> list[Example]:
    return [Example(list(range(length)), 1) for length in lengths]


def test_an_epoch_holds_every_row_once_in_an_order_that_the_coordinates_decide():
    examples = examples_of(list(range(2, 25)))
    options = {"batch_size": 5, "seed": 1, "round_number": 2, "client_id": 3, "epoch": 0}
    steps = order_steps(examples, **options)
    assert sorted(len(example.ids) for step in steps for example in step) == list(range(2, 25))
    assert [len(step) for step in steps] == [5, 5, 5, 5, 3]
    random.seed(7)
    assert order_steps(examples, **options) == steps
    for changed in ({"seed": 2}, {"round_number": 1}, {"client_id": 0}, {"epoch": 1}):
        assert order_steps(examples, **{**options, **changed}) != steps


def test_grouping_by_length_forms_steps_of_neighbouring_lengths():
    examples = examples_of(random.Random(0).sample(range(2, 200), 40))
    options = {"batch_size": 8, "seed": 1, "round_number": 1, "client_id": 0, "epoch": 0}
    spans = [
        sum(max(lengths) - min(lengths) for lengths in ([len(e.ids) for e in step] for step in steps))
        for steps in (order_steps(examples, **options, by_length=True), order_steps(examples, **options))
    ]
    assert spans[0] < spans[1] / 3


def test_a_batch_predicts_each_label_from_the_position_before_it():
    batch = make_batch([Example([5, 6, 7, 8], 2), Example([9, 10], 1)], pad_id=0)
    assert batch.ids.tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert batch.targets.tolist() == [7, 8, 10]
    assert torch.equal(batch.ids.flatten()[batch.positions + 1], batch.targets)
