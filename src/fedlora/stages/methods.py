"""List the federated methods, or describe one, from the rows of the method table."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from fedlora.config.methods import MethodsConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.methods.combinations import why_not_reaggregated
from fedlora.methods.outside import installed_names
from fedlora.methods.row import FAMILIES, Method, Option
from fedlora.methods.table import METHODS, find_method
from fedlora.results import Result

SEES = MappingProxyType(
    {
        "mean": "one mean of the adapters",
        "mean and more": "a mean of the adapters and of further tensors",
        "mean of several shapes": "adapters of different ranks",
        "mean of products": "a mean of the products B A",
        "single updates": "single updates",
        "nothing": "nothing",
        None: "not stated",
    }
)
"""What a server computes from, in words."""
ASKED: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "client_ranks": {"client_ranks": "8,4x7"},
        "privacy by client": {"dp_noise_multiplier": 1.0, "dp_clip": 1.0},
        "privacy by example": {"dp_example_noise_multiplier": 1.0, "dp_example_clip": 1.0},
        "limits on norms": {"max_update_norm": 1.0},
        "max_client_weight": {"max_client_weight": 0.5},
        "optimizer_state=keep": {"optimizer_state": "keep"},
        "local_optimizer=sgd": {"local_optimizer": "sgd"},
    }
)
"""A feature -> the flags that ask for it."""


@dataclass(frozen=True, repr=False)
class MethodList(Result):
    """Methods, by family in the order of the table; `installed` names those of other packages."""

    rows: tuple[Method, ...]
    installed: tuple[str, ...] = ()

    def text(self) -> str:
        """A heading for each family and a line for each method."""
        width = max(len(row.name) for row in self.rows)
        lines = []
        for family in dict.fromkeys(row.family for row in self.rows):
            members = [row for row in self.rows if row.family == family]
            lines += [
                "",
                f"{family}: {FAMILIES[family]}",
                *(f"  {row.name:<{width}}  {row.summary}" for row in members),
            ]
        if self.installed:
            lines += ["", "installed by other packages:", *(f"  {name}" for name in self.installed)]
        return "\n".join(lines[1:])

    def as_dict(self) -> dict[str, Any]:
        """Name -> family, summary and paper."""
        return {
            "methods": {
                row.name: {"family": row.family, "summary": row.summary, "paper": row.paper} for row in self.rows
            },
            "installed": list(self.installed),
        }


@dataclass(frozen=True, repr=False)
class MethodDescription(Result):
    """One method: its facts, its flags and what it can be combined with."""

    row: Method

    def text(self) -> str:
        """A line for each fact, then the flags and the combinations."""
        row = self.row
        facts = [
            ("family", f"{row.family}: {FAMILIES[row.family]}" if row.family in FAMILIES else row.family),
            ("paper", row.paper or ("" if row.source else "baseline")),
            ("from", row.source.describe() if row.source else ""),
            ("server computes from", SEES[row.server_sees]),
            ("special", ", ".join(special_facts(row))),
            ("combines with", ", ".join(name for name, taken in combinations_of(row).items() if taken)),
            ("refuses", ", ".join(name for name, taken in combinations_of(row).items() if not taken)),
        ]
        lines = [f"{row.name}: {row.summary}"]
        for name, value in facts:
            if value:
                lines += textwrap.wrap(f"{name}: {value}", 100, initial_indent="  ", subsequent_indent="    ")
        for option in row.options:
            limits = limits_of(option)
            bounds = f"; {limits}" if limits else ""
            flag = f"--set {option.name}=VALUE" if row.source else f"--{option.name}"
            lines.append(f"  {flag}: {option.help} (default: {option.shown_default}{bounds})")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The facts of the row, the options and the combinations."""
        row = self.row
        options = {
            option.name: {"default": option.default, "help": option.help, "limits": limits_of(option)}
            for option in row.options
        }
        facts = {
            field.name: getattr(row, field.name)
            for field in dataclasses.fields(row)
            if field.name not in ("server", "client", "options", "source")
        }
        facts |= {"source": row.source.record()} if row.source else {}
        return {**facts, "options": options, "combines_with": combinations_of(row)}


def run(config: MethodsConfig) -> MethodList | MethodDescription:
    """The list, or the method that the configuration names; UsageError for an unknown one."""
    if config.federation_mode:
        return MethodDescription(find_method(config.federation_mode))
    return MethodList(tuple(METHODS.values()), tuple(installed_names()))


def special_facts(row: Method) -> Sequence[str]:
    """What differs from FedAvg."""
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
        found.append("weighted by examples with {}={}".format(*row.rows_weigh))
    return found


def limits_of(option: Option) -> str:
    """The bounds of an option's value, empty where there are none."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = [f"{signs[name]} {bound:g}" for name, bound in option.limits.items()]
    if get_origin(option.kind) is Literal:
        limits.append(" or ".join(map(str, get_args(option.kind))))
    if option.below:
        limits.append(f"< {option.below}")
    if option.at_least:
        limits.append(f">= {option.at_least}")
    return ", ".join(limits)


def combinations_of(row: Method) -> dict[str, bool]:
    """Feature -> whether a run of this method may ask for it."""
    taken = {feature: _is_taken(row, flags) for feature, flags in ASKED.items()}
    return {**taken, "reaggregate": why_not_reaggregated(row) is None}


def _is_taken(row: Method, flags: Mapping[str, object]) -> bool:
    try:
        TrainConfig.of(federation_mode=row, num_clients=8, lora_r=8, **flags)
    except UsageError:
        return False
    return True
