"""Which two files of predictions a judge compares, and what the result of a pair is called.

The baseline is always a subject; what is judged against it is one too, or any file of predictions.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.evaluate import EvaluateLlmConfig
from fedlora.errors import UsageError
from fedlora.paths import OutputName, ResultPaths, is_number
from fedlora.runs.subjects import Subject, find_answers

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_UNSAFE_IN_JUDGE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Pair:
    """A baseline, and the predictions that are judged against it."""

    baseline: Subject
    proposed: Path
    name: str
    """What tables call the proposed predictions."""
    stem: str
    """Of the result file: `global--base`, or `prox.3.global--base` for another run or round than the baseline's."""


def find_pairs(config: EvaluateLlmConfig) -> list[Pair]:
    """Every pair that is asked for, each baseline with everyone who is judged, none with itself where there are others.

    Raises UsageError for who is not there, and for a proposed file that two folders have.
    """
    baselines = _find(config, config.baseline_words)
    if words := config.proposed_words:
        judged = [(one.name, _folder(config, one).predictions(one.output)) for one in _find(config, words)]
    else:
        file = find_proposed_file(config.proposed_file, config.prediction_dir)
        judged = [(str(config.proposed_file), file)]
    pairs = [
        Pair(baseline, file, name, pair_stem(file, baseline, config.prediction_dir))
        for baseline in baselines
        for name, file in judged
    ]
    others = [
        pair for pair in pairs if pair.proposed != _folder(config, pair.baseline).predictions(pair.baseline.output)
    ]
    return others or pairs[:1]


def find_proposed_file(file: Path, prediction_dir: Path) -> Path:
    """The file below `prediction_dir`, or from the working directory where it is not there; UsageError if both are."""
    below = prediction_dir / file
    if below == file or not file.is_file():
        return below
    if below.is_file() and not below.samefile(file):
        raise UsageError(
            f"proposed_file={file} is {below} and {file.absolute()}", hint="give the full path of the one that is meant"
        )
    return below if below.is_file() else file


def pair_stem(proposed: Path, baseline: Subject, prediction_dir: Path) -> str:
    """Name of a pair's result in the folder of its baseline, without suffix; no two pairs share one."""
    return f"{_proposed_stem(proposed, baseline, prediction_dir)}--{baseline.output}"


def judge_stem(pair: str, judge: str) -> str:
    """Name of what one of several judges said of a pair, without suffix: a file in a folder of the pair."""
    safe = _UNSAFE_IN_JUDGE.sub("_", judge)[:60].strip(".")
    # another name may become the same one
    digest = "" if safe == judge else f"-{hashlib.sha256(judge.encode()).hexdigest()[:8]}"
    return f"{pair}/{safe}{digest}"


def recorded_stem(result: Any, baseline: Subject, prediction_dir: Path) -> str:
    """`pair_stem` of a result that was written earlier; empty where it is not of fedlora's shape."""
    match result:
        case {"files": {"proposed": {"path": str(path)}}}:
            return pair_stem(Path(path), baseline, prediction_dir)
    return ""


def _proposed_stem(file: Path, baseline: Subject, prediction_dir: Path) -> str:
    place = file.relative_to(prediction_dir).parts if file.is_relative_to(prediction_dir) else ()
    if (
        len(place) == 3
        and not _UNSAFE.search(place[0].replace(".", ""))
        and is_number(place[1])
        and place[2].endswith("_output.jsonl")
    ):
        run, round_number, output = place[0], place[1], OutputName.of_stem(place[2].removesuffix("_output.jsonl"))
        if output is not None:
            alike = (run, round_number) == (baseline.run, str(baseline.round_number))
            return str(output) if alike else f"{run}.{round_number}.{output}"
    digest = hashlib.sha256(str(file.absolute()).encode()).hexdigest()[:8]
    return f"{_UNSAFE.sub('_', file.name.split('.')[0])[:60]}-{digest}"


def _find(config: EvaluateLlmConfig, words: tuple[str, ...]) -> list[Subject]:
    return find_answers(
        words,
        run=config.exp_name,
        round_number=config.communication_rounds,
        model_dir=config.model_dir,
        prediction_dir=config.prediction_dir,
    )


def _folder(config: EvaluateLlmConfig, subject: Subject) -> ResultPaths:
    return ResultPaths(config.prediction_dir, subject.run, subject.round_number)
