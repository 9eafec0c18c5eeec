"""The table of federated methods: every row by its name.

No torch: the command line, the configuration and the documentation read it.
"""

from __future__ import annotations

import difflib
from types import MappingProxyType

from fedlora.errors import UsageError
from fedlora.methods.row import Method
from fedlora.methods.rows import ROWS

METHODS = MappingProxyType({row.name: row for row in ROWS})
"""Name -> row, in the order in which pages list them."""

BASELINES = tuple(sorted((row.name for row in ROWS if row.is_baseline), reverse=True))
"""Rows of every comparison beside the base model: centralised training, and each client alone."""

ALONE = next(row.name for row in ROWS if not row.combines)
"""Every client alone: what says whether joining pays."""


def find_method(name: str) -> Method:
    """The row of this name; UsageError names those there are, and the nearest."""
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the methods are {', '.join(METHODS)}"
        raise UsageError(f"federation_mode={name!r} is no method", hint=hint)
    return METHODS[name]
