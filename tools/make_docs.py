"""Write the generated pages: methods (and the README's list of them), commands, exit codes, Python, base models.

    python tools/make_docs.py

No model, no torch: a second. tests/test_method_pages.py fails while a page differs from what this would write.
"""

from __future__ import annotations

from pathlib import Path

from models_page import make_models
from python_page import make_python
from reference_pages import make_commands, make_exit_codes

from fedlora.config.method_options import options_of
from fedlora.files import read_text, write_text
from fedlora.methods.row import FAMILIES, Method
from fedlora.methods.rows import ROWS
from fedlora.stages.methods import SEES, combinations_of, limits_of, special_facts

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"
PAGE, README = REFERENCE / "methods.md", ROOT / "README.md"
BEGIN, END = "<!-- methods: make docs -->\n", "<!-- end of methods -->\n"

HEAD = """\
<!-- Written by `make docs` from src/fedlora/methods/rows.py and options.py: change those, not this page. -->

# Federated methods

`--method NAME` chooses a method (`--federation_mode` is its long name). Its options are flags, lines of a YAML file and
keywords of the same name. A method refuses the options of other methods. [How the methods work](../methods.md) explains
what they send and keep, and [How the methods are tested](../proofs.md) how they are tested.

The column "server computes from" names everything that the server uses of the clients' updates. A method without a
paper is a baseline.

"""
COMBINATIONS = """\
## What each can be combined with

`-`: fedlora refuses the combination before it loads a model, and gives the reason. Every method also takes a quantised
base, several devices, partial cohorts and, except where a privacy column says otherwise, any flag of training.

"""


def make_table(head: tuple[str, ...], rows: list[tuple[str, ...]], align: str = "---") -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- |" + f" {align} |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def families() -> dict[str, list[Method]]:
    """Family -> its methods, both in the order of the table; the family of methods from outside has none here."""
    found = {family: [row for row in ROWS if row.family == family] for family in FAMILIES}
    return {family: rows for family, rows in found.items() if rows}


def list_families() -> str:
    rows = [
        (family, FAMILIES[family], " ".join(f"`{row.name}`" for row in methods))
        for family, methods in families().items()
    ]
    return make_table(("family", "what its methods do", "`--method`"), rows)


def describe_options(methods: list[Method]) -> str:
    """The options of a family, empty where it has none; methods that differ in a default are named with theirs."""
    rows = []
    for name, found in options_of(tuple(methods)).items():
        having = [method for method in methods if method.option(name)]
        owners: dict[str, list[str]] = {}
        for method, option in zip(having, found, strict=True):
            owners.setdefault(option.shown_default, []).append(f"`{method.name}`")
        defaults = [f"{default}: {' '.join(names)}" for default, names in owners.items()]
        shown = "; ".join(owners if len(owners) == 1 else defaults)
        names = " ".join(f"`{method.name}`" for method in having)
        rows.append((f"`{name}`", names, shown, limits_of(found[0]), found[0].help))
    return make_table(("option", "methods", "default", "limits", "what it is"), rows) if rows else ""


def describe_family(family: str, methods: list[Method]) -> str:
    rows = [
        (f"`{row.name}`", row.summary, SEES[row.server_sees], ", ".join(special_facts(row)), row.paper or "baseline")
        for row in methods
    ]
    head = ("method", "what it does", "server computes from", "special", "paper")
    options = describe_options(methods)
    return f"## {family.capitalize()}\n\n{make_table(head, rows)}\n" + (f"{options}\n" if options else "")


def make_combinations() -> str:
    rows = []
    for row in ROWS:
        taken = combinations_of(row)
        rows.append((f"`{row.name}`", *("yes" if holds else "-" for holds in taken.values())))
    return make_table(("method", *combinations_of(ROWS[0])), rows, ":---:")


def make_page() -> str:
    sections = "".join(describe_family(*one) for one in families().items())
    return f"{HEAD}{list_families()}\n{sections}{COMBINATIONS}{make_combinations()}"


def make_readme(page: str) -> str:
    """The README with its list of methods renewed between two marks; what others wrote around it stays."""
    return put(page, BEGIN, END, list_families())


def put(page: str, begin: str, end: str, text: str) -> str:
    """The page with `text` between two marks."""
    before, rest = page.split(begin)
    return before + begin + text + end + rest.split(end)[1]


GENERATED = {
    PAGE: make_page,
    REFERENCE / "commands.md": make_commands,
    REFERENCE / "exit-codes.md": make_exit_codes,
    REFERENCE / "python.md": make_python,
    ROOT / "docs" / "models.md": make_models,
}


def main() -> None:
    for page, make in GENERATED.items():
        write_text(page, make())
    write_text(README, make_readme(read_text(README)))


if __name__ == "__main__":
    main()
