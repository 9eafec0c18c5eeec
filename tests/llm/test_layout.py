import pytest

from fedlora.llm.layout import Layout, LayoutBook, Reduction


def test_a_reduction_holds_from_its_step_for_its_client_and_for_all_in_later_rounds():
    layout = Layout(4096, reductions=(Reduction(2, 5, 3, 2048), Reduction(2, 5, 7, 1024), Reduction(3, 1, 0, 512)))
    budgets = {
        (1, 5, 9): 4096,
        (2, 5, 2): 4096,
        (2, 5, 3): 2048,
        (2, 5, 7): 1024,
        (2, 4, 9): 4096,
        (2, 6, 9): 4096,
        (3, 0, 0): 1024,
        (3, 1, 0): 512,
        (4, 9, 0): 512,
    }
    assert {where: layout.budget(*where) for where in budgets} == budgets


def test_a_layout_survives_its_record():
    layout = Layout(4096, True, (Reduction(2, 5, 3, 2048),))
    assert Layout.from_record(layout.record()) == layout


def test_the_book_tells_of_every_reduction_once():
    told = []
    book = LayoutBook(Layout(4096), told.append)
    for _ in range(2):
        book.add(Reduction(1, 0, 2, 2048))
    assert told == [Layout(4096, reductions=(Reduction(1, 0, 2, 2048),))]


def test_a_reduction_never_raises_the_budget():
    layout = Layout(1000, reductions=(Reduction(1, 0, 0, 4000),))
    assert layout.budget(5, 0, 0) == 1000


@pytest.mark.parametrize("missing", ["tokens_per_pass", "gradient_checkpointing", "reductions"])
def test_a_record_with_a_missing_field_is_no_layout(missing):
    record = Layout(4096).record()
    del record[missing]
    with pytest.raises(KeyError, match=missing):
        Layout.from_record(record)
