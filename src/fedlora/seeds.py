"""Every random draw of a run comes from one seed, by purpose, round and client.

Nothing carries generator state from one draw to the next, so the order in which clients train,
where they train, and an interruption between two of them cannot change a result.
"""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, purpose: str, *coordinates: int) -> int:
    """A 63-bit seed for `purpose` at `coordinates` (round, client, epoch, ...), the same in every process."""
    text = "/".join([str(seed), purpose, *(str(part) for part in coordinates)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
