"""Pair the answers of one file with the rows of another, by content.

Never by line: a prediction file may be sorted differently, shorter or from another test set, and
pairing line by line would then give wrong scores without a word. The k-th answer to a prompt
pairs with the k-th row of that prompt; whatever is left over on either side is an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedlora.console import printable
from fedlora.data.records import read_rows
from fedlora.errors import DataError, UsageError
from fedlora.plain_text import counted
from fedlora.rows import MIXED, Row

_NAMED = 3
_EXCERPT = 60


def read_predictions(path: Path, prediction_key: str) -> list[Row]:
    """Prediction rows in file order, the answer in `output`; at least one.

    Takes what fedlora and the earlier research code write: instruction, input, `prediction_key`, category; in place of
    instruction and input also the messages up to the answer, or a prompt.
    Raises UsageError when there is no such file, DataError with file and line when a row cannot be used.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such predictions", hint="write them with `fedlora generate`")
    try:
        return read_rows(path, output_key=prediction_key, rules=MIXED)
    except DataError as error:
        hint = f"a prediction has instruction and input, messages, or a prompt, and {prediction_key} and category"
        raise DataError(str(error), hint=hint) from None


def pair_rows(
    predictions: Sequence[Row], targets: Sequence[Row], *, predictions_name: str, targets_name: str
) -> list[tuple[Row, Row]]:
    """Every (prediction, target) pair, in the order of `targets`.

    The names (paths, say) appear in errors. Raises DataError that counts the rows without a partner, or the
    pairs whose categories differ, and names the first three of each.
    """
    waiting: defaultdict[tuple[str, ...], list[Row]] = defaultdict(list)
    for prediction in reversed(predictions):
        waiting[prediction.prompt].append(prediction)
    pairs: list[tuple[Row, Row]] = []
    missing: list[Row] = []
    for target in targets:
        same_prompt = waiting[target.prompt]
        if same_prompt:
            pairs.append((same_prompt.pop(), target))
        else:
            missing.append(target)
    left = {id(prediction) for rows in waiting.values() for prediction in rows}
    surplus = [prediction for prediction in predictions if id(prediction) in left]

    faults = []
    if missing:
        faults.append(
            f"{len(missing)} of {counted(len(targets), 'row')} have no prediction: {first_few(map(excerpt, missing))}"
        )
    if surplus:
        faults.append(
            f"{len(surplus)} of {len(predictions)} predictions have no row: {first_few(map(excerpt, surplus))}"
        )
    if faults:
        hint = "predictions and test file must belong together: generate again, or name the test file that was answered"
        raise DataError(f"{predictions_name} does not match {targets_name}: {'; '.join(faults)}", hint=hint)
    _check_categories(pairs, predictions_name, targets_name)
    return pairs


def _check_categories(pairs: Sequence[tuple[Row, Row]], predictions_name: str, targets_name: str) -> None:
    wrong = [
        f"{excerpt(target)} ({prediction.category!r} against {target.category!r})"
        for prediction, target in pairs
        if prediction.category != target.category
    ]
    if wrong:
        what = f"{len(wrong)} of {counted(len(pairs), 'row')} have another category: {first_few(wrong)}"
        hint = "score predictions against the test file they were made from"
        raise DataError(f"{predictions_name} does not match {targets_name}: {what}", hint=hint)


def first_few(descriptions: Iterable[str]) -> str:
    """The first three of several descriptions, in words."""
    every = list(descriptions)
    return ", ".join(every[:_NAMED]) + (", ..." if len(every) > _NAMED else "")


def excerpt(row: Row) -> str:
    """The beginning of what a row asks, quoted; of a conversation its last user turn."""
    text = " | ".join(part for part in row.prompt[:2] if part)
    text = " ".join(printable(text).split())
    return f'"{text[:_EXCERPT]}..."' if len(text) > _EXCERPT else f'"{text}"'
