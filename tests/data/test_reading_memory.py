"""A row of 200 MB costs no more memory than the largest row that is allowed, whatever the format."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

MEBIBYTE = 1 << 20
SIZE = 200
ALLOWED = 64 * MEBIBYTE
ROLES = pyarrow.array([2, 3], "int32")

MEASURE = """
import sys
from pathlib import Path
from fedlora.data.records import read_rows
from fedlora.errors import DataError

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

read_rows(Path(sys.argv[1]))  # what the libraries take is there before
before = peak()
try:
    read_rows(Path(sys.argv[2]))
    message = "no error"
except DataError as error:
    message = str(error).splitlines()[0]
print(peak() - before, message)
"""


def repeat(first: str, last: str = "", *, piece: str = "x" * MEBIBYTE) -> Iterator[bytes]:
    yield first.encode()
    yield from [piece.encode()] * SIZE
    yield last.encode()


def table(texts: list[str], **options: str) -> bytes:
    return written({"instruction": texts, "output": ["o"] * len(texts)}, **options)


def talks(indices: pyarrow.Array) -> bytes:
    """A short conversation, and one whose turns all have the same text of a mebibyte, or are null."""
    texts = pyarrow.DictionaryArray.from_arrays(indices, ["x" * MEBIBYTE, "hi", "user", "assistant"])
    roles = pyarrow.DictionaryArray.from_arrays(pyarrow.concat_arrays([ROLES, indices[2:]]), texts.dictionary)
    turns = pyarrow.StructArray.from_arrays([roles, texts], ["role", "content"])
    return written({"messages": pyarrow.ListArray.from_arrays([0, 2, len(indices)], turns)}, compression="zstd")


def written(columns: dict[str, Any], **options: str) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, **options)
    return sink.getvalue()


def understate(content: bytes) -> bytes:
    """A Parquet file whose footer declares 1,000 bytes wherever it declares the 200 MiB that its page unpacks to."""
    length = int.from_bytes(content[-8:-4], "little")
    pages, footer = content[: -8 - length], content[-8 - length : -8]
    group = pyarrow.parquet.read_metadata(io.BytesIO(content)).row_group(0)
    for size in (group.column(0).total_uncompressed_size, group.total_byte_size):
        footer = footer.replace(varint(size), varint(1000))
    changed = pages + footer + content[-8:]
    assert pyarrow.parquet.read_metadata(io.BytesIO(changed)).row_group(0).column(0).total_uncompressed_size == 1000
    return changed


def varint(size: int) -> bytes:
    """A number in Thrift's compact protocol, in five bytes even where fewer do."""
    return bytes((size * 2 >> 7 * place & 127) | (128 if place < 4 else 0) for place in range(5))


def write_cell(path: str) -> None:
    """The Parquet file of a name."""
    if "turns" in path or "endless" in path:
        more = pyarrow.nulls(16 << 20, "int32") if "endless" in path else pyarrow.array([0] * SIZE, "int32")
        Path(path).write_bytes(talks(pyarrow.concat_arrays([pyarrow.array([1, 1], "int32"), more])))
        return
    content = table(["i", "x" * (SIZE * MEBIBYTE), "i"], compression="zstd")
    # Arrow alone unpacks the page whatever the footer declares, so only the pages' own headers are a bound
    Path(path).write_bytes(understate(content) if "understated" in path else content)


