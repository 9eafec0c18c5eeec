"""Random draws that need a run's secret to be repeated, and that a resumed run repeats to the bit.

Privacy rests on draws that an adversary cannot guess, and a public seed can be guessed. So cohorts, lots and noise are
drawn by SHAKE-256 keyed by 256 secret bits, at (purpose, round, ...) as in `seeds`. Normal numbers are
Box and Muller's, in float64 from 53 random bits each. Attacks on the lowest bits of floating-point noise
(Mironov 2012) are not countered.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SECRET_BYTES = 32


@dataclass(frozen=True)
class Secret:
    """256 random bits, which its text never shows."""

    content: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.content) != SECRET_BYTES:
            raise ValueError(f"a secret has {SECRET_BYTES} bytes, not {len(self.content)}")

    @classmethod
    def draw(cls) -> Secret:
        """A new secret, from the operating system's generator."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    @property
    def id(self) -> str:
        """A name for the secret that does not give it away: 128 bits of its hash."""
        return hashlib.sha256(b"fedlora secret id\0" + self.content).hexdigest()[:32]

    def uniform(self, purpose: str, *coordinates: int) -> float:
        """A number in (0, 1) with 53 random bits."""
        return (int.from_bytes(self._stream(purpose, coordinates, 8), "little") // 2048 + 0.5) * 2.0**-53

    def integer(self, purpose: str, *coordinates: int) -> int:
        """63 random bits, as `derive_seed` gives them."""
        return int.from_bytes(self._stream(purpose, coordinates, 8), "little") >> 1

    def normal(self, shape: Sequence[int], purpose: str, *coordinates: int) -> Tensor:
        """Independent standard normal numbers in float64, on the CPU."""
        count = math.prod(shape)
        pairs = (count + 1) // 2
        stream = bytearray(self._stream(purpose, coordinates, 16 * pairs))
        words = torch.frombuffer(stream, dtype=torch.int64) if pairs else torch.zeros(0, dtype=torch.int64)
        uniform = (((words >> 11) & ((1 << 53) - 1)).to(torch.float64) + 0.5) * 2.0**-53
        radius, angle = (-2 * uniform[:pairs].log()).sqrt(), 2 * math.pi * uniform[pairs:]
        return torch.cat((radius * angle.cos(), radius * angle.sin()))[:count].view(*shape)

    def _stream(self, purpose: str, coordinates: tuple[int, ...], size: int) -> bytes:
        place = "/".join([purpose, *map(str, coordinates)]).encode()
        return hashlib.shake_256(self.content + len(place).to_bytes(4, "big") + place).digest(size)
