"""Which fields of a record make a row: the first row of a file decides its kind, and all others are of that kind,
unless the rules let every row decide for itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from fedlora.data.columns import ColumnMap, KeptColumns
from fedlora.data.field_text import FieldText, kind_of, refuse
from fedlora.data.raw_records import ROW_HINT, Record, RecordError
from fedlora.data.row_maker import MissingFieldError, RowMaker, listed
from fedlora.errors import UsageError
from fedlora.row_shapes import Names, RowShape, find_shapes
from fedlora.rows import ReadRules, Row, RowKind

MOST_UNUSED = 20


class RowFields:
    """Finds what the records of a file are, or of several that are read as one, and makes rows of them.

    `output_key` names the field that holds the reply. Without `needs_reply` the rows of a file may be questions alone;
    where its first row has a reply, all need one.
    """

    def __init__(
        self,
        rules: ReadRules,
        *,
        output_key: str | None = None,
        require_category: bool = False,
        needs_reply: bool = True,
    ) -> None:
        self.rules = rules
        self.shape: RowShape | None = None
        """What the rows of the file are; None until the first."""
        self.names: frozenset[str] = frozenset()
        """The names of the file that are used, once the shape of its rows is known."""
        self.kinds: dict[tuple[RowKind, RowShape], None] = {}
        """What the rows of all files are."""
        self.unused: dict[str, None] = {}
        """Names that were met and are no field of a row, in their order; the first MOST_UNUSED."""
        self._kind: RowKind | None = None
        self._may_mix = rules.row_kind == "any"
        try:
            self._shapes = find_shapes(rules.row_kind, rules.columns, output_key)
        except ValueError as error:
            raise UsageError(str(error), hint="name fields of one kind of row, or another --row_kind") from None
        texts = FieldText(rules)
        self._columns = ColumnMap(rules.columns, texts)
        self._kept = KeptColumns(rules.keep, texts)
        self._maker = RowMaker(
            texts, self._columns, self._note, needs_reply=needs_reply, needs_category=require_category
        )
        self._needs_reply = needs_reply
        self._needs_category = require_category

    def begin_file(self) -> None:
        """Forget what the rows of the last file were."""
        self.shape = self._kind = None
        self.names = frozenset()
        self._may_mix = self.rules.row_kind == "any"
        self._maker.expect_replies(self._needs_reply)

    def find_columns(self, columns: Collection[str]) -> None:
        """Decide by the columns of a table what its rows are; RecordError where they make no row."""
        there = {shape: self._columns.find_in(columns, shape) for shape in self._shapes}
        shape = self._choose(there, columns)
        missing = self._find_missing(shape, there[shape])
        if self._needs_category and "category" not in there[shape]:
            missing = missing or ("category",)
        if missing:
            what = f"the column {self._maker.either(missing)} is missing; the columns are {listed(columns)}"
            raise refuse(what, self._name_hint(columns))
        self._kept.check(columns)
        self._settle(shape)
        self._may_mix = False
        self._note(columns)

    def takes_lists(self, column: str) -> bool:
        """Whether a column of a table may hold lists, or values that a name with dots leads into."""
        return self._columns.takes_lists(column)

    def keeps(self, column: str) -> bool:
        """Whether `Row.more` holds a column, or something of it, whatever its type."""
        return column in self._kept.names or column in self.rules.keep_any

    def make_row(self, record: Record) -> Row:
        """The row of a decoded record; RecordError names the field that cannot be used."""
        fields = record.value
        try:
            if type(fields) is not dict:
                raise refuse(f"expected a JSON object, got {kind_of(fields)}")
            shape = None if self._may_mix else self.shape
            row = self._make_first(fields) if shape is None else self._make_next(fields, shape)
            if self.rules.keep or self.rules.keep_any:
                there = {name: fields[name] for name in self.rules.keep_any if fields.get(name) is not None}
                row = replace(row, more={**self._kept.read(fields), **there})
        except RecordError as error:
            other = self._find_other(fields)
            hint = "give --row_kind any where a file holds several kinds of rows" if other else error.hint
            has = ""
            if isinstance(error, MissingFieldError):
                has = f"; the row has {listed(fields)}"
                hint = self._name_hint(fields) if hint == ROW_HINT else hint
            raise RecordError(record.place, other or f"{error}{has}", excerpt=record.excerpt, hint=hint) from None
        return row

    def check_columns(self) -> None:
        """RecordError where no record had a column that the rules name."""
        self._columns.check_seen()

    def _make_first(self, fields: dict[str, Any]) -> Row:
        """The first row that is sound decides what the file holds, or each what it is."""
        renamed = {shape: self._columns.rename(fields, shape) for shape in self._shapes}
        shape = self._choose({shape: _present(each) for shape, each in renamed.items()}, fields)
        row = self._maker.make(renamed[shape], shape)
        self._settle(shape)
        self._check_kind(row, shape)
        self._note(fields)
        return row

    def _make_next(self, fields: dict[str, Any], shape: RowShape) -> Row:
        if not self.names.issuperset(fields):
            self._note(fields)
        row = self._maker.make(self._columns.rename(fields, shape), shape)
        if row.kind != self._kind:
            self._check_kind(row, shape)
        return row

    def _choose(self, there: Mapping[RowShape, Collection[str]], names: Collection[str]) -> RowShape:
        """The first shape whose needed fields are there, one with its reply before a question alone; else the first
        of whose fields some are there, so that the error names the others."""
        fitting = [shape for shape in self._shapes if not self._find_missing(shape, there[shape])]
        fitting.sort(key=lambda shape: bool(shape.reply) and not _has(shape.reply, there[shape]))
        if not fitting:
            known = {shape: {*names, *there[shape]} for shape in self._shapes}
            fitting = [shape for shape in self._shapes if any(_has(group, known[shape]) for group in shape.needs)]
        if not fitting and len({shape.kind for shape in self._shapes}) == 1:
            fitting = list(self._shapes)
        if not fitting:
            what = f"no kind of row has the fields {listed(names)}" if names else "a row without fields"
            raise refuse(what, self._name_hint(names))
        return fitting[0]

    def _name_hint(self, names: Collection[str]) -> str:
        """What to do where a field is missing: map names that differ from it by case or spaces; else what a row has."""
        known = frozenset[str]().union(*(shape.names for shape in self._shapes)).difference(names)
        meant = {name.strip().lower(): name for name in names if name.strip().lower() in known}
        if any(name != name.strip() for name in meant.values()):
            return f"remove the spaces around {listed(meant.values())}"
        return f"give --columns {','.join(map('='.join, meant.items()))}" if meant else ROW_HINT

    def _find_missing(self, shape: RowShape, there: Collection[str]) -> Names:
        """The names of the first field that rows of a shape need and that is not there, or nothing."""
        needs = shape.needs if self._maker.needs_reply or not shape.asks else shape.asks
        return next((group for group in needs if not _has(group, there)), ())

    def _find_other(self, fields: Any) -> str:
        """Why a record is no row of the file's shape but one of another."""
        if self.shape is None or self._may_mix or self._columns or type(fields) is not dict:
            return ""
        there = _present(fields)
        other = next((shape for shape in self._shapes if not self._find_missing(shape, there)), self.shape)
        if other == self.shape or not self._find_missing(self.shape, there):
            return ""
        return f"a row with {other}, but the file began with {self.shape}"

    def _check_kind(self, row: Row, shape: RowShape) -> None:
        """A prompt and its completion are texts in all rows of a file, or lists of messages in all."""
        if self._kind is not None and not self._may_mix:
            raise refuse(f"a row of the kind {row.kind}, but the file began with the kind {self._kind}")
        if self._kind is None:
            self._maker.expect_replies(self._needs_reply or bool(row.output))
        self._kind = row.kind
        self.kinds[row.kind, shape] = None

    def _settle(self, shape: RowShape) -> None:
        self.shape = shape
        self.names = self._columns.used_names(shape) | self._kept.names | set(self.rules.keep_any)

    def _note(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.names and name not in self.unused and len(self.unused) < MOST_UNUSED:
                self.unused[name] = None


def _has(group: Names, names: Collection[str]) -> bool:
    return any(name in names for name in group)


def _present(fields: Mapping[str, Any]) -> set[str]:
    return {name for name, value in fields.items() if value is not None and value != []}
