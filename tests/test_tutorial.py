"""The guides that a newcomer follows, run as they are printed, with the tiny model in place of SmolLM2."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fedlora import cli
from fedlora.files import write_text

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def follow(page: str, model: Path) -> dict[str, Any]:
    """Run the blocks of a page in order: commands through the command line, Python in one namespace, which is returned.

    A block that defines a method is the file that the page names in backticks just before it.
    """
    text = (ROOT / page).read_text(encoding="utf-8").replace("smollm2-135m", str(model))
    names: dict[str, Any] = {}
    for block in BLOCK.finditer(text):
        kind, code = block.groups()
        if kind == "bash":
            for command in re.sub(r"\\\n\s*", "", code).splitlines():
                words = shlex.split(command, comments=True)
                assert words[0] == "fedlora", command
                assert cli.main(words[1:]) == 0, command
        elif "Method(" in code:
            (file,) = re.findall(r"`(\w+\.py)`", text[: block.start()])[-1:]
            Path(file).write_text(code)
        else:
            exec(compile(code, page, "exec"), names)
    return names


@pytest.mark.thorough
def test_the_tutorial_ends_with_an_answer(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # four rows of each example file: what is tried is the pages
    for file in (ROOT / "examples" / "silos").iterdir():
        write_text(tmp_path / "examples" / "silos" / file.name, "".join(file.read_text().splitlines(keepends=True)[:5]))
    follow("docs/get-started.md", tiny_model)
    assert (tmp_path / "models/silos/6/adapter_model.safetensors").is_file()
    assert "'global'" in capsys.readouterr().out


@pytest.mark.thorough
def test_the_guide_to_own_methods_ends_with_a_trained_run(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    silos = tmp_path / "silos"
    silos.mkdir()
    for client in ("north", "south"):
        (silos / f"{client}.csv").write_text(
            "instruction,response\n" + "".join(f"say {n},{client}\n" for n in range(4))
        )
    names = follow("docs/how-to/own-method.md", tiny_model)
    assert names["run"].metrics()
