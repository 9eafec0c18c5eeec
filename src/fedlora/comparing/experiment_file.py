"""The experiment of a result as a YAML file that makes it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Result = Mapping[str, Any]


def experiment_yaml(result: Result) -> str:
    """A file for `compare`. Which code runs is no file's choice: methods from outside have their names here, and
    `trust_remote_code` is a flag."""
    import yaml

    experiment = result["experiment"]
    given = {
        name: value for name, value in experiment.items() if value not in (None, {}, "") and name != "trust_remote_code"
    }
    # test rows that clients bring, or a share of the rows, take the place of a number of them
    if "silos" in result or "test_share" in given:
        given.pop("test_per_cat", None)
    given["modes"] = [_contender(result, one) for one in experiment["modes"]]
    ordered = {"name": given.pop("name"), "modes": given.pop("modes"), **given}
    return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=100)


def _contender(result: Result, described: Mapping[str, Any]) -> dict[str, Any]:
    """A method with the learning rates that were tried for it, where these are not everybody's."""
    found = {name: value for name, value in described.items() if name != "source"}
    tried = next(
        ([entry["learning_rate"] for entry in sweep["tried"]]
         for sweep in result["sweeps"] if sweep["method"] == described["name"]),
        None,
    )  # fmt: skip
    if tried is None:
        chosen = [row["learning_rate"] for row in result["rows"] if row["method"] == described["name"]]
        tried = [rate for rate in chosen[:1] if rate is not None]
    if tried and tried != list(result["experiment"]["learning_rates"]):
        found["learning_rates"] = tried
    return found
