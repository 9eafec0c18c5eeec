"""A message with its length and its SHA-256 in front: the form in which bytes reach another process or machine.

The length stands first, so a reader refuses what is too large before it has made room for it. The hash finds
accidents; who sent the bytes is the business of TLS and node keys.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Protocol

MAGIC = b"fedlora1"
_HEADER = struct.Struct("<8sQ32s")
HEADER_BYTES = _HEADER.size
MOST_BYTES = 4 << 30
"""No message is larger, whatever else is allowed."""


class FrameError(ValueError):
    """Bytes that are not a whole message of ours."""


class Stream(Protocol):
    """What a frame is read from: `recv` gives at most so many bytes, none at the end."""

    def recv(self, size: int, /) -> bytes: ...


def frame(payload: bytes) -> bytes:
    """`payload` after its header of 48 bytes."""
    return _HEADER.pack(MAGIC, len(payload), hashlib.sha256(payload).digest()) + payload


def unframe(content: bytes, most_bytes: int = MOST_BYTES) -> bytes:
    """The payload; FrameError when it is too large, cut, longer than it says, or not what was sent."""
    length, digest = _read_header(content[:HEADER_BYTES], most_bytes)
    if len(content) - HEADER_BYTES != length:
        raise FrameError(f"a message of {length} bytes came as {len(content) - HEADER_BYTES}")
    return _check(content[HEADER_BYTES:], digest)


def read_frame(stream: Stream, most_bytes: int = MOST_BYTES) -> bytes:
    """The next payload of a stream; EOFError when it ends before, FrameError as in `unframe`."""
    length, digest = _read_header(_read_exactly(stream, HEADER_BYTES), most_bytes)
    return _check(_read_exactly(stream, length), digest)


def _read_header(header: bytes, most_bytes: int) -> tuple[int, bytes]:
    if len(header) < HEADER_BYTES:
        raise FrameError(f"{len(header)} bytes are no message")
    magic, length, digest = _HEADER.unpack(header)
    if magic != MAGIC:
        raise FrameError("not a message of this version")
    if length > min(most_bytes, MOST_BYTES):
        raise FrameError(f"a message of {length} bytes, where at most {min(most_bytes, MOST_BYTES)} are expected")
    return length, digest


def _read_exactly(stream: Stream, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = stream.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError(f"the stream ended after {len(parts)} of {size} bytes")
        parts += part
    return bytes(parts)


def _check(payload: bytes, digest: bytes) -> bytes:
    if hashlib.sha256(payload).digest() != digest:
        raise FrameError("the message is not what was sent: its SHA-256 differs")
    return payload
