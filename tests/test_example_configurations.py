"""Every example configuration is read as its commands say, and says what it takes and gives."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fedlora import cli
from fedlora.flags import make_parser, read_flags

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def commands_of(file: Path) -> list[list[str]]:
    """The commands in the comment on top, each as words without `fedlora`."""
    comment = "\n".join(line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    joined = re.sub(r"\\\n#\s*", "", comment)
    lines = re.findall(r"^#     fedlora (.*)$", joined, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def test_the_examples_that_pages_name_are_there():
    names = ("compare", "flower", "flowertune", "llama-3.2-1b-dolly", "private", "silos", "smollm2-skills")
    assert tuple(file.stem for file in EXAMPLES) == names


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_commands_of_an_example_take_it(file):
    commands = commands_of(file)
    assert any(f"examples/{file.name}" in words for words in commands)
    for words in commands:
        name, rest = cli._split_command(words)
        config_class = cli.load(cli.COMMANDS[name].config)
        given = read_flags(make_parser(name, config_class), rest, config_class, cli.COMMANDS[name].positional)
        made = config_class.make(given.values, file=ROOT / given.file if given.file else None)
        if given.file and hasattr(made, "client_selection_frac"):
            few = {"flowertune.yaml": 0.2}
            assert made.client_selection_frac == few.get(file.name, 0.5 if made.is_private else 1)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_says_how_long_it_takes_and_what_comes_out(file):
    comment = "".join(line for line in file.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    assert re.search(r"^# Time", comment, re.MULTILINE)
    assert re.search(r"^# Result|result were not measured", comment, re.MULTILINE)
    assert not re.search(r"\b(TIME|RESULT|TODO)\b", comment)
