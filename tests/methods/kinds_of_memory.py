"""Which methods a test takes by default, and which only when it is thorough."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from tiny_run import MODES


def one_of_each_kind(methods: Iterable[str]) -> list[Any]:
    """Values for parametrize: methods outside of tools/tiny_run.py, which has one of each kind, are thorough."""
    return [name if name in MODES else pytest.param(name, marks=pytest.mark.thorough) for name in methods]
