"""Adapter files that lie about their size, their types or their order: refused, and without taking memory."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.errors import UsageError
from fedlora.llm.adapter_files import load_adapter, read_shapes, to_bin, to_safetensors

A, B = "base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"
SHAPES = {A: (2, 3), B: (4, 2)}
STATE = {A: torch.arange(6.0).view(2, 3), B: torch.arange(8.0).view(4, 2) / 7}


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def with_header(header: Any, values: bytes = bytes(56), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + values


def entries(**changes: Any) -> dict[str, Any]:
    """A header that fits, with fields of A changed."""
    a = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}
    return {A: a, B: {"dtype": "F32", "shape": [4, 2], "data_offsets": [24, 56]}}


SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "header of 0 bytes"),
    "seven bytes": (bytes(7), "header of 0 bytes"),
    "a header of 100 MB": (with_header(b" " * 100, length=100_000_000), "header of 100000000 bytes"),
    "a header of 2**63": (with_header(b"{}", length=2**63), "header of 9223372036854775808"),
    "a header of blanks beyond all need": (with_header(b" " * 70_000 + b"{}"), "larger than|header of"),
    "100,000 keys": (with_header({f"k{n}": entries()[A] for n in range(100_000)}), "larger than"),
    "no JSON": (with_header(b"{nothing}"), "header:"),
    "deep nesting": (with_header(b"[" * 60_000), "header:"),
    "no UTF-8": (with_header(b"\xff\xfe{}"), "header:"),
    "a list": (with_header([]), "not an object"),
    "a name twice": (with_header(json.dumps(entries()).replace("_B", "_A").encode()), "given twice"),
    "NaN": (with_header(b'{"a": NaN}'), "NaN"),
    "an entry that is a list": (with_header({**entries(), A: []}), "an entry of the header"),
    "an entry with more": (with_header(entries(extra=1)), "an entry of the header"),
    "three offsets": (with_header(entries(data_offsets=[0, 24, 24])), "two offsets"),
    "offsets as text": (with_header(entries(data_offsets=["0", "24"])), "not made of sizes"),
    "a negative offset": (with_header(entries(data_offsets=[-24, 0])), "not made of sizes"),
    "a shape of floats": (with_header(entries(shape=[2.0, 3.0])), "not made of sizes"),
    "a shape of true": (with_header(entries(shape=[True, 6])), "not made of sizes"),
    "a product that overflows": (with_header(entries(shape=[2**40, 2**40])), "has shape"),
    "a scalar": (with_header(entries(shape=[], data_offsets=[0, 4])), "has shape"),
    "no rows": (with_header(entries(shape=[0, 3], data_offsets=[0, 0])), "has shape"),
    "overlapping offsets": (
        with_header({A: entries()[A], B: {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]}}),
        "bytes .* cannot be",
    ),
    "a gap": (with_header(entries(data_offsets=[8, 32])), "bytes .* cannot be"),
    "offsets beyond the end": (with_header(entries(), values=bytes(40)), "40 bytes of values, expected 56"),
    "bytes after the end": (with_header(entries(), values=bytes(57)), "57 bytes of values, expected 56"),
    "a type that lies": (with_header(entries(dtype="F16")), "bytes .* cannot be"),
    "an unknown type": (with_header(entries(dtype="F4")), "type F4"),
    "a float8": (with_header(entries(dtype="F8_E4M3")), "type F8_E4M3"),
    "integers": (with_header(entries(dtype="I32")), "type I32"),
    "complex numbers": (with_header(entries(dtype="C64")), "type C64"),
    "a type that is a list": (with_header(entries(dtype=["F32"])), "type"),
    "keys of another": (with_header({"x" * 5000: entries()[A], B: entries()[B]}), "missing keys"),
    "infinity": (to_safetensors({**STATE, A: torch.full((2, 3), torch.inf)}), "non-finite"),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_lie_in_safetensors_is_refused_by_its_kind(tmp_path, name):
    content, message = SAFETENSORS[name]
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        load_adapter(path, SHAPES)
    assert len(str(caught.value)) < 400 + len(str(path))


def rezipped(change: Callable[[str, bytes], bytes | None], kind: int = zipfile.ZIP_STORED) -> bytes:
    source, target = zipfile.ZipFile(io.BytesIO(to_bin(STATE))), io.BytesIO()
    with zipfile.ZipFile(target, "w", kind) as archive:
        for name in source.namelist():
            if (content := change(name.partition("/")[2], source.read(name))) is not None:
                archive.writestr(name, content)
    return target.getvalue()


def twice() -> bytes:
    buffer = io.BytesIO(to_bin(STATE))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("archive/data/0", bytes(24))
    return buffer.getvalue()


def flipped_value() -> bytes:
    content = bytearray(to_bin(STATE))
    content[content.index(STATE[B].numpy().tobytes()) + 5] ^= 1
    return bytes(content)


wide = torch.zeros(10**6)
BINS: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "not a zip archive"),
    "an expanded view": (lambda: saved({**STATE, A: torch.zeros(1).expand(10**12)}), "has shape"),
    "a transposed factor": (lambda: saved({**STATE, A: STATE[A].t()}), "has shape"),
    "a view of a large storage": (lambda: saved({**STATE, A: wide[:6].view(2, 3)}), "larger than"),
    "integers": (lambda: saved({**STATE, A: STATE[A].int()}), "type IntStorage"),
    "complex numbers": (lambda: saved({**STATE, A: STATE[A].to(torch.complex64)}), "ComplexFloatStorage"),
    "float8": (lambda: saved({**STATE, A: STATE[A].to(torch.float8_e4m3fn)}), "asks for"),
    "sparse": (lambda: saved({**STATE, A: STATE[A].to_sparse()}), "asks for"),
    "quantised": (lambda: saved({**STATE, A: torch.quantize_per_tensor(STATE[A], 1, 0, torch.qint8)}), "asks for"),
    "meta": (lambda: saved({**STATE, A: STATE[A].to("meta")}), "asks for"),
    "nested": (lambda: saved({**STATE, A: torch.nested.nested_tensor([STATE[A]])}), "asks for|not a plain tensor"),
    "a list": (lambda: saved(list(STATE.values())), "not a readable|holds no tensors"),
    "a tensor": (lambda: saved(STATE[A]), "holds no tensors"),
    "a dictionary in it": (lambda: saved({**STATE, A: {"x": STATE[A]}}), "holds no tensors"),
    "a number in it": (lambda: saved({**STATE, A: 7}), "holds no tensors"),
    "NaN": (lambda: saved({**STATE, A: STATE[A] / 0}), "non-finite"),
    "overflow of a double": (lambda: saved({**STATE, A: STATE[A].double() * 1e300}), "non-finite"),
    "a compressed archive": (lambda: rezipped(lambda name, content: content, zipfile.ZIP_DEFLATED), "is compressed"),
    "a record twice": (twice, "twice"),
    "a record too few": (lambda: rezipped(lambda name, content: None if name == "data/1" else content), "storage '1'"),
    "a record too short": (
        lambda: rezipped(lambda name, content: content[:20] if name == "data/1" else content),
        "storage '1' is not 32 bytes",
    ),
    "a record too long": (
        lambda: rezipped(lambda name, content: content + bytes(4) if name == "data/1" else content),
        "storage '1' is not 32 bytes",
    ),
    "a listing cut off": (
        lambda: rezipped(lambda name, content: content[:20] if name == "data.pkl" else content),
        "its listing",
    ),
    "a name twice": (
        lambda: rezipped(
            lambda name, content: content.replace(b"lora_B", b"lora_A") if name == "data.pkl" else content
        ),
        "a name is given twice",
    ),
    "a step backwards": (
        lambda: rezipped(lambda name, content: content.replace(b"K\3K\1\x86", b"K\3J\xff\xff\xff\xff\x86", 1)),
        "no place in its storage",
    ),
    "a stride too few": (
        lambda: rezipped(lambda name, content: content.replace(b"K\3K\1\x86", b"K\3\x85", 1)),
        "no place in its storage",
    ),
    "no listing": (lambda: rezipped(lambda name, content: None if name == "data.pkl" else content), "missing"),
    "a listing too long": (
        lambda: rezipped(lambda name, content: content + bytes(67_000) if name == "data.pkl" else content),
        "missing or too large",
    ),
    "the other byte order": (
        lambda: rezipped(lambda name, content: b"big" if name == "byteorder" else content),
        "not little-endian",
    ),
    "an offset beyond the storage": (
        lambda: rezipped(lambda name, content: content.replace(b"QK\0K\2K\3", b"QK\1K\2K\3", 1)),
        "outside its storage",
    ),
    "one flipped bit in the values": (flipped_value, "BadZipFile"),
}


@pytest.mark.parametrize("name", BINS)
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")
def test_a_lie_in_a_bin_is_refused_by_its_kind(tmp_path, name):
    write, message = BINS[name]
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(write())
    with pytest.raises(UsageError, match=message) as caught:
        load_adapter(path, SHAPES)
    assert len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_types_are_converted(tmp_path, kind):
    other = {key: value.to(kind) for key, value in STATE.items()}
    for name, content in (("a.bin", saved(other)), ("a.safetensors", to_safetensors(other))):
        (tmp_path / name).write_bytes(content)
        found = load_adapter(tmp_path / name, SHAPES)
        assert all(
            value.dtype == torch.float32 and torch.equal(value, other[key].float()) for key, value in found.items()
        )


def test_what_others_write_with_torch_is_read_with_its_values(tmp_path):
    together = torch.cat([STATE[A].flatten(), STATE[B].flatten()])
    module = torch.nn.Module()
    module.factor = torch.nn.Parameter(STATE[A])
    forms = {
        "views of one storage": {A: together[:6].view(2, 3), B: together[6:].view(4, 2)},
        "a transposed view": {A: STATE[A].t().contiguous().t(), B: STATE[B]},
        "parameters": {key: torch.nn.Parameter(value) for key, value in STATE.items()},
        "the state of a module": {**module.state_dict(), A: STATE[A], B: STATE[B]},
    }
    del forms["the state of a module"]["factor"]
    kept = module.state_dict()
    kept.clear()
    kept.update(STATE)
    for value in (*forms.values(), kept):
        (tmp_path / "a.bin").write_bytes(saved(value))
        found = load_adapter(tmp_path / "a.bin", SHAPES)
        assert all(torch.equal(found[key], STATE[key]) and found[key].is_contiguous() for key in SHAPES)


def test_shapes_are_read_where_the_file_can_hold_them(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(to_bin(STATE))
    assert read_shapes(path) == SHAPES
    for state in ({A: torch.zeros(1).expand(10**12)}, {}):
        path.write_bytes(saved(state))
        with pytest.raises(UsageError, match=r"lists more than it holds|holds no tensors"):
            read_shapes(path)


def test_large_records_and_many_tensors_are_read_with_their_values(tmp_path):
    """More than one portion of a record, and a directory of more than one."""
    large = {A: torch.arange(600_000.0).view(600, 1000), B: torch.zeros(4, 2)}
    many = {f"{A}.{number}": torch.full((1, 1), float(number)) for number in range(9000)}
    for state in (large, many):
        (tmp_path / "a.bin").write_bytes(to_bin(state))
        found = load_adapter(tmp_path / "a.bin", {key: tuple(value.shape) for key, value in state.items()})
        assert all(torch.equal(found[key], state[key]) for key in state)


BOMBS = """if True:
    import json, pickle, resource, sys, zipfile
    from pathlib import Path
    import torch
    from fedlora.errors import UsageError
    from fedlora.llm.adapter_files import load_adapter, to_bin, to_safetensors
    folder = Path(sys.argv[1])
    key = "base_model.model.q_proj.lora_A.weight"
    shapes = {key: (2, 3)}
    state = {key: torch.ones(2, 3)}
    for name, write in (("w.bin", to_bin), ("w.safetensors", to_safetensors)):
        (folder / name).write_bytes(write(state))
        load_adapter(folder / name, shapes)

    def zipped(listing=None, kind=zipfile.ZIP_STORED, more=()):
        with zipfile.ZipFile(folder / "a.bin", "w", kind) as archive:
            for name, content in (("data.pkl", listing or pickle.dumps(state, 2)), *more):
                with archive.open("archive/" + name, "w") as handle:
                    [handle.write(part) for part in ([content] if isinstance(content, bytes) else content)]

    def header(size, part=b"", times=0):
        with (folder / "a.safetensors").open("wb") as handle:
            handle.write(size.to_bytes(8, "little") + b"[")
            [handle.write(part) for _ in range(times)]
            handle.truncate(8 + size)

    def sparse_file(name):
        with (folder / name).open("wb") as handle:
            handle.write(b"PK\\3\\4")
            handle.truncate(20 << 30)

    bombs = {
        "expanded view": lambda: torch.save({key: torch.zeros(1).expand(10**12)}, folder / "a.bin"),
        "right rank": lambda: torch.save({key: torch.zeros(1, 1).expand(10**6, 10**6)}, folder / "a.bin"),
        "bytearray": lambda: zipped(b"\\x80\\x02c__builtin__\\nbytearray\\n\\x8a\\x05\\0\\0\\0\\0\\x10\\x85R."),
        "zeros": lambda: zipped(None, zipfile.ZIP_DEFLATED, [("data/0", (bytes(1 << 20) for _ in range(300)))]),
        "long listing": lambda: zipped(b"\\x80\\x02" + b"}" * 60_000 + b"."),
        "endless marks": lambda: zipped(b"\\x80\\x02" + b"(" * 60_000 + b"t" * 60_000 + b"."),
        "doubling": lambda: zipped(b"\\x80\\x02)" + b"q\\0h\\0\\x86" * 9_000 + b"."),
        "a doubled key": lambda: zipped(b"\\x80\\x02})" + b"q\\0h\\0\\x86" * 9_000 + b"Ns."),
        "large header": lambda: header(100 << 20),
        "large JSON": lambda: header(100 << 20, b"[]," * (1 << 20), 33),
        "sparse file": lambda: sparse_file("a.bin"),
        "sparse safetensors": lambda: sparse_file("a.safetensors"),
        "shape": lambda: (folder / "a.safetensors").write_bytes(
            (text := json.dumps({key: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 24]}}).encode())
            and len(text).to_bytes(8, "little") + text + bytes(24)),
    }
    for name, write in bombs.items():
        for path in (folder / "a.bin", folder / "a.safetensors"):
            path.unlink(missing_ok=True)
        write()
        path = folder / ("a.bin" if (folder / "a.bin").exists() else "a.safetensors")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            load_adapter(path, shapes)
            outcome = "loaded"
        except UsageError:
            outcome = "refused"
        print(json.dumps([name, outcome, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


def test_no_bomb_takes_memory(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", BOMBS, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == 13
    assert {outcome for _, outcome, _ in found} == {"refused"}
    # kilobytes above the highest that writing the bombs took before
    assert max(grown for _, _, grown in found) < 50_000


def test_a_folder_and_a_missing_file_are_no_adapters(tmp_path):
    (tmp_path / "a.bin").mkdir()
    for name in ("a.bin", "b.bin", "c.safetensors"):
        with pytest.raises(UsageError, match="no such adapter"):
            load_adapter(tmp_path / name, SHAPES)


def test_a_huge_directory_of_records_is_refused_before_it_is_read(tmp_path):
    """Where adapters are large, so may files be: but not for the sake of names."""
    shapes = {A: (1000, 3000), B: (4, 2)}
    path: Path = tmp_path / "adapter_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(20_000):
            archive.writestr(f"archive/{number}", b"")
    with pytest.raises(UsageError, match="directory of its records is too large"):
        load_adapter(path, shapes)
