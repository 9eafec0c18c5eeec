"""examples/quickstart.ipynb: its cells run in order, with the tiny model in place of SmolLM2, and it holds no path."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fedlora.results import Result

NOTEBOOK = Path(__file__).parent.parent.parent / "examples" / "quickstart.ipynb"


def cells() -> list[str]:
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def test_every_cell_runs_and_what_ends_a_cell_can_be_shown(tiny_model: Path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # a class of a cell belongs to the kernel's main module
    notebook = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    shown = []
    for source in cells():
        tree = ast.parse(source.replace("smollm2-135m", str(tiny_model)))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), vars(notebook))
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), vars(notebook))
            assert value is None or repr(value)
            shown.append(value)
    tables = [value for value in shown if isinstance(value, Result)]
    assert len(tables) == 5
    assert all("<table>" in value._repr_html_() for value in tables)
    assert [value[0] for value in shown if isinstance(value, tuple) and "laws" in str(value[1])] == [True]
    assert "round 3: loss" in capsys.readouterr().out


@pytest.mark.parametrize("unwanted", [r"/(tmp|home|root|work|Users)/", "Traceback"])
def test_the_committed_outputs_are_of_a_whole_run_and_name_no_place_of_a_machine(unwanted):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell["outputs"]) for cell in code) >= len(code) - 2
    assert not re.search(unwanted, json.dumps([cell["outputs"] for cell in code]))
