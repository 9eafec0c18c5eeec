"""Counts of things in messages: one of them is not several."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

from fedlora.plain_text import counted

SOURCE = Path(__file__).parents[1] / "src/fedlora"
NOUNS = (
    "files clients rows nodes rounds steps examples calls answers runs updates samples verdicts ranks categories seeds "
    "requests checks groups silos layers records shards pairs questions prompts devices columns messages methods"
)
BEFORE = "more|other|test|validation|usable|client|local|empty|different|optimizer"
COUNT = re.compile(rf"^ (?:(?:{BEFORE}) )*(?:{'|'.join(NOUNS.split())})\b")
NEVER_ONE = {
    "comparing/compared_run.py: rows": "the kind of rows",
    "data/client_facts.py: kind": "the kind of rows",
    "engines/replay.py: place / UPDATE_NAME": "a file that answers",
    "evaluation/judge/client.py: _GIVE_UP_AFTER": "a constant",
    "laws/method_check.py: promises.fewest": "more than the three clients of the laws",
    "laws/run_laws.py: steps": "the names of steps",
    "llm/dropout.py: len(streams)": "an error of the code",
    "llm/limits.py: rows": "the rows of an embedding",
    "llm/private_steps.py: len(self.a)": "an error of the code",
    "runs/recorded_base.py: self.run": "the name of a run that records something",
}
"""What stands before such a word and needs no singular."""


def test_a_number_and_its_noun_agree():
    assert [counted(number, "file") for number in (0, 1, 2, 1400)] == ["0 files", "1 file", "2 files", "1,400 files"]
    assert (counted(1, "category"), counted(3, "category")) == ("1 category", "3 categories")
    assert (counted(1, "axis", "axes"), counted(2, "axis", "axes")) == ("1 axis", "2 axes")


def test_every_count_in_a_message_has_its_singular():
    found = set()
    for source in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else []
            for value, text in itertools.pairwise(parts):
                if isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant) and COUNT.match(text.value):
                    found.add(f"{source.relative_to(SOURCE).as_posix()}: {ast.unparse(value.value)}")
    assert found == set(NEVER_ONE), "use plain_text.counted"
