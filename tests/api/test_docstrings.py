"""The examples of the public docstrings, run one after another with the tiny model in place of SmolLM2."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from judge_server import prefers_a, serve

import fedlora as fl

ORDER = ("train", "rounds", "silos", "allocate", "plan", "open", "runs", "generate", "score", "verify", "report")
"""Examples stand on what those before them have written; the others come after them."""


TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: colours.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Which colour has {{thing}}?"
doc_to_choice: choices
doc_to_target: 0
"""
NEEDS = {"tasks": "lm_eval", "track": "tensorboard"}
"""Example -> the library of an extra that it runs with, where that is installed."""


def documented() -> Iterator[tuple[str, object]]:
    """Every public function and class, and the public methods of the classes."""
    for name in dict.fromkeys((*ORDER, *fl.__all__)):
        value = getattr(fl, name)
        if not inspect.ismodule(value):
            yield name, value
        if inspect.isclass(value):
            members = {each: member for each, member in vars(value).items() if not each.startswith("_")}
            yield from ((f"{name}.{each}", member) for each, member in members.items() if callable(member))


def test_every_example_of_a_docstring_runs(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-for-the-loopback")
    Path("colours.yaml").write_text(TASK)
    Path("colours.jsonl").write_text('{"thing": "grass", "choices": ["green", "red"]}\n' * 3)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    shown: list[str] = []
    with serve(prefers_a) as server:
        for name, value in documented():
            if name in NEEDS and find_spec(NEEDS[name]) is None:
                continue
            text = (inspect.getdoc(value) or "").replace("smollm2-135m", str(tiny_model))
            text = text.replace("http://127.0.0.1:8000/v1", server.url)
            runner.run(parser.get_doctest(text, {"fl": fl}, name, None, None), out=shown.append)
    assert not shown, "\n".join(shown)
    assert runner.summarize(verbose=False).attempted > 25


def test_every_public_function_says_what_it_raises_and_has_an_example_and_its_keywords():
    functions = {name: value for name, value in documented() if inspect.isfunction(value) and "." not in name}
    assert len(functions) > 10
    incomplete = {name for name, value in functions.items() if ">>>" not in (value.__doc__ or "")}
    assert not incomplete
    for name in ("train", "rounds", "plan", "generate", "score", "report", "reaggregate", "compare", "allocate"):
        keywords = inspect.signature(functions[name]).parameters
        listed = [each for each in keywords if each not in ("config", "progress", "keywords")]
        assert not [each for each in listed if f"\n    {each}: " not in functions[name].__doc__], name
    assert {"model", "rounds", "proximal_mu", "dp_clip"} <= inspect.signature(fl.train).parameters.keys()
