"""The samples of a comparison: a baseline's answers, ours, and reference answers where there are any.

All files are joined by content, never by line: the k-th answer to a prompt belongs to the k-th row
of that prompt, and a row that only one file has is an error. With a target file its rows set the order
of the samples, else the baseline's do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedlora.data.held_out import HeldOutRows
from fedlora.errors import DataError, UsageError
from fedlora.evaluation.judge.protocol import Sample
from fedlora.evaluation.matching import pair_rows, read_predictions
from fedlora.files import sha256_of
from fedlora.rows import Row


@dataclass(frozen=True)
class ComparedFiles:
    """The two prediction files and, optionally, the rows with reference answers: a file, or a folder of silos."""

    baseline: Path
    proposed: Path
    target: Path | None
    tests: HeldOutRows | None = None
    """The rows of `target`."""

    def record(self) -> dict[str, dict[str, str] | None]:
        """Path and SHA-256 of each file, as a result keeps them."""
        named = {"baseline": self.baseline, "proposed": self.proposed}
        hashes = {name: {"path": str(path), "sha256": sha256_of(path)} for name, path in named.items()}
        target = {"path": str(self.target), "sha256": self.tests.sha256} if self.tests is not None else None
        return {**hashes, "target": target}


def read_samples(files: ComparedFiles, *, prediction_key: str) -> list[Sample]:
    """All samples, at least one. Where test rows have no category, the client whose rows they are takes its place.

    Raises UsageError for a missing file, DataError for rows that do not match.
    """
    baseline = read_predictions(files.baseline, prediction_key)
    proposed = read_predictions(files.proposed, prediction_key)
    if files.baseline.samefile(files.proposed):
        raise UsageError(
            f"{files.proposed} would be compared with itself",
            hint="choose another baseline with --against, such as base, or another --of",
        )
    if files.tests is None:
        pairs = pair_predictions(baseline, proposed, baseline_name=str(files.baseline), name=str(files.proposed))
        return [make_sample(row, ours, theirs, None) for row, (theirs, ours) in enumerate(pairs, start=1)]
    targets = files.tests.rows
    theirs = pair_rows(baseline, targets, predictions_name=str(files.baseline), targets_name=str(files.target))
    ours = pair_rows(proposed, targets, predictions_name=str(files.proposed), targets_name=str(files.target))
    matched = zip(ours, theirs, targets, files.tests.groups, strict=True)
    return [
        make_sample(row, mine[0], replace(other[0], category=group), target.output)
        for row, (mine, other, target, group) in enumerate(matched, 1)
    ]


def pair_predictions(
    baseline: Sequence[Row], proposed: Sequence[Row], *, baseline_name: str, name: str
) -> list[tuple[Row, Row]]:
    """Every (baseline, proposed) pair in the baseline's order; DataError names the first rows without a partner."""
    try:
        pairs = pair_rows(proposed, baseline, predictions_name=name, targets_name=baseline_name)
    except DataError as error:
        hint = "both files must answer the same test file: generate one of them again"
        raise DataError(str(error), hint=hint) from None
    return [(theirs, ours) for ours, theirs in pairs]


def make_sample(row: int, proposed: Row, baseline: Row, reference: str | None) -> Sample:
    """Two answers to one prompt, which is taken from the baseline's."""
    return Sample(
        row=row,
        instruction=baseline.instruction,
        input=baseline.input,
        category=baseline.category,
        baseline=baseline.output,
        proposed=proposed.output,
        reference=reference,
        before=baseline.before,
        continues=baseline.kind == "completion",
    )
