"""What a user may choose: bad rows left out, numbers as text, surrogates replaced, and the largest row."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fedlora.config.train import TrainConfig
from fedlora.data import streams
from fedlora.data.records import iter_rows, read_rows
from fedlora.errors import DataError
from fedlora.rows import STRICT, ReadRules, Row

GOOD = '{"instruction": "i", "output": "o"}'
BAD = '{"instruction": "i"}'


def parquet(texts: list[str | None]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"instruction": texts, "output": ["o"] * len(texts)}), sink)
    return sink.getvalue()


SKIPPABLE = {
    "syntax.jsonl": f"{GOOD}\n{{oops\n{GOOD}\n{BAD}".encode(),
    "utf8.jsonl": f"{GOOD}\n".encode() + b"\xff\n" + f'{GOOD}\n{{"a": NaN}}'.encode(),
    "large.jsonl": f"{GOOD}\n{'x' * 5000}\n{GOOD}\n{'y' * 1027}".encode(),
    "array.json": f'[{GOOD},\n{{"instruction": 1, "output": "o"}}, {GOOD},\n{{"a": 1, "a": 2}}]'.encode(),
    "large.json": f'[{GOOD},\n"{"é" * 1000}", {GOOD},\n{BAD}]'.encode(),
    "table.csv": b'instruction,output\ni,o\n1,2,3\ni,o\n"\xff",o',
    "table.csv.gz": gzip.compress(b"instruction,output\ni,o\n1\ni,o\n1,2,3"),
    "table.csv.zst": pyarrow.compress(b"instruction,output\ni,o\n1\ni,o\n1,2,3", "zstd", asbytes=True),
    "table.parquet": parquet(["i", None, "i", "x" * 2000]),
}


PLACES = {
    "syntax.jsonl": (":2:2", ":4:1"),
    "utf8.jsonl": (":2:1", ":4:1"),
    "large.jsonl": (":2:1", ":4:1"),
    "array.json": (":2:1", ":3:1"),
    "large.json": (":2:1", ":3:1"),
    "table.csv": (":3:1", ":5:2"),
    "table.csv.gz": (":3:1", ":5:1"),
    "table.csv.zst": (":3:1", ":5:1"),
    "table.parquet": (": row 2", ": row 4"),
}


@pytest.mark.parametrize("name", SKIPPABLE)
def test_as_many_bad_rows_as_allowed_are_left_out_and_said(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(SKIPPABLE[name])
    said: list[str] = []
    rows = read_rows(path, rules=ReadRules(1024, skip_bad=2), on_skip=said.append)
    assert rows == [Row("i", "", "o", "")] * 2
    assert "(1 of at most 2)" in said[0]
    assert "(2 of at most 2)" in said[1]
    first, second = PLACES[name]
    assert said[0].startswith(f"{path}{first}: ")
    assert said[1].startswith(f"{path}{second}: ")


@pytest.mark.parametrize("name", SKIPPABLE)
def test_one_bad_row_more_is_the_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(SKIPPABLE[name])
    said: list[str] = []
    with pytest.raises(DataError, match="and 1 bad rows before it; skip_bad=1 allows no more"):
        read_rows(path, rules=ReadRules(1024, skip_bad=1), on_skip=said.append)
    assert len(said) == 1
    with pytest.raises(DataError) as caught:
        read_rows(path, rules=ReadRules(1024))
    assert "skip_bad" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", f"[{GOOD}, {{oops}}, {GOOD}]"),
        ("a.json", f'[{GOOD}, "{"x" * 5000}"'),
        ("b.csv", 'instruction,output\ni,"o"x\ni,o\n'),
        ("c.csv", "output\no\n"),
    ],
)
def test_what_makes_the_next_row_uncertain_cannot_be_left_out(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match="skip_bad cannot leave this out"):
        read_rows(path, rules=ReadRules(1024, skip_bad=9))


def test_skipped_rows_are_said_once_to_the_user_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{GOOD}\n{{"\x1b": 1}}\n')
    read_rows(path, rules=ReadRules(skip_bad=1))
    shown = capsys.readouterr().err
    assert shown.count(f"{path}:2:3: ") == 1
    assert "\x1b" not in shown


@pytest.mark.parametrize("number", ["7", "-0", "1.50", "1e5", "1E+400", "123456789012345678901234567890", "0.1"])
def test_numbers_become_text_in_their_own_spelling(tmp_path: Path, number: str) -> None:
    for name, form in (("a.jsonl", "{}"), ("a.json", "[{}]")):
        path = tmp_path / name
        path.write_text(form.format(f'{{"instruction": "i", "output": {number}, "other": [{number}]}}'))
        assert read_rows(path, rules=ReadRules(numbers_as_text=True))[0].output == number
        with pytest.raises(DataError, match="got a number") as caught:
            read_rows(path)
        assert "--numbers_as_text" in caught.value.hint


def test_truth_values_and_null_are_no_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for value in ("true", "null", "[1]"):
        path.write_text(f'{{"instruction": "i", "output": {value}}}')
        with pytest.raises(DataError, match="must be text"):
            read_rows(path, rules=ReadRules(numbers_as_text=True))


def test_half_surrogate_pairs_are_replaced_on_demand_and_whole_ones_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "\\ud800a\\udc00", "output": "\\ud83d\\ude00"}')
    row = read_rows(path, rules=ReadRules(surrogates="replace"))[0]
    assert (row.instruction, row.output) == ("\ufffda\ufffd", "😀")
    with pytest.raises(DataError, match=r"half a surrogate pair \(\\ud800\)") as caught:
        read_rows(path)
    assert "--surrogates replace" in caught.value.hint


def test_a_nul_is_text_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "a\\u0000b", "output": "o"}')
    (tmp_path / "b.csv").write_bytes(b"instruction,output\na\0b,o")
    for name in ("a.jsonl", "b.csv"):
        assert read_rows(tmp_path / name)[0].instruction == "a\0b"


@pytest.mark.parametrize("letter", ["x", "é", "𝄞"])
def test_the_largest_row_is_counted_in_bytes(tmp_path: Path, letter: str) -> None:
    row = {"instruction": letter * ((2000 - 37) // len(letter.encode())), "output": "o"}
    text = json.dumps(row, ensure_ascii=False)
    size = len(text.encode())
    assert 1990 < size <= 2000
    for name, content in (("a.jsonl", f"{text}\r\n{text}"), ("a.json", f"[ {text} , {text} ]"), ("a", text)):
        path = tmp_path / name
        path.write_text(content, newline="")
        assert list(iter_rows(path, rules=ReadRules(size)))
        with pytest.raises(DataError, match=f"the row is larger than {size - 1} bytes") as caught:
            read_rows(path, rules=ReadRules(size - 1))
        assert "--max_record_bytes" in caught.value.hint


def test_a_csv_record_over_many_lines_counts_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('instruction,output\ni,o\ni,"' + "line\n" * 400 + '"\n')
    assert len(read_rows(path, rules=ReadRules(2100))) == 2
    with pytest.raises(DataError, match=r":3:1: the row is larger than 1024 bytes"):
        read_rows(path, rules=ReadRules(1024))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_packed_data_that_unpacks_without_end_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(streams, "_MOST_UNPACKED", 1 << 20)
    path, content = tmp_path / f"a.jsonl.{suffix}", f"{GOOD}\n".encode() * 100_000
    path.write_bytes(gzip.compress(content) if suffix == "gz" else pyarrow.compress(content, "zstd", asbytes=True))
    with pytest.raises(DataError, match="unpacks to more than 200 times its size"):
        read_rows(path)


def test_the_flags_are_the_rules_and_only_what_differs_is_recorded() -> None:
    assert TrainConfig.of().read_rules == STRICT
    assert STRICT.record() == {}
    changed = {"skip_bad": 3, "max_record_bytes": 2048, "numbers_as_text": True, "surrogates": "replace"}
    config = TrainConfig.of(**changed)
    assert config.read_rules.record() == changed
    assert changed.items() <= config.record().items()
