"""A package that registers a method, as an installer leaves it: a module and its metadata in a folder of sys.path."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "part_way.py"


def install(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    package: str = "own-method",
    module: str = "own_method",
    name: str = "part_way",
    code: str | None = None,
) -> Path:
    """Lay the package out under `folder`; the file of its module."""
    file = folder / f"{module}.py"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(EXAMPLE.read_text(encoding="utf-8") if code is None else code, encoding="utf-8")
    told = folder / f"{module}-1.2.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    (told / "entry_points.txt").write_text(f"[fedlora.methods]\n{name} = {module}:part_way\n")
    (told / "top_level.txt").write_text(f"{module}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, module, raising=False)
    importlib.invalidate_caches()
    return file


def forget(monkeypatch: pytest.MonkeyPatch, module: str = "own_method") -> None:
    """What a new process would have: the module is imported again from its file."""
    monkeypatch.delitem(sys.modules, module, raising=False)
    importlib.invalidate_caches()
