"""The fields by which rows are recognised: what each kind of row needs, and what it may have besides.

Kinds are tried in the order of `SHAPES`: a record is of the first kind whose needed fields it has.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from fedlora.nearest import suggest

Names = tuple[str, ...]
"""Names of one field; where a row has several of them, their values must agree."""

REPLIES: Names = ("response", "output")
BESIDES: tuple[Names, ...] = (("category",), ("system",), ("history",))
"""Fields that a row of any kind may have beside its own."""


@dataclass(frozen=True)
class RowShape:
    """One way to write a row: `kind` is its value of `row_kind`, `reply` the field that answers the others, where it
    has one of its own."""

    kind: str
    asks: tuple[Names, ...]
    reply: Names = ()
    may: tuple[Names, ...] = ()

    @property
    def needs(self) -> tuple[Names, ...]:
        """The fields without which a row is not of this kind."""
        return (*self.asks, self.reply) if self.reply else self.asks

    @property
    def groups(self) -> tuple[Names, ...]:
        """The names of each field that such a row may have."""
        return (*self.needs, *self.may, *BESIDES)

    @property
    def names(self) -> frozenset[str]:
        """All names of all these fields."""
        return frozenset(name for group in self.groups for name in group)

    def __str__(self) -> str:
        return " and ".join(" or ".join(group) for group in self.needs)


INSTRUCTION = RowShape("instruction", (("instruction",),), REPLIES, (("context", "input"),))
SHAPES = (
    INSTRUCTION,
    RowShape("messages", (("messages",),), may=(("conversations",),)),
    RowShape("conversations", (("conversations",),), may=(("messages",),)),
    RowShape("completion", (("prompt",),), ("completion",)),
    replace(INSTRUCTION, asks=(("prompt",),)),
    RowShape("text", (), ("text",)),
)
LISTS = frozenset({"messages", "conversations", "history", "prompt", "completion"})
"""Fields that may hold a list."""


def find_shapes(row_kind: str, columns: Collection[str] = (), output_key: str | None = None) -> tuple[RowShape, ...]:
    """The shapes that rows may have, in the order in which they are tried; at least one.

    `columns` names fields that the rows must have, under whatever name. An `output_key` that is no usual name of a
    reply makes every row an answered question, and is its reply; a usual one gives way to a reply that `columns` names.
    ValueError says why no shape is left.
    """
    if output_key in REPLIES and not set(REPLIES).isdisjoint(columns):
        output_key = None
    shapes = _with_reply(output_key) if output_key else SHAPES
    known = frozenset[str]().union(*(shape.names for shape in shapes))
    for name in columns:
        if name not in known:
            near = suggest(name, known)
            raise ValueError(
                f"{name!r} is no field of a row" + (f", {near}" if near else f": {', '.join(sorted(known))}")
            )
    shapes = tuple(shape for shape in shapes if row_kind in ("auto", "any", shape.kind))
    fitting = tuple(shape for shape in shapes if shape.names.issuperset(columns))
    if not fitting:
        kind = "no row" if row_kind in ("auto", "any") else f"no row of the kind {row_kind}"
        raise ValueError(f"{kind} has the fields {' and '.join([*columns, *([output_key] if output_key else [])])}")
    return fitting


def _with_reply(name: str) -> tuple[RowShape, ...]:
    if name in REPLIES:
        return tuple(replace(shape, reply=(name,)) if shape.reply == REPLIES else shape for shape in SHAPES)
    asking = (shape for shape in SHAPES if shape.asks and (shape is INSTRUCTION or shape.reply != REPLIES))
    return tuple(replace(shape, reply=(name,)) for shape in asking)
