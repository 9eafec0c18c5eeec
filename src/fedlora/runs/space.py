"""How much room a round takes on disk, and whether there is that much.

A disk that is full ends a run with what is committed intact, but late; what can be known before a round is said before
it. The estimate takes whole blocks, as file systems do, and counts no hard links: it is a little high.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedlora.console import say
from fedlora.errors import StorageError
from fedlora.federated.adapters import Shapes
from fedlora.federated.ranks import shapes_at
from fedlora.files import NO_SPACE
from fedlora.paths import RunPaths

BLOCK_BYTES = 4096


def estimate_round_bytes(
    shapes: Shapes, *, updates: int, keeps_optimizer: bool, has_global: bool, ranks: Sequence[int] = ()
) -> int:
    """Bytes that a round with so many updates leaves: adapters, AdamW's two moments, configurations, records.

    `ranks` are those of the clients where they are not the one of `shapes`; moments take the room of the largest.
    """
    whole, listing = _count_bytes(shapes), 512 * len(shapes)
    sizes = [_count_bytes(shapes_at(shapes, rank)) for rank in ranks] or [whole] * updates
    clients = sum(_blocks(size + listing) for size in sizes) + updates * 2 * BLOCK_BYTES
    moments = updates * _blocks(2 * whole + 2 * listing) if keeps_optimizer else 0
    manifest = _blocks(2048 + 1024 * (updates + 1))
    return clients + moments + (2 * _blocks(whole + listing) + BLOCK_BYTES if has_global else 0) + manifest


@dataclass(frozen=True)
class SpaceNeed:
    """What the rounds of a run take that are not committed yet: each `round_bytes`, and what `growth` says of it where
    rounds differ."""

    paths: RunPaths
    rounds: int
    round_bytes: int
    growth: Sequence[int] = ()

    def check(self, done: int) -> None:
        """StorageError when the next round cannot fit, before anything of it is written; a warning when the rest
        cannot."""
        left = self.rounds - done
        if left <= 0:
            return
        free, rest = shutil.disk_usage(self.paths.root).free, self.rest(done)
        needed = max(0, rest - self._sum_from(done + 1))
        if needed > free:
            raise StorageError(
                f"{self.paths.root}: round {done + 1} needs about {_megabytes(needed)}, {_megabytes(free)} are free",
                hint=f"free {_megabytes(needed - free)} for this round or {_megabytes(rest - free)} for all "
                "remaining ones, then give the same command again: the run resumes here",
            )
        if rest > free:
            say(
                f"warning: the {left} remaining rounds need about {_megabytes(rest)}, {_megabytes(free)} are free "
                f"in {self.paths.root}"
            )

    def rest(self, done: int) -> int:
        """Bytes that are still to be written after round `done`."""
        partial = self.paths.partial_folder(done + 1)
        written = sum(_blocks(path.stat().st_size) for path in partial.rglob("*") if path.is_file())
        return max(0, self._sum_from(done) - written)

    def _sum_from(self, done: int) -> int:
        """Bytes of all rounds after `done`."""
        return max(0, self.rounds - done) * self.round_bytes + sum(self.growth[done:])

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Add to an error about a full disk how much the run still needs."""
        try:
            yield
        except StorageError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in NO_SPACE:
                raise
            rest = self.rest(max(self.paths.committed_rounds(), default=0))
            raise StorageError(
                str(error),
                hint=f"free about {_megabytes(rest)}, which the rest of the run needs, then give the same command "
                "again: it resumes here",
            ) from error


def _count_bytes(shapes: Shapes) -> int:
    return 4 * sum(math.prod(shape) for shape in shapes.values())


def _blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _megabytes(size: int) -> str:
    return f"{max(size, 10_000) / 1e6:,.2f} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"
