"""README's commands and Python, run as they stand, on a tiny model in place of SmolLM2."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

import fedlora
from fedlora import cli
from test_documented_commands import blocks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the examples, as in a clone."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def code_of(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_three_minutes_on_your_rows(folder: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (commands,) = code_of(section("Three minutes on your rows"), "bash")
    for line in commands.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "fedlora"
        more = ["--model", str(tiny_model), "--rounds", "2", "--epochs", "1"] if words[1] == "train" else []
        assert cli.main([*words[1:], *more]) == 0, line
    table = capsys.readouterr().out
    shown = code_of(section("Three minutes on your rows"), "text")[0]
    assert [name for name in ("base", "global", "clinic", "library", "workshop") if name not in table] == []
    assert shown.split("\n")[0].split() == next(line for line in table.splitlines() if "exact" in line).split()


def test_the_python_of_the_first_page(folder: Path, tiny_model: Path) -> None:
    (program,) = code_of(README, "python")
    assert len([line for line in program.splitlines() if line.strip()]) <= 8
    names: dict[str, Any] = {}
    example = folder / "examples" / "silos.yaml"
    text = example.read_text(encoding="utf-8")
    example.write_text(text.replace("smollm2-135m", str(tiny_model)), encoding="utf-8")
    smaller = program.replace("rounds=6", "rounds=1")
    *lines, last = smaller.strip().splitlines()
    exec("\n".join(lines), names)
    answers = eval(last, names)
    assert list(answers) == ["base", "global", "clinic"]
    assert isinstance(names["run"], fedlora.Run)


def test_the_yaml_of_the_first_page_is_the_example() -> None:
    (shown,) = code_of(README, "yaml")
    example = (ROOT / "examples" / "silos.yaml").read_text(encoding="utf-8")
    assert shown.strip() == "".join(line for line in example.splitlines(True) if not line.startswith("#")).strip()


def test_the_first_page_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 160
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert len(targets) > 20
    assert [target for target in targets if not (ROOT / target).exists()] == []
    assert blocks("README.md")
