"""What the pages say of every method: docs/reference/methods.md and the README's list, from the method table.

    python tools/make_docs.py

No model, no torch: a second. tests/test_method_pages.py fails while a page is another than this would write.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args, get_origin

from fedlora.config.method_options import options_of
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.files import read_text, write_text
from fedlora.methods.combinations import why_not_reaggregated
from fedlora.methods.row import FAMILIES, Method, Option
from fedlora.methods.rows import ROWS

ROOT = Path(__file__).parent.parent
PAGE, README = ROOT / "docs" / "reference" / "methods.md", ROOT / "README.md"
BEGIN, END = "<!-- methods: make docs -->\n", "<!-- end of methods -->\n"

HEAD = """\
<!-- Written by `make docs` from src/fedlora/methods/rows.py and options.py: change those, not this page. -->

# Federated methods

`--federation_mode NAME` chooses a method. Its options are flags, lines of a YAML file and keywords of the same name. A
method refuses the options of other methods. [How the methods work](../methods.md) explains what they send and keep, and
[How the methods are tested](../proofs.md) how they are tested.

The column "server computes from" names everything that the server uses of the clients' updates. A method without a
paper is a baseline.

"""
COMBINATIONS = """\
## What each can be combined with

`-`: fedlora refuses the combination before it loads a model, and gives the reason. Every method also takes a quantised
base, several devices, partial cohorts and, except where a privacy column says otherwise, any flag of training.

"""
SEES = {
    "mean": "one mean of the adapters",
    "mean and more": "a mean of the adapters and of further tensors",
    "mean of several shapes": "adapters of different ranks",
    "mean of products": "a mean of the products B A",
    "single updates": "single updates",
    "nothing": "nothing",
    None: "not stated",
}
FLAGS: dict[str, dict[str, object]] = {
    "`client_ranks`": {"client_ranks": "8,4x7"},
    "privacy by client": {"dp_noise_multiplier": 1.0, "dp_clip": 1.0},
    "privacy by example": {"dp_example_noise_multiplier": 1.0, "dp_example_clip": 1.0},
    "limits on norms": {"max_update_norm": 1.0},
    "`max_client_weight`": {"max_client_weight": 0.5},
    "`optimizer_state=keep`": {"optimizer_state": "keep"},
    "`local_optimizer=sgd`": {"local_optimizer": "sgd"},
    "`reaggregate`": {},
}
"""Column of the table of combinations -> the flags that ask for it; `reaggregate` is a command, not a flag."""


def make_table(head: tuple[str, ...], rows: list[tuple[str, ...]], align: str = "---") -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- |" + f" {align} |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def families() -> dict[str, list[Method]]:
    """Family -> its methods, both in the order of the table."""
    return {family: [row for row in ROWS if row.family == family] for family in FAMILIES}


def list_families() -> str:
    rows = [
        (family, about, " ".join(f"`{row.name}`" for row in methods))
        for (family, methods), about in zip(families().items(), FAMILIES.values(), strict=True)
    ]
    return make_table(("family", "what its methods do", "`--federation_mode`"), rows)


def special_facts(row: Method) -> str:
    """What a reader must know of a method that FedAvg does not have."""
    facts = {
        "one client after another": row.order == "chain",
        "rows leave their owners": row.pools_rows,
        "not weighted by examples": row.rows_weigh is False and row.combines,
        "ranks may differ": row.ranks_may_differ,
        "trains twice a round": row.trains == "twice",
        "personal models": row.keeps_personal_model,
        "no global model": row.has_global_model is False,
        "adds to the base": row.adds_to_base,
        "some rounds are for all clients": row.asks_everybody,
        "cannot be extended": row.bound_to_length,
    }
    found = [text for text, holds in facts.items() if holds]
    if isinstance(row.rows_weigh, tuple):
        found.append("weighted by examples with `{}={}`".format(*row.rows_weigh))
    return ", ".join(found)


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


def limits_of(option: Option) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = [f"{signs[name]} {bound:g}" for name, bound in option.limits.items()]
    if get_origin(option.kind) is Literal:
        limits.append(" or ".join(f"`{choice}`" for choice in get_args(option.kind)))
    if option.below:
        limits.append(f"< `{option.below}`")
    if option.at_least:
        limits.append(f">= `{option.at_least}`")
    return ", ".join(limits)


def describe_family(family: str, methods: list[Method]) -> str:
    rows = [
        (f"`{row.name}`", row.summary, SEES[row.server_sees], special_facts(row), row.paper or "baseline")
        for row in methods
    ]
    head = ("method", "what it does", "server computes from", "special", "paper")
    options = describe_options(methods)
    return f"## {family.capitalize()}\n\n{make_table(head, rows)}\n" + (f"{options}\n" if options else "")


def is_taken(method: str, flags: dict[str, object]) -> bool:
    """Whether a configuration with these flags is accepted."""
    try:
        TrainConfig.of(federation_mode=method, num_clients=8, lora_r=8, **flags)
    except UsageError:
        return False
    return True


def make_combinations() -> str:
    rows = []
    for row in ROWS:
        cells = ["yes" if is_taken(row.name, flags) else "-" for flags in FLAGS.values()]
        cells[-1] = "yes" if why_not_reaggregated(row) is None else "-"
        rows.append((f"`{row.name}`", *cells))
    return make_table(("method", *FLAGS), rows, ":---:")


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


def main() -> None:
    write_text(PAGE, make_page())
    write_text(README, make_readme(read_text(README)))


if __name__ == "__main__":
    main()
