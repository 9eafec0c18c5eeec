"""How long OpenMP's threads spin before they sleep: libgomp reads it once, when torch is first imported."""

from __future__ import annotations

import os
import sys

SPIN_COUNT = "10000"
"""torch's default, 300,000, costs a factor of ten or more as soon as another process wants the same cores; sleeping at
once costs a quarter of the speed of an idle machine. See docs/architecture.md."""


def limit_spinning() -> None:
    """Set GOMP_SPINCOUNT in this process's environment, unless the user has set it or it would come too late."""
    if "torch" not in sys.modules:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
