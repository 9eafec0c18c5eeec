"""The table of federated methods: every row by its name.

No torch: the command line, the configuration and the documentation read it.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

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
    """The row of this name; loads the code of a method from outside. UsageError names those there are, and the nearest.

    `name` may also be `file.py:name`, `package.module:name` or an entry point (`methods/outside.py`).
    """
    if name in METHODS:
        return METHODS[name]
    from fedlora.methods.outside import installed_names, load_outside

    if (row := load_outside(name)) is not None:
        return row
    # FedAvg is called homo here
    meant = [row.name for row in ROWS if row.summary.lower().startswith(f"{name.lower()}:")]
    known = [*METHODS, *installed_names()]
    near = f"did you mean {meant[0]}?" if meant else suggest(name, known)
    near = f"name the method in the file: {name}:NAME" if name.endswith(".py") else near
    every = f"the methods are {', '.join(known)}; one in a file is named as file.py:name"
    raise UsageError(f"federation_mode={name!r} is not a method", hint=near or every)


def find_recorded(mode: Any, record: Any = None) -> Method:
    """The row of a run that is read: `record` is what its run.json has under `method`. No code is loaded."""
    if isinstance(mode, str) and mode in METHODS:
        return METHODS[mode]
    from fedlora.methods.outside import read_recorded

    return read_recorded(str(mode), record)
