"""The `report` stage: put several runs side by side.

Nothing is computed again and nothing is required. The report shows what other stages left, and every gap names the
command that fills it. The same files give the same report, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.evaluate import ReportConfig
from fedlora.console import say
from fedlora.data.held_out import Share
from fedlora.errors import UsageError
from fedlora.files import json_text, write_bytes, write_text
from fedlora.paths import OutputName, report_file
from fedlora.reporting.categories_figure import draw_categories
from fedlora.reporting.drift_figure import draw_drift
from fedlora.reporting.experiments import Experiment, find_round, load_experiment, runs_command
from fedlora.reporting.findings import Findings, gather_findings
from fedlora.reporting.main_table import main_table_parts
from fedlora.reporting.markdown import markdown_report
from fedlora.reporting.page.looks import Looks
from fedlora.reporting.page.render import render_page
from fedlora.reporting.page.report_page import report_page
from fedlora.reporting.page.texts import texts_of_runs
from fedlora.reporting.rounds_figure import draw_rounds
from fedlora.results import Result
from fedlora.runs.subjects import Subject, find_share


@dataclass(frozen=True, repr=False)
class Report(Result):
    """What a report says, as Markdown (`file`) and as a page for a browser (`page`); report.json and the pictures lie
    beside them."""

    findings: Findings
    file: Path
    page: Path

    @property
    def next_command(self) -> str:
        """The first command that fills a gap."""
        return next((command for gap in self.findings.gaps for command in gap.commands), "")

    def parts(self) -> Sequence[str]:
        """The main table, what is to be said about it, and the files for reading."""
        return (*main_table_parts(self.findings), str(self.file), str(self.page))

    def as_dict(self) -> dict[str, Any]:
        """report.json, and where the files for reading lie."""
        return {"file": str(self.file), "page": str(self.page), **self.findings.record()}


def run(config: ReportConfig) -> Report:
    """Write report.md, report.html, report.json and the pictures beside them.

    Raises UsageError when none of the experiments has a run, or a file of one cannot be read.
    """
    round_number = find_round(config)
    loaded = {name: load_experiment(config, name, round_number) for name in dict.fromkeys(config.exp_names)}
    experiments = [experiment for experiment in loaded.values() if experiment is not None]
    if not experiments:
        raise UsageError(
            f"no run under {config.model_dir} is named {' or '.join(config.exp_names) or 'in exp_names'}",
            hint=f"`{runs_command(config)}` lists the runs there are",
        )
    if not isinstance(config.communication_rounds, int):
        say(f"comparing round {round_number}; choose another with --communication_rounds")
    findings = gather_findings(config, experiments, [name for name, one in loaded.items() if one is None])
    markdown = report_file(config.report_dir, config.report_name, ".md")
    pictures = {"rounds.png": draw_rounds(findings)}
    if findings.categories:
        pictures["clients.png"] = draw_categories(findings)
    if any(curves["aggregation_error"] for curves in findings.drift.values()):
        pictures["drift.png"] = draw_drift(findings)
    for name, content in pictures.items():
        write_bytes(markdown.with_name(name), content)
    write_text(report_file(config.report_dir, config.report_name, ".json"), json_text(findings.record()))
    write_text(markdown, markdown_report(findings, pictures=tuple(pictures)))
    page = report_file(config.report_dir, config.report_name, ".html")
    write_text(page, _page(config, experiments, findings))
    return Report(findings, markdown, page)


def _page(config: ReportConfig, experiments: Sequence[Experiment], findings: Findings) -> str:
    looks = Looks.of_runs([(name, findings.runs[name]["mode"]) for name in findings.curves])
    texts = texts_of_runs(config, experiments, looks, _share(config, experiments))
    return render_page(report_page(config, experiments, findings, looks, texts))


def _share(config: ReportConfig, experiments: Sequence[Experiment]) -> Share | None:
    """The share of their clients' rows that all runs held out; none where they held out different rows."""
    subjects = [Subject(one.name, one.round_number, OutputName("base"), "base") for one in experiments]
    try:
        return find_share(subjects, config.model_dir)
    except UsageError:
        return None
