"""What every result of a stage can do: text, JSON, and a table in a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from inspect import isabstract
from typing import Any

from fedlora.command_table import COMMANDS
from fedlora.plain_text import table_text
from fedlora.results import Result


@dataclass(frozen=True, repr=False)
class Shown(Result):
    cell: str

    def parts(self) -> tuple[str, ...]:
        return table_text(("name", "size"), [(self.cell, "2")]), "", f"<{self.cell}>"

    def as_dict(self) -> dict[str, Any]:
        return {"cell": self.cell}


@dataclass(frozen=True, repr=False)
class Silent(Result):
    def text(self) -> str:
        return ""

    def as_dict(self) -> dict[str, Any]:
        return {"done": True}


def subclasses(kind: type) -> Iterator[type[Result]]:
    for each in kind.__subclasses__():
        yield each
        yield from subclasses(each)


def test_every_result_of_a_command_is_shown_alike_and_has_its_fields_as_json():
    for command in COMMANDS.values():
        import_module(command.run.partition(":")[0])
    found = {kind for kind in subclasses(Result) if kind.__module__.startswith("fedlora.") and not isabstract(kind)}
    assert len(found) > 15
    wrong = {
        kind.__name__
        for kind in found
        if kind.as_dict is Result.as_dict
        or kind.__repr__ is not Result.__repr__
        or (kind.text is Result.text and kind.parts is Result.parts)
    }
    assert not wrong


def test_a_result_is_its_text_and_a_notebook_shows_escaped_tables():
    shown = Shown("<b>")
    assert (
        repr(shown)
        == str(shown)
        == shown.text()
        == "name  size\n----------\n<b>      2\n<<b>>".replace("----------", "----  ----")
    )
    page = shown._repr_html_()
    assert page.count("<table>") == page.count("<pre>") == 1
    assert '<td style="text-align: left">&lt;b&gt;</td><td style="text-align: right">2</td>' in page
    assert "<b>" not in page


def test_a_result_without_text_shows_its_fields():
    assert repr(Silent()) == "Silent({'done': True})"
    assert Silent()._repr_html_() == "<pre>Silent({&#x27;done&#x27;: True})</pre>"
