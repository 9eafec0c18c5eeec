"""Tables of a report as heads and rows of text, whatever form they are shown in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.plain_text import NOTHING, number_text
from fedlora.reporting.findings import Findings

_HASH = 12

Rows = tuple[Sequence[str], list[tuple[str, ...]]]


def drift_rows(findings: Findings) -> Rows:
    """First and last round of the error meter's numbers."""
    head = ("model", "error, first round", "last round", "cosine, first", "last", "norm, first", "last")
    names = ("aggregation_error", "drift_cosine_mean", "drift_norm_mean")
    rows = []
    for name, curves in findings.drift.items():
        ends = [(points[0][1], points[-1][1]) if (points := curves[each]) else (None, None) for each in names]
        cells = [NOTHING if value is None else f"{value:.3g}" for pair in ends for value in pair]
        rows.append((findings.titles[name], *cells))
    return head, rows


def judge_rows(findings: Findings) -> Rows:
    """Every pair that a judge compared."""
    head = (
        *("baseline", "ours", "judge", "win / tie / loss", "win rate, ties half", "length-controlled"),
        *("position flips", "score baseline", "score ours", "failed"),
    )
    rows = [
        (
            one.baseline,
            one.proposed,
            one.judge,
            f"{one.win} / {one.tie} / {one.loss}",
            f"{one.win_rate_ties_half:.3f}" + (" ({:.3f} to {:.3f})".format(*one.interval) if one.interval else ""),
            number_text(one.length_controlled),
            f"{one.position_flip_rate:.1%}",
            f"{one.baseline_score:.1f}",
            f"{one.proposed_score:.1f}",
            str(one.failures),
        )
        for one in findings.judgements
    ]
    return head, rows


def run_rows(findings: Findings) -> Rows:
    """What each run was trained on and with."""
    head = ("experiment", "mode", "base model", "device", "dtype", "seed", "clients", "rows", "adapter", "versions")
    rows = []
    for name, run in findings.runs.items():
        versions = ", ".join(f"{package} {version}" for package, version in sorted(run["versions"].items()))
        examples = sum(client["num_examples"] for client in run["clients"])
        size = f"{run['adapter']['num_parameters']:,} parameters"
        rows.append(
            (
                name,
                run["mode"],
                run["base_model"],
                run["device"],
                run["base_dtype"],
                str(run["config"]["seed"]),
                str(len(run["clients"])),
                f"{examples:,}",
                size,
                versions,
            )
        )
    return head, rows


def difference_rows(findings: Findings) -> Rows:
    """Configuration fields that are not the same in every run."""
    rows = [
        (field, *(str(values[name]) for name in findings.runs)) for field, values in findings.config_differences.items()
    ]
    return ("field", *findings.runs), rows


def answer_rows(findings: Findings) -> Rows:
    """What made each file of answers."""
    head = ("answers", "experiment", "adapter SHA-256", "test file SHA-256", "rows", "prompt", "decoding")
    rows = [
        (
            one["answers"],
            one["experiment"],
            (one["adapter_sha256"] or "none")[:_HASH],
            one["test_file_sha256"][:_HASH],
            str(one["num_rows"]),
            one["prompt_template"],
            _settings(one["decoding"]),
        )
        for one in findings.answers
    ]
    return head, rows


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(values.items()))
