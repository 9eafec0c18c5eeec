"""What a Retry-After means."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest

from fedlora.evaluation.judge.replies import LONGEST_WAIT, read_retry_after


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", 0.0),
        ("1.5", 1.5),
        (" 12 ", 12.0),
        ("-3", 0.0),
        ("121", LONGEST_WAIT),
        ("inf", LONGEST_WAIT),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", LONGEST_WAIT),
        (None, None),
        ("", None),
        ("nan", None),
        ("soon", None),
        ("Fri, 99 Dec 2030 23:59:59 GMT", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date_with_a_cap(value: str | None, expected: float | None) -> None:
    assert read_retry_after(value) == expected


def test_a_date_a_minute_ahead_is_a_minute_of_waiting() -> None:
    seconds = read_retry_after(formatdate(time.time() + 60, usegmt=True))
    assert seconds is not None
    assert 57 < seconds <= 60
