"""Messages: where they go, and that one stage's silence is not another's."""

from __future__ import annotations

import threading

from fedlora.console import collect_lines, say
from fedlora.plain_text import table_text


def test_the_innermost_collector_keeps_the_lines_and_other_threads_stay_heard(capsys):
    outer: list[str] = []
    inner: list[str] = []
    with collect_lines(outer):
        say("first")
        with collect_lines(inner):
            say("second")
        say("third")
        thread = threading.Thread(target=say, args=("elsewhere",))
        thread.start()
        thread.join()
    say("last")
    assert (outer, inner) == (["first", "third"], ["second"])
    assert capsys.readouterr().err == "elsewhere\nlast\n"


def test_columns_are_aligned_and_rules_stand_where_they_are_asked_for():
    rows = [("ab", "1", "x"), ("c", "234", "yy")]
    assert table_text(("name", "n", "what"), rows, left=(0, 2), rules=(0, 1)).splitlines() == [
        "name    n  what",
        "----  ---  ----",
        "ab      1  x",
        "----  ---  ----",
        "c     234  yy",
    ]
    assert table_text(("name", "n"), [("ab", "1")], rules=()).splitlines() == ["name  n", "ab    1"]
