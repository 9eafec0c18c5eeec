"""The table of federated methods: every row by its name.

No torch: the command line, the configuration and the documentation read it.
"""

from __future__ import annotations

from types import MappingProxyType

from fedlora.errors import UsageError
from fedlora.methods.row import Method
from fedlora.methods.rows import ROWS
from fedlora.nearest import suggest

METHODS = MappingProxyType({row.name: row for row in ROWS})
"""Name -> row, in the order in which pages list them."""

BASELINES = tuple(sorted((row.name for row in ROWS if row.is_baseline), reverse=True))
"""Rows of every comparison beside the base model: centralised training, and each client alone."""

ALONE = next(row.name for row in ROWS if not row.combines)
"""Every client alone: what says whether joining pays."""


def find_method(name: str) -> Method:
    """The row of this name; UsageError names those there are, and the nearest."""
    if name not in METHODS:
        # FedAvg is called homo here
        known = [row.name for row in ROWS if row.summary.lower().startswith(f"{name.lower()}:")]
        near = f"did you mean {known[0]}?" if known else suggest(name, METHODS)
        hint = near or f"the methods are {', '.join(METHODS)}"
        raise UsageError(f"federation_mode={name!r} is no method", hint=hint)
    return METHODS[name]
