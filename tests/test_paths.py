"""Names that become folders: 60 that must not, for every path that is built, and nothing outside the root."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlora import cli
from fedlora.errors import UsageError
from fedlora.paths import DataPaths, OutputName, ResultPaths, RunPaths, check_name, is_number, report_file

BAD_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "../../x",
    "x/..",
    "x/../../y",
    "a/b",
    "a//b",
    "/",
    "/tmp/x",
    "/etc/passwd",
    "./x",
    "~",
    "~/x",
    "~root",
    "x\0",
    "\0",
    "x\0/../y",
    "x\n",
    "x\ty",
    "x\r",
    "\x1b[2J",
    " ",
    " x",
    "x ",
    "a b",
    ".hidden",
    "...",
    ".lock",
    "x.",
    "x..",
    "C:",
    "C:\\x",
    "..\\x",
    "a\\b",
    "\\\\host\\share",
    "x:y",
    "CON",
    "con",
    "nul.txt",
    "PRN",
    "aux.json",
    "COM1",
    "lpt9.bin",
    "x" * 101,
    "x" * 300,
    "x" * 5000,
    "\u2024\u2024",  # one dot leader
    "\uff0e\uff0e/x",  # fullwidth full stop
    "a\u2215b",  # division slash
    "a\uff0fb",  # fullwidth slash
    "\u0430bc",  # Cyrillic a
    "e\u0301",
    "\u202ex",  # right-to-left override
    "x\u200b",
    "\u00b2",
    "\ud800",
    "*",
    "$(id)",
    "x;y",
    "x|y",
    "%2e%2e%2f",
    "-" * 101,
]


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def builders(root: Path, name: str):
    """Every function that makes a path of a name, as calls without arguments."""
    run, results, data = RunPaths(root, name), ResultPaths(root, name, 1), DataPaths(root, name)
    subject = OutputName("client", 3)
    yield from (lambda: run.root, lambda: run.run_file, lambda: run.metrics_file, lambda: run.lock_file)
    yield from (lambda: run.holder_file, run.committed_rounds)
    yield from (lambda each=each: each(1) for each in (run.round_folder, run.partial_folder, run.damaged_folder))
    yield from (lambda: results.folder, lambda: data.folder)
    of_subject = (
        results.predictions,
        results.predictions_meta,
        results.rouge,
        results.judge,
        results.verdicts,
        results.judge_lock,
    )
    yield from (lambda each=each: each(subject) for each in of_subject)
    yield from (lambda: data.client_file(8, 0), lambda: data.test_file(200), lambda: data.manifest(8))
    yield lambda: report_file(root, name, ".md")


def test_there_are_enough_bad_names():
    assert len(set(BAD_NAMES)) == len(BAD_NAMES) >= 60


def test_a_name_that_is_no_folder_name_builds_no_path(tmp_path, subtests):
    for name in BAD_NAMES:
        with subtests.test(name=ascii(name)):
            for build in builders(tmp_path / "root", name):
                with pytest.raises(UsageError, match=r"cannot be a folder name|report_name|exp_name|dataset_name"):
                    build()
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", ["a", "homo-1B", "run_2.1", "X" * 100, "0", "console", "com10", "lptx"])
def test_ordinary_names_stay_below_the_root(tmp_path, name):
    assert check_name(name, "exp_name") == name
    for build in builders(tmp_path, name):
        path = build()
        assert path == [] or path.resolve().is_relative_to(tmp_path / name)


COMMANDS = {
    "exp_name": [
        ["train", "--base_model", "none", "--num_clients", "1", "--data_path", "data", "--exp_name"],
        ["generate", "--base_model", "none", "--test_file_path", "rows.jsonl", "--exp_name"],
        ["evaluate_rouge", "--target_file", "rows.jsonl", "--exp_name"],
        ["evaluate_llm", "--base_url", "http://127.0.0.1:1", "--exp_name"],
        ["report", "--exp_names"],
    ],
    "dataset_name": [
        ["allocate", "--input_file", "rows.jsonl", "--train_per_cat", "1", "--test_per_cat", "1", "--dataset_name"]
    ],
    "report_name": [["report", "--exp_names", "good", "--report_name"]],
}


@pytest.mark.parametrize("field", COMMANDS)
def test_no_command_writes_anything_for_a_bad_name(tmp_path, monkeypatch, capsys, field):
    place = tmp_path / "a" / "b" / "c"
    (place / "data" / "1").mkdir(parents=True)
    monkeypatch.chdir(place)
    row = {"instruction": "i", "input": "", "output": "o", "category": "c"}
    (place / "rows.jsonl").write_text("".join(json.dumps({**row, "instruction": f"i{n}"}) + "\n" for n in range(4)))
    (place / "data" / "1" / "local_training_0.json").write_text(json.dumps([row]))
    (place / "models" / "good").mkdir(parents=True)
    (place / "models" / "good" / "run.json").write_text('{"base_model": "m", "config": {}}')
    monkeypatch.setenv("api_key", "none")
    before = tree(tmp_path)
    for name in BAD_NAMES:
        for command in COMMANDS[field]:
            if command[-1] == "--exp_names" and (not name.strip() or "," in name):
                continue  # no name at all is another error
            assert cli.main([*command[:-1], f"{command[-1]}={name}"]) == 2
            shown = capsys.readouterr()
            assert shown.err.startswith("error: ")
            assert len(shown.err.splitlines()) == 2
            assert "\x1b" not in shown.err
            assert shown.out == ""
    assert tree(tmp_path) == before


def test_symbolic_links_do_not_lead_out(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    (outside / "keep").write_text("mine")
    (root / "e" / "x").mkdir(parents=True)
    subject = OutputName("global")
    run, results, data = RunPaths(root, "e"), ResultPaths(root, "e", 1), DataPaths(root, "e")
    linked = {
        "e/1": [lambda: run.round_folder(1), lambda: results.folder, lambda: results.verdicts(subject)],
        "e/2.partial": [lambda: run.partial_folder(2)],
        "e/3.damaged": [lambda: run.damaged_folder(3)],
        "e/metrics.jsonl": [lambda: run.metrics_file],
        "e/run.json": [lambda: run.run_file],
        "e/.lock": [lambda: run.lock_file],
        "e/8": [lambda: data.client_file(8, 0), lambda: data.manifest(8)],
        "f": [
            lambda: RunPaths(root, "f").root,
            lambda: report_file(root, "f", ".md"),
            lambda: DataPaths(root, "f").folder,
        ],
    }
    for place, builds in linked.items():
        for build in builds:
            if place != "f":
                build()
        for target in (outside, outside / "keep", outside / "new"):
            (root / place).symlink_to(target)
            for build in builds:
                with pytest.raises(UsageError, match="leads outside"):
                    build()
            (root / place).unlink()
    assert tree(outside) == {"keep": b"mine"}


def test_a_root_that_is_a_link_itself_is_fine(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "models").symlink_to(tmp_path / "disk")
    assert RunPaths(tmp_path / "models", "e").round_folder(1) == tmp_path / "models" / "e" / "1"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0", True),
        ("12", True),
        ("012", False),
        ("", False),
        ("\u00b2", False),
        ("\u0663", False),
        ("1.partial", False),
    ],
)
def test_only_numbers_as_we_write_them_are_rounds(tmp_path, name, expected):
    assert is_number(name) is expected
    if name:
        (tmp_path / "e" / name).mkdir(parents=True)
        assert RunPaths(tmp_path, "e").committed_rounds() == ([int(name)] if expected else [])
