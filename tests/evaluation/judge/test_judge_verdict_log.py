"""The verdict log survives kills and refuses what was edited."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.errors import DataError
from fedlora.evaluation.judge.verdict_log import StoredVerdict, VerdictLog


def verdict(key: str, score: int = 50) -> StoredVerdict:
    return StoredVerdict(
        key=key,
        row=1,
        order="baseline_first",
        score_a=score,
        score_b=1,
        verdict="A",
        model="m\u00fc",
        fingerprint="",
        dropped=["temperature"],
        request="r",
    )


def filled(path: Path, *keys: str) -> VerdictLog:
    log = VerdictLog(path)
    for key in keys:
        log.append(verdict(key))
    return log


def test_a_log_gives_back_what_was_appended_and_the_newest_wins(tmp_path: Path) -> None:
    log = filled(tmp_path / "deep" / "log.jsonl", "a", "b")
    log.append(verdict("a", 7))
    for reader in (log, VerdictLog(log.path)):
        assert reader["a"] == verdict("a", 7)
        assert "b" in reader
        assert "c" not in reader


def test_opening_a_log_that_is_not_there_writes_nothing(tmp_path: Path) -> None:
    assert "a" not in VerdictLog(tmp_path / "log.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_log_cut_anywhere_in_its_last_line_loses_that_line_at_most(tmp_path: Path) -> None:
    path = filled(tmp_path / "log.jsonl", "a", "b").path
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for cut in [*range(start, len(whole), 9), len(whole) - 2, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        log = VerdictLog(path)
        assert "a" in log
        assert ("b" in log) == (cut == len(whole) - 1)
        log.append(verdict("c"))
        again = VerdictLog(path)
        assert "a" in again
        assert "c" in again
    path.write_bytes(whole + bytes(500))
    assert "b" in VerdictLog(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [b"", b"{}", b"no", b'{"key": "a"}', b"\xff"])
def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path, line: bytes) -> None:
    path = filled(tmp_path / "log.jsonl", "a", "b").path
    first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([first, line, second, b""]))
    with pytest.raises(DataError, match=r"log\.jsonl:2"):
        VerdictLog(path)


def test_a_score_that_was_edited_out_of_range_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path / "log.jsonl", "a", "b").path
    path.write_text(path.read_text().replace('"score_a": 50', '"score_a": 500'))
    with pytest.raises(DataError, match=r"log\.jsonl:1"):
        VerdictLog(path)


def test_forgetting_takes_the_named_verdicts_once_there_is_a_new_one_and_no_others(tmp_path: Path) -> None:
    log = filled(tmp_path / "log.jsonl", "a", "b", "c")
    log.forget({"a", "c", "z"})
    assert "a" not in log
    assert "a" in VerdictLog(log.path)
    log.append(verdict("c", 7))
    log.append(verdict("d"))
    for reader in (log, VerdictLog(log.path)):
        assert [key in reader for key in "abcd"] == [False, True, True, True]
        assert reader["c"].score_a == 7
