"""What a task measured of a model: values with their standard errors and 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import UsageError
from fedlora.files import read_json
from fedlora.plain_text import NOTHING, number_text

Z = 1.959963984540054
"""Of 95 % of a normal distribution."""


@dataclass(frozen=True)
class TaskScore:
    """One measure of one task, or of a group of tasks; `stderr` is the library's, None where it has none for it."""

    task: str
    measure: str
    filter: str
    """What the answers went through before they were scored; `none` is nothing."""
    value: float
    stderr: float | None
    higher_is_better: bool | None
    num_rows: int
    num_fewshot: int | None
    is_group: bool = False

    @property
    def interval(self) -> tuple[float, float] | None:
        """At 95 %, by the normal approximation: value -/+ 1.96 standard errors, which may pass 0 or 1."""
        return None if self.stderr is None else (self.value - Z * self.stderr, self.value + Z * self.stderr)

    @property
    def called(self) -> str:
        """The measure, and the filter where there is one."""
        return self.measure if self.filter == "none" else f"{self.measure} ({self.filter})"

    def record(self) -> dict[str, Any]:
        interval = self.interval
        return {**asdict(self), "interval": None if interval is None else list(interval)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TaskScore:
        """A score as its file keeps it. Raises KeyError, TypeError."""
        return cls(**{name: record[name] for name in cls.__dataclass_fields__})


def read_scores(results: Mapping[str, Any]) -> Iterator[TaskScore]:
    """The scores of what the library's evaluation returned, in its order; what is no number is left out."""
    for task, found in results["results"].items():
        is_group = task in results["group_subtasks"]
        for key, value in found.items():
            measure, comma, filter_name = key.partition(",")
            if not comma or measure.endswith("_stderr") or not _is_number(value):
                continue
            stderr = found.get(f"{measure}_stderr,{filter_name}")
            yield TaskScore(
                task,
                measure,
                filter_name,
                float(value),
                float(stderr) if _is_number(stderr) else None,
                results["higher_is_better"].get(task, {}).get(measure),
                int(found.get("sample_len", 0)),
                results["n-shot"].get(task),
                is_group,
            )


def stored_scores(file: Path) -> tuple[TaskScore, ...]:
    """The scores that a file keeps. Raises UsageError where it is not one of ours."""
    record = read_json(file)
    try:
        return tuple(TaskScore.from_record(one) for one in record["scores"])
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{file}: not written by fedlora ({error})", hint="run `fedlora tasks --overwrite` again"
        ) from None


def score_cells(score: TaskScore) -> list[str]:
    """Value, standard error, interval, rows and examples before a question, as tables show them."""
    interval = NOTHING if score.interval is None else "{:.4f}..{:.4f}".format(*score.interval)
    shots = NOTHING if score.num_fewshot is None else str(score.num_fewshot)
    return [number_text(score.value, 4), number_text(score.stderr, 4), interval, f"{score.num_rows:,}", shots]


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, str | bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
