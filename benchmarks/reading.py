"""Reading rows from files: rows and megabytes a second, and by how much memory grows, for each format.

    python benchmarks/reading.py [--quick]

A million short rows and one file of 2 GB as JSON lines, then fewer rows in every format. The files are made here
from sentences and numbers and deleted afterwards; they are read from the page cache, because what is measured is the
reader and not a disk. Beside the million rows stands `json.loads` of the same lines, which checks nothing. A row is
dropped once it was read, as when clients' files are checked and counted at the start of a run. Encoding takes such
rows through the tokenizer of smollm2-135m in the chat template, a client's worth at a time. Every figure is a process
of its own; growth is the peak of memory above what the process held after a small file.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from part import emit, parse_arguments, say
from point import answer_points, forget_peak, peak_megabytes, resident_megabytes, run_point

SHORT, ENCODED, LARGE_BYTES, OTHERS = 1_000_000, 1_000_000, 2_000_000_000, 200_000
QUICK = 100
"""By how much --quick divides these."""
CLIENT = 10_000
"""Rows that are encoded at a time."""
SENTENCE = 'The "ward" reported:\n{number} beds, naïve count – {number} of them free. '
FORMATS = ("jsonl", "json", "csv", "parquet", "jsonl.gz", "jsonl.zst", "saved data set")


def short_rows(count: int) -> Iterator[dict[str, str]]:
    """Rows of about 130 bytes in JSON."""
    for number in range(count):
        yield {
            "instruction": f"Add {number} and {number % 97}.",
            "context": "",
            "response": f"The sum is {number + number % 97}.",
            "category": f"c{number % 8}",
        }


def long_rows(num_bytes: int) -> Iterator[dict[str, str]]:
    """Rows of about 2 KB in JSON, with line ends, quotes and characters outside ASCII, until they fill the file."""
    text = SENTENCE.format(number=17) * 24
    size = len(json.dumps({"instruction": "Report 1234567.", "response": text, "category": "c"}, ensure_ascii=False))
    for number in range(num_bytes // (size + 24 * 3 + 1)):
        yield {"instruction": f"Report {number:07}.", "response": text, "category": "c"}


def write(path: str, rows: str, size: int) -> dict[str, Any]:
    """Write a file of `short` or `long` rows in the format that its name says; how many bytes it has."""
    made = short_rows(size) if rows == "short" else long_rows(size)
    file = Path(path)
    writers: dict[str, Callable[[Path, Iterator[dict[str, str]]], None]] = {
        ".json": _write_array,
        ".csv": _write_csv,
        ".parquet": _write_parquet,
        ".zst": _write_zst,
        "": _write_saved,
    }
    writers.get(file.suffix, _write_lines)(file, made)
    return {"bytes": sum(part.stat().st_size for part in ([file] if file.is_file() else file.iterdir()))}


def _lines(rows: Iterator[dict[str, str]]) -> Iterator[bytes]:
    return ((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)


def _write_lines(file: Path, rows: Iterator[dict[str, str]]) -> None:
    with gzip.open(file, "wb", compresslevel=1) if file.suffix == ".gz" else file.open("wb") as handle:
        handle.writelines(_lines(rows))


def _write_zst(file: Path, rows: Iterator[dict[str, str]]) -> None:
    import pyarrow

    with pyarrow.CompressedOutputStream(str(file), "zstd") as handle:
        for line in _lines(rows):
            handle.write(line)


def _write_array(file: Path, rows: Iterator[dict[str, str]]) -> None:
    file.write_text(json.dumps(list(rows), ensure_ascii=False, indent=1), encoding="utf-8")


def _write_csv(file: Path, rows: Iterator[dict[str, str]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as handle:
        table = csv.writer(handle)
        table.writerow(("instruction", "context", "response", "category"))
        table.writerows(row.values() for row in rows)


def _write_parquet(file: Path, rows: Iterator[dict[str, str]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)


def _write_saved(folder: Path, rows: Iterator[dict[str, str]]) -> None:
    import pyarrow
    import pyarrow.ipc

    folder.mkdir()
    table = pyarrow.Table.from_pylist(list(rows))
    with pyarrow.ipc.new_stream(folder / "data.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=1000)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (folder / "dataset_info.json").write_text("{}")


def read(path: str, warm: str) -> dict[str, Any]:
    """Seconds and growth of memory while all rows are read, and how many there are."""
    from fedlora.data.records import iter_rows

    def consume(file: str) -> int:
        return sum(1 for _ in iter_rows(Path(file)))

    return _measure(consume, path, warm)


def load_lines(path: str, warm: str) -> dict[str, Any]:
    """The same for `json.loads` of every line."""

    def consume(file: str) -> int:
        with Path(file).open(encoding="utf-8") as lines:
            return sum(1 for line in lines if json.loads(line))

    return _measure(consume, path, warm)


def encode(path: str, warm: str) -> dict[str, Any]:
    """Seconds and growth of memory while all rows are read and encoded, and how many tokens they make."""
    from model import source_of
    from transformers import AutoTokenizer

    from fedlora.data.records import iter_rows
    from fedlora.llm.prompts import PromptEncoder

    encoder = PromptEncoder(AutoTokenizer.from_pretrained(source_of("smollm2-135m")), "chat")
    tokens = 0

    def consume(file: str) -> int:
        nonlocal tokens
        rows, count = iter_rows(Path(file)), 0
        while client := list(itertools.islice(rows, CLIENT)):
            count += len(client)
            tokens += sum(len(one.ids) for one in encoder.encode(client, cutoff=512))
        return count

    measured = _measure(consume, path, warm)
    return {**measured, "tokens_per_second": round(tokens / measured["seconds"])}


def _measure(consume: Callable[[str], int], path: str, warm: str) -> dict[str, Any]:
    consume(warm)
    before = resident_megabytes()
    forget_peak()
    began = time.perf_counter()
    rows = consume(path)
    seconds = time.perf_counter() - began
    growth = peak_megabytes() - before
    return {
        "seconds": round(seconds, 3),
        "rows": rows,
        "rows_per_second": round(rows / seconds),
        "growth_mb": round(growth, 1),
    }


def main() -> None:
    if answer_points({"write": write, "read": read, "load_lines": load_lines, "encode": encode}):
        return
    less = QUICK if parse_arguments(__doc__).quick else 1
    sides: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fedlora-reading-") as folder:
        root = Path(folder)

        def make(name: str, rows: str, size: int) -> tuple[str, int]:
            path = str(root / name)
            return path, run_point(__file__, kind="write", path=path, rows=rows, size=size)["bytes"]

        def measure(label: str, kind: str, file: tuple[str, int], warm: str) -> None:
            found = run_point(__file__, kind=kind, path=file[0], warm=warm)
            sides[label] = {**found, "mb_per_second": round(file[1] / found["seconds"] / 1e6, 1)}
            say(f"  {label}: {found['seconds']:.1f} s, memory grows by {found['growth_mb']} MB")

        warm, _ = make("warm.jsonl", "short", 1000)
        short = make("short.jsonl", "short", SHORT // less)
        measure("short rows", "read", short, warm)
        measure("short rows, json.loads", "load_lines", short, warm)
        Path(short[0]).unlink()
        some = make("some.jsonl", "short", ENCODED // less)
        measure(f"{ENCODED // less:,} short rows, read and encoded", "encode", some, warm)
        large = make("large.jsonl", "long", LARGE_BYTES // less)
        measure("one large file", "read", large, warm)
        Path(large[0]).unlink()
        for form in FORMATS:
            suffix = "" if " " in form else f".{form}"
            few, _ = make(f"few{suffix}", "short", 1000)
            measure(f"{OTHERS // less:,} rows, {form}", "read", make(f"many{suffix}", "short", OTHERS // less), few)
    ratios = {
        "short rows: fedlora over json.loads": round(
            sides["short rows"]["seconds"] / sides["short rows, json.loads"]["seconds"], 2
        ),
        "largest growth of memory while reading, MB": max(
            one["growth_mb"] for label, one in sides.items() if "encoded" not in label
        ),
    }
    notes = [
        f"the large file has {large[1] / 1e9:.2f} GB, that of the short rows {short[1] / 1e6:.0f} MB; "
        "megabytes are those of the file, packed where it is packed",
        f"encoded {CLIENT:,} rows at a time, as a client of so many rows is",
    ]
    emit("reading", sides, ratios, notes)


if __name__ == "__main__":
    main()
