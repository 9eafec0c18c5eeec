"""One message of ours as what Flower carries: a single array of bytes.

Flower moves every tensor as an object of its own, several requests each, and knows no bfloat16; packed into one array
a round takes less than half the time and keeps every bit. The array has a serialisation type of its own, so none of
Flower's strategies can mistake it for parameters.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, RecordDict

from fedlora.flower.frames import HEADER_BYTES, MOST_BYTES, FrameError, frame, unframe

STYPE = "fedlora.message/1"
RECORD, ARRAY = "fedlora", "message"


def to_content(payload: bytes) -> RecordDict:
    """A Flower message's content that holds `payload` with its length and hash."""
    data = frame(payload)
    array = Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)
    return RecordDict({RECORD: ArrayRecord({ARRAY: array})})


def from_content(content: RecordDict, most_bytes: int = MOST_BYTES) -> bytes:
    """The payload; FrameError when the content is anything but one whole message of at most `most_bytes`."""
    record = content.get(RECORD) if len(content) == 1 else None
    array = record.get(ARRAY) if isinstance(record, ArrayRecord) and len(record) == 1 else None
    if array is None:
        raise FrameError("not one array of ours")
    if (array.stype, array.dtype) != (STYPE, "uint8"):
        raise FrameError(f"an array of type {array.stype[:40]!r}, expected {STYPE}")
    if tuple(array.shape) != (len(array.data),):
        raise FrameError("the array is not as long as it says")
    if len(array.data) > most_bytes + HEADER_BYTES:
        raise FrameError(f"{len(array.data)} bytes, where at most {most_bytes} are expected")
    return unframe(array.data, most_bytes)
