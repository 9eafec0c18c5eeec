"""What the pages tell a reader to type and to write is what the command line and the configurations take."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from crashtest import SECTIONS

import fedlora
from fedlora import __version__, cli
from fedlora.config.compare import CompareConfig
from fedlora.config.train import TrainConfig
from fedlora.config.yaml_file import read_yaml
from fedlora.files import write_text
from fedlora.flags import make_parser, read_flags
from fedlora.flower.node_config import NodeConfig

ROOT = Path(__file__).parents[1]
PAGES = [
    *("README.md", "CONTRIBUTING.md", "AGENTS.md"),
    *(path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("docs/**/*.md")) if path.name != "comparison.md"),
]
COMMAND = re.compile(r"(?:sudo -u fedlora )?(?:\S*/)?fedlora ([a-z].*)")


def blocks(page: str) -> list[str]:
    """The code of a page, fenced or indented, without its indentation and with continued lines joined."""
    found: list[list[str]] = [[]]
    fenced = False
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
            found.append([])
        elif fenced or line.startswith("    ") or (line == "" and found[-1]):
            found[-1].append(line if fenced else line.removeprefix("    "))
        elif found[-1]:
            found.append([])
    return [re.sub(r"\\\n\s*", "", "\n".join(lines)).strip("\n") for lines in found if lines]


def commands(page: str) -> list[str]:
    return [match[1] for block in blocks(page) for line in block.splitlines() if (match := COMMAND.match(line.strip()))]


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_one(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for client in ("north", "south"):
        write_text(tmp_path / "silos" / f"{client}.csv", "instruction,response\nCapital of France?,Paris\n")
    write_text(tmp_path / "part_way.py", (ROOT / "examples" / "part_way.py").read_text(encoding="utf-8"))
    for command in commands(page):
        words = words_of(command)
        name, rest = cli._split_command(words)
        assert name in cli.COMMANDS, command
        row = cli.COMMANDS[name]
        config_class = cli.load(row.config)
        given = read_flags(make_parser(name, config_class), rest, config_class, row.positional)
        file = given.file
        # a file that the reader makes is read by the next test
        config_class.make(given.values, file=ROOT / file if file and (ROOT / file).is_file() else None)


def test_the_pages_do_show_commands():
    assert sum(len(commands(page)) for page in PAGES) > 25


def test_the_commands_behind_the_promises_find_their_tests():
    """A file that moved, a test that was renamed, or one that -k no longer picks would leave a promise unshown."""
    page = (ROOT / "docs/reliability.md").read_text()
    commands = [shlex.split(command)[1:] for command in re.findall(r"`(pytest [^`]+)`", page)]
    assert len(commands) >= 8
    for words in commands:
        files = [word for word in words if word.endswith(".py")]
        picked = words[words.index("-k") + 1].split(" or ") if "-k" in words else ["test_"]
        names = [re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.MULTILINE) for file in files]
        for file, own in zip(files, names, strict=True):
            assert any(word in name for word in picked for name in own), f"{words}: nothing in {file}"
        assert all(any(word in name for own in names for name in own) for word in picked), words
    assert set(re.findall(r"crashtest\.py --only (\w+)", page)) == set(SECTIONS)


def yaml_of(first: str, page: str = "docs/how-to/three-hospitals.md") -> str:
    (block,) = [block for block in blocks(page) if block.startswith(first)]
    return block


def test_the_files_of_the_deployment_guide_are_read(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml_of("model:"))
    run = TrainConfig.make({}, file=tmp_path / "run.yaml")
    assert (run.num_clients, run.local_learning_rate, run.data_path) == (3, 1e-3, Path("data/dolly"))
    (tmp_path / "node.yaml").write_text(yaml_of("folder:"))
    node = NodeConfig.make({}, file=tmp_path / "node.yaml")
    assert (node.min_examples, node.federation_modes, node.share_own_adapter) == (50, ("homo", "fedprox"), False)


def test_the_experiment_of_the_guide_to_comparisons_is_read(tmp_path):
    (tmp_path / "study.yaml").write_text(yaml_of("name:", "docs/how-to/compare.md"))
    study = CompareConfig.make({}, file=tmp_path / "study.yaml")
    assert [contender.name for contender in study.modes if contender.name == "strong-pull"] == ["strong-pull"]


def test_the_citation_names_this_release():
    citation = read_yaml(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", __version__)


def test_the_python_of_a_page_compiles_and_uses_public_names():
    for page in PAGES:
        for code in re.findall(
            r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            tree = ast.parse(code)
            used = {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fl"
            }
            assert all(hasattr(fedlora, name) for name in used), f"{page}: {used}"


def test_the_files_that_a_page_names_are_there():
    """Links are the site's business; here it is files in backticks, as `tools/relay.py`."""
    name = re.compile(r"`((?:docs|src|tests|tools|studies|benchmarks|examples|deploy|script)/[\w/-]+\.\w+)")
    made_by_the_reader = {"src/fedlora/methods/part_way.py"}
    pages = [*PAGES, "CHANGELOG.md", "SECURITY.md"]
    found = {file for page in pages for file in name.findall((ROOT / page).read_text(encoding="utf-8"))}
    assert len(found) > 5
    assert sorted(file for file in found - made_by_the_reader if not (ROOT / file).exists()) == []
