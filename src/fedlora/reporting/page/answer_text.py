"""The answer of a report in two sentences: who wins and by how much, and whether joining pays."""

from __future__ import annotations

from fedlora.plain_text import counted
from fedlora.reporting.findings import Findings
from fedlora.reporting.main_table import short_label
from fedlora.reporting.own_rows import count_gains
from fedlora.reporting.standing import Standing
from fedlora.reporting.summary import ModelRow

MEASURE_NAMES = {"exact": "exact match", "loss": "test loss", "rougeL": "ROUGE-L", "chrf": "chrF"}


def answer_sentences(findings: Findings) -> list[str]:
    """Two sentences; of what was not measured the first says how to measure it."""
    standing = findings.standing
    if standing is None:
        return ["No model was scored or validated yet: the commands below answer the test rows and score them."]
    return [_who_wins(standing), _does_joining_pay(findings, standing)]


def counted_gains(findings: Findings, label: str) -> tuple[str, tuple[int, int, int]] | None:
    """By exact match, else by the first measure that was taken: clients that gain under a model, lose, and all."""
    for measure in MEASURE_NAMES:
        if counts := count_gains(measure, findings.gains_of_clients).get(label):
            return measure, counts
    return None


def _who_wins(standing: Standing) -> str:
    winner, label, other = standing.winner, short_label(standing.winner), standing.next
    if not standing.is_scored:
        beside = f", against {other.held_out_loss:.3f} of {short_label(other)}" if other is not None else ""
        lowest = f"has the lowest held-out loss, {winner.held_out_loss:.3f}{beside}"
        return f"{_which(standing, label)} {lowest}; no answers were scored."
    exact = f"exact match {winner.all:.3f}{_interval(winner)}"
    if other is None:
        return f"{label}: {exact} over all categories."
    beside = f"{short_label(other)} has {other.all:.3f}{_interval(other)}"
    if standing.lead is not None:
        lead = standing.lead.estimate
        ends = "{:+.3f} to {:+.3f}".format(*lead.interval)
        beside = f"{lead.mean:+.3f} against {short_label(other)} (95 % interval {ends})"
        beside += "" if standing.lead.is_clear else "; the interval includes 0, so these rows do not tell them apart"
    verb = "wins" if standing.lead is not None and standing.lead.is_clear else "is ahead"
    if winner.all == other.all:
        verb = f"is level with {short_label(other)}"
    return f"{_which(standing, label)} {verb}: {exact} over all categories, {beside}."


def _which(standing: Standing, label: str) -> str:
    return f"Of {counted(standing.num_federated, 'federated method')} {label}" if standing.num_federated > 1 else label


def _interval(row: ModelRow) -> str:
    return " (95 % interval {:.3f} to {:.3f})".format(*row.all_interval) if row.all_interval else ""


def _does_joining_pay(findings: Findings, standing: Standing) -> str:
    label = short_label(standing.winner)
    if found := counted_gains(findings, label):
        measure, (gain, lose, total) = found
        rest = total - gain - lose
        undecided = f", and for {rest} the interval includes 0" if rest else ""
        reference = findings.gains_of_clients[0].reference
        return (
            f"Joining under {label} pays for {gain} of {counted(total, 'client')} and costs {lose}, on each client's "
            f"own test rows against {reference}, by {MEASURE_NAMES[measure]}{undecided}."
        )
    winner, alone = standing.winner, standing.alone
    if alone is None or alone is winner or winner.all is None or winner.own is None or alone.own is None:
        return (
            "Whether joining pays is open: it takes a run in which every client trains alone, scored on the same test "
            "rows."
        )
    return (
        f"Joining {_pays(winner.all, alone.all)} over all categories ({winner.all:.3f}; a client alone {alone.all:.3f} "
        f"on average) and {_pays(winner.own, alone.own)} on what a client trained on ({winner.own:.3f}; alone "
        f"{alone.own:.3f})."
    )


def _pays(joint: float, alone: float | None) -> str:
    assert alone is not None
    return "pays" if joint > alone else "costs" if joint < alone else "changes nothing"
