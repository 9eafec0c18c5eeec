"""One packed array a message: every bit survives, and nothing that was cut, grown or changed is believed."""

from __future__ import annotations

import re
import struct
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedlora.engines.messages import pack, unpack
from fedlora.errors import UsageError
from fedlora.flower import library as flower
from fedlora.flower.codec import ARRAY, RECORD, STYPE, from_content, to_content
from fedlora.flower.frames import HEADER_BYTES, FrameError, frame, read_frame, unframe


class Pipe:
    """A stream that gives few bytes at a time."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.most_asked = 0

    def recv(self, size: int) -> bytes:
        self.most_asked = max(self.most_asked, size)
        part, self.content = self.content[: min(size, 7)], self.content[min(size, 7) :]
        return part


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_every_bit_of_every_type_survives(kind):
    tensor = torch.arange(-4, 8).to(kind).reshape(3, 4)
    payload = from_content(to_content(pack({"round": 1}, {"upload": {"a": tensor}, "none": None})))
    header, groups = unpack(payload)
    assert header == {"round": 1}
    assert groups["none"] is None
    assert groups["upload"]["a"].dtype == kind
    assert torch.equal(groups["upload"]["a"], tensor)


def test_a_message_is_one_array_however_many_tensors_it_has():
    payload = pack({}, {"upload": {f"k{number}": torch.ones(2) for number in range(160)}})
    content = to_content(payload)
    assert [len(record) for record in content.values()] == [1]


def test_a_frame_comes_back_from_a_slow_stream():
    assert read_frame(Pipe(frame(b"x" * 1000)), 1000) == b"x" * 1000


def array_of(data: bytes, *, stype: str = STYPE, dtype: str = "uint8", size: int | None = None) -> RecordDict:
    array = Array(dtype=dtype, shape=(len(data) if size is None else size,), stype=stype, data=data)
    return RecordDict({RECORD: ArrayRecord({ARRAY: array})})


WHOLE = frame(b"payload")
WRONG = {
    "nothing": (RecordDict(), "not one array"),
    "another record": (RecordDict({"x": ConfigRecord({"a": 1})}), "not one array"),
    "two records": (RecordDict({**to_content(b"p"), "x": ConfigRecord({"a": 1})}), "not one array"),
    "another type": (array_of(WHOLE, stype="numpy.ndarray"), "an array of type 'numpy.ndarray'"),
    "floats": (array_of(WHOLE, dtype="float32"), "an array of type"),
    "a false length": (array_of(WHOLE, size=3), "not as long as it says"),
    "empty": (array_of(b""), "0 bytes are no message"),
    "cut": (array_of(WHOLE[:-1]), "a message of 7 bytes came as 6"),
    "grown": (array_of(WHOLE + b"x"), "a message of 7 bytes came as 8"),
    "of another version": (array_of(b"fedlora9" + WHOLE[8:]), "not a message of this version"),
    "changed": (array_of(WHOLE[:-1] + b"D"), "SHA-256 differs"),
    "too large": (to_content(b"p" * 101), "at most 100"),
    "terabytes by its own word": (array_of(WHOLE[:8] + struct.pack("<Q", 1 << 42) + WHOLE[16:]), "at most 100"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_a_whole_message_is_refused(name):
    content, reason = WRONG[name]
    with pytest.raises(FrameError, match=reason):
        from_content(content, 100)


def test_every_bit_of_a_frame_is_held_against_the_hash():
    for position in range(len(WHOLE) * 8):
        flipped = bytearray(WHOLE)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(FrameError):
            unframe(bytes(flipped))


def test_a_length_beyond_the_limit_is_refused_before_anything_is_read():
    pipe = Pipe(frame(b"x" * 1001))
    with pytest.raises(FrameError, match="at most 1000"):
        read_frame(pipe, 1000)
    assert pipe.most_asked <= HEADER_BYTES


def test_a_stream_that_ends_inside_a_frame_is_an_end():
    with pytest.raises(EOFError):
        read_frame(Pipe(WHOLE[:-1]))


def test_the_release_is_the_one_that_the_extra_asks_for(monkeypatch):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"]["flower"] == [f"flwr=={flower.FLOWER_VERSION}"]
    flower.check_flower()
    monkeypatch.setattr(metadata, "version", lambda name: "1.40.0")
    with pytest.raises(UsageError, match=re.escape("Flower 1.40.0 is installed")) as error:
        flower.check_flower()
    assert "fedlora[flower]" in error.value.hint


def test_without_flower_the_extra_is_named(monkeypatch):
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(UsageError, match="not installed") as error:
        flower.check_flower()
    assert error.value.hint == "pip install 'fedlora[flower]'"
