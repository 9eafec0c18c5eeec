"""The `compare` stage: methods over seeds and settings on one data set, under one budget.

Every run goes through the stages allocate and train as the command line calls them, in this process and on one
resident base. Learning rates are chosen on validation rows, which the test rows never touch; the test rows are scored
once a method's learning rate is chosen. A run that fails is reported in the table and ends no other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.comparing.compared_run import Laboratory
from fedlora.comparing.comparison import Comparing
from fedlora.comparing.comparison_page import comparison_page, looks_of
from fedlora.comparing.comparison_text import comparison_markdown, comparison_parts, plan_of_runs_parts
from fedlora.comparing.data_sets import DataSets
from fedlora.comparing.experiment_file import experiment_yaml
from fedlora.comparing.figures import draw_comparison
from fedlora.comparing.known_bases import KnownBases
from fedlora.comparing.latex import latex_table
from fedlora.comparing.page_answers import find_answers
from fedlora.comparing.tables import gather_comparison
from fedlora.config.compare import CompareConfig
from fedlora.console import Progress, say
from fedlora.errors import UsageError
from fedlora.files import json_text, write_bytes, write_text
from fedlora.llm.resident_base import ResidentBase
from fedlora.paths import ComparisonPaths, RunPaths
from fedlora.reporting.page.render import render_page
from fedlora.reporting.page.texts import side_by_side
from fedlora.results import Result
from fedlora.runs.lock import hold_run


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """The result of an experiment, as comparison.json holds it, as Markdown (`file`) and as a page for a browser
    (`page`)."""

    record: Mapping[str, Any]
    file: Path
    page: Path

    def parts(self) -> Sequence[str]:
        """The main table, the remarks and the files for reading."""
        return (*comparison_parts(self.record), str(self.file), str(self.page))

    def as_dict(self) -> dict[str, Any]:
        """comparison.json, and where the files for reading lie."""
        return {"file": str(self.file), "page": str(self.page), **self.record}


@dataclass(frozen=True, repr=False)
class PlanOfRuns(Result):
    """What would be done, and what it should take."""

    record: Mapping[str, Any]

    @property
    def next_with_same_flags(self) -> str:
        return "compare"

    def parts(self) -> Sequence[str]:
        """The table of methods, and the runs that are left."""
        return plan_of_runs_parts(self.record)

    def as_dict(self) -> dict[str, Any]:
        return dict(self.record)


def run(config: CompareConfig) -> Comparison | PlanOfRuns:
    """Train the runs that are missing and write the result; with `--plan` only report what would be done.

    Raises UsageError when the experiment has no run, StorageError, LockedError; what is wrong with single runs is
    recorded.
    """
    paths = ComparisonPaths(config.output_dir, config.name)
    laboratory = Laboratory(config, paths, ResidentBase(), KnownBases(paths))
    if config.plan:
        with tempfile.TemporaryDirectory(prefix="fedlora-plan-") as folder:
            data = DataSets(config, ComparisonPaths(Path(folder), config.name))
            return PlanOfRuns(_some_runs(Comparing(laboratory, data).make_plan()))
    # the folder's lock, as that of a run: two processes on one experiment would do everything twice
    with hold_run(RunPaths(config.output_dir, config.name)):
        return _compare(Comparing(laboratory, DataSets(config, paths)), paths)


def _some_runs(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    """The plan; UsageError with all reasons where it has no run."""
    if not plan["runs"]:
        reasons = "; ".join(dict.fromkeys(refused["reason"] for refused in plan["refused"]))
        hints = "; ".join(dict.fromkeys(hint for refused in plan["refused"] if (hint := refused["hint"])))
        raise UsageError(f"this experiment has no run: {reasons}", hint=hints or "change the experiment")
    return plan


def _compare(comparing: Comparing, paths: ComparisonPaths) -> Comparison:
    plan = _some_runs(comparing.make_plan())
    say("\n".join(plan_of_runs_parts(plan)))
    with Progress(f"compare {comparing.config.name}", plan["runs"], "runs") as progress:
        cells = comparing.do_runs(progress.advance)
    result = gather_comparison(plan, cells)
    figures = draw_comparison(result)
    for name, content in figures.items():
        write_bytes(paths.result_file(name), content)
    write_text(paths.result_file("comparison.tex"), latex_table(result))
    write_text(paths.result_file("comparison.json"), json_text(result))
    markdown, page = paths.result_file("comparison.md"), paths.result_file("report.html")
    write_text(markdown, comparison_markdown(result, figures=tuple(figures)))
    looks = looks_of(result)
    texts = side_by_side(find_answers(paths, cells, comparing.config.seeds[0], looks))
    write_text(page, render_page(comparison_page(result, looks, yaml=experiment_yaml(result), texts=texts)))
    return Comparison(result, markdown, page)
