"""Answer a few questions with several adapters of a run in one load and one batch; nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedlora.config.generate import GenerateConfig
from fedlora.engines.answerers import by_round, find_answerers
from fedlora.llm.base_model import BaseModel
from fedlora.llm.resident_base import ResidentBase
from fedlora.paths import OutputName
from fedlora.rows import Row
from fedlora.runs.subjects import Subject


def answer_rows(
    config: GenerateConfig,
    subjects: Sequence[Subject],
    rows: Sequence[Row],
    *,
    load: Callable[..., BaseModel] | None = None,
) -> dict[Subject, list[str]]:
    """What each subject answers to `rows`; those of one round answer together, and runs on one base share it.

    Raises UsageError, StorageError.
    """
    load = load or ResidentBase().load
    parts = {place: find_answerers(config, place, found) for place, found in by_round(subjects).items()}
    texts: dict[tuple[str, int, OutputName], list[str]] = {}
    for (run, number), answerers in parts.items():
        for group, answers in answerers.answer(config, rows, load, together=True):
            texts |= {(run, number, name): answers.texts[name] for name in group}
    return {one: texts[one.run, one.round_number, one.output] for one in subjects}
