"""Messages: where they go, and that one stage's silence is not another's."""

from __future__ import annotations

import io
import sys
import threading

from fedlora import console
from fedlora.console import Progress, collect_lines, say
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


def test_progress_says_what_it_counts_and_what_was_last_seen(capsys, monkeypatch):
    """What an earlier call has done is counted, and no time of this call was spent on it."""
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with Progress("train run", 2000, "examples", done=1000, interval=0) as progress:
        now = 2.0
        progress.advance(100)
        progress.note = "loss 5.123"
        now = 4.0
        progress.skip(400)
        now = 6.0
        progress.advance(100)
        now = 10.0
        progress.advance(400, "last")
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "train run: 1,100 of 2,000 examples, about 18 s left",
        "train run: 1,500 of 2,000 examples, loss 5.123, about 20 s left",
        "train run: 1,600 of 2,000 examples, loss 5.123, about 12 s left",
        "train run: done in 10 s",
    ]


def test_a_bar_shows_count_unit_and_note_on_standard_error(capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress("train run", 2000, "examples", done=1000) as progress:
        progress.advance(100, "loss 5.123")
    assert "1,100 of 2,000 examples, loss 5.123" in terminal.getvalue()
    assert capsys.readouterr().out == ""