WRITE = "import sys; sys.path.append(sys.argv[1]); from test_reading_memory import write_cell; write_cell(sys.argv[2])"
LINE = '{"instruction": "i", "output": "o"}'
PIECES = {
    "line.jsonl": lambda: repeat(f'{LINE}\n{{"instruction": "', '"}\n'),
    "wide.jsonl": lambda: repeat(f'{LINE}\n{{"instruction": "', '"}\n', piece="𝄞" * (MEBIBYTE // 4)),
    "array.json": lambda: repeat(f'[{LINE},\n{{"instruction": "', '"}]'),
    "wide.json": lambda: repeat(f'[{LINE},\n{{"instruction": "', '"}]', piece="𝄞" * (MEBIBYTE // 4)),
    "fields.json": lambda: repeat(f'[{LINE},\n{{"a": 0', "}]", piece=', "b": [{}]' * (MEBIBYTE // 11)),
    "field.csv": lambda: repeat("instruction,output\ni,", "\n"),
    "lines.csv": lambda: repeat('instruction,output\ni,"', '"\n', piece="x\n" * (MEBIBYTE // 2)),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "rows.parquet"
    path.write_bytes(table(["i"]))
    return path


def measure(sound: Path, path: Path) -> tuple[int, str]:
    command = [sys.executable, "-c", MEASURE, str(sound), str(path)]
    growth, message = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(" ", 1)
    return int(growth), message.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    "name",
    [
        *(
            pytest.param(name, marks=pytest.mark.thorough if "wide" in name or name == "field.csv" else [])
            for name in PIECES
        ),
        "line.jsonl.gz",
        pytest.param("cell.parquet", marks=pytest.mark.thorough),
        "understated.parquet",
        "turns.parquet",
        pytest.param("endless.parquet", marks=pytest.mark.thorough),
    ],
)
def test_a_gigantic_row_is_refused_in_bounded_memory(tmp_path: Path, sound: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".gz"):
        with gzip.open(path, "wb", compresslevel=1) as packed:
            packed.writelines(PIECES["line.jsonl"]())
    elif name.endswith(".parquet"):
        # Arrow takes five times the text, which this process would not give back
        subprocess.run([sys.executable, "-c", WRITE, str(Path(__file__).parent), str(path)], check=True)
    else:
        with path.open("wb") as file:
            file.writelines(PIECES[name]())
    growth, message = measure(sound, path)
    path.unlink()
    assert growth < ALLOWED, f"{growth / MEBIBYTE:.0f} MiB"
    if name == "endless.parquet":
        assert "values in 2 rows" in message
    elif name == "turns.parquet":
        assert message == f"{path}: row 2: the row is larger than 4194304 bytes"
    elif name.endswith(".parquet"):
        assert message.startswith(f"{path}: a page of the column 'instruction' takes 2097")
    else:
        assert message == f"{path}:2:1: the row is larger than 4194304 bytes"


NUM_ROWS = 20_000
CONSUME = MEASURE.replace("import read_rows", "import iter_rows, read_rows").replace(
    "read_rows(Path(sys.argv[2]))", "print(sum(1 for _ in iter_rows(Path(sys.argv[2]))))"
)


def write_many(path: Path) -> None:
    """30 MB of rows with different texts, as one row group where the format has such."""
    rows = ({"instruction": f"i{number}", "output": f"{number} " + "text " * 300} for number in range(NUM_ROWS))
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif not path.suffix:
        # not at the top: `WRITE` imports this module where only its own folder is on the path
        from saved_data import save

        size = NUM_ROWS // 2
        every = list(rows)
        save(path, every[:size], every[size:], batch=1000)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(pyarrow.compress(lines, "zstd", asbytes=True) if path.suffix == ".zst" else lines)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    "name",
    ["many.parquet", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("many.jsonl", "many.zst", "many"))],
)
def test_memory_stays_flat_while_rows_are_read_one_by_one(tmp_path: Path, sound: Path, name: str) -> None:
    path = tmp_path / (f"{name[:-4]}.jsonl.zst" if name.endswith(".zst") else name)
    write_many(path)
    command = [sys.executable, "-c", CONSUME, str(sound), str(path)]
    count, growth = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[:2]
    assert int(count) == NUM_ROWS
    # Arrow keeps what it freed; as a dictionary of the row group these texts took 140 MB
    assert int(growth) < 48 * MEBIBYTE, f"{int(growth) / MEBIBYTE:.0f} MiB"
