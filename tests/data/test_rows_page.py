"""The how-to page on rows: each example is read as the kind under whose heading it stands."""

from __future__ import annotations

import re
from pathlib import Path

from fedlora.data.conversations import ROLES
from fedlora.data.fields import RowFields
from fedlora.data.records import iter_rows
from fedlora.row_shapes import SHAPES

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "rows.md").read_text(encoding="utf-8")


def test_the_examples_of_the_page_are_rows_of_their_kinds(tmp_path: Path) -> None:
    headings = re.findall(r"^### (\w+)\n(.*?)(?=^##)", PAGE, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in headings] == list(dict.fromkeys(shape.kind for shape in SHAPES))
    for name, section in headings:
        examples = re.findall(r"```json\n(.*?)```", section, re.DOTALL)
        assert examples
        for example in examples:
            found: list[RowFields] = []
            (tmp_path / "rows.jsonl").write_text(example, encoding="utf-8")
            [row] = iter_rows(tmp_path / "rows.jsonl", on_fields=found.append)
            assert row.output
            assert [shape.kind for _, shape in found[0].kinds] == [name]
            assert not found[0].unused


def test_the_page_names_every_role() -> None:
    assert all(f"`{role}`" in PAGE for role in ROLES)
