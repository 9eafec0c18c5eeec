"""The `evaluate_llm` stage: a judge compares predictions with a baseline's.

Verdicts are stored as they come, keyed by what was asked: an interrupted run resumes, and a second run asks nothing.
Samples without a verdict are counted by kind and asked again next time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from filelock import FileLock, Timeout

from fedlora.config.evaluate import EvaluateLlmConfig
from fedlora.console import say
from fedlora.data.client_files import is_silo_folder
from fedlora.data.held_out import HeldOutRows, read_test_rows
from fedlora.errors import BudgetError, LockedError, StorageError
from fedlora.evaluation.judge.asking import Asked, JudgeEndpoint, Sleep
from fedlora.evaluation.judge.bradley_terry import Compared, Strength, rank_models, ranking_table
from fedlora.evaluation.judge.protocol import ORDERS, Question, make_question
from fedlora.evaluation.judge.readable_text import readable_text
from fedlora.evaluation.judge.results import pairs_table, results_parts
from fedlora.evaluation.judge.samples import ComparedFiles, read_samples
from fedlora.evaluation.judge.verdict_log import VerdictLog
from fedlora.evaluation.judge.verdict_results import ComparedAnswers, make_result
from fedlora.files import json_text, make_folder, read_json, write_json, write_text
from fedlora.paths import ResultPaths
from fedlora.plain_text import counted
from fedlora.results import Result
from fedlora.runs.judged_pairs import Pair, find_pairs, recorded_stem
from fedlora.runs.subjects import find_share, report_command

if TYPE_CHECKING:
    from fedlora.llm.base_model import BaseModel


@dataclass(frozen=True)
class Judgement:
    """What the judge said of one pair, as the result file holds it."""

    pair: Pair
    record: Mapping[str, Any]
    file: Path
    compared: Compared

    @property
    def names(self) -> tuple[str, str]:
        """Who was judged and against whom, as tables call them."""
        return self.pair.name, self.pair.baseline.name


@dataclass(frozen=True, repr=False)
class Judgements(Result):
    """What the judge said of every pair that was asked for."""

    judgements: tuple[Judgement, ...]
    config: EvaluateLlmConfig
    spent: Mapping[str, Any]
    """Calls, tokens and cost of this call; a later one that finds all verdicts spends nothing."""

    @property
    def next_command(self) -> str:
        """How the results become a report; empty where there is no run."""
        config = self.config
        baselines = [one.pair.baseline for one in self.judgements]
        folders = {"model_dir": config.model_dir, "prediction_dir": config.prediction_dir}
        return report_command(baselines, config.evaluation_dir, llm_dir=config.evaluation_dir, **folders)

    @cached_property
    def ranking(self) -> list[Strength]:
        """The strengths of three models or more that pairs connect, by Bradley and Terry; else empty."""
        names = {
            file: name
            for one in self.judgements
            for file, name in zip((one.compared.proposed, one.compared.baseline), one.names, strict=True)
        }
        return [replace(one, name=names[one.name]) for one in rank_models([one.compared for one in self.judgements])]

    def parts(self) -> Sequence[str]:
        """Of one pair the table by category, of several a row each; then where the results lie."""
        if len(self.judgements) == 1:
            return *results_parts(self.judgements[0].record), str(self.judgements[0].file)
        folders = dict.fromkeys(str(one.file.parent) for one in self.judgements)
        ranked = [ranking_table(self.ranking)] if self.ranking else []
        return pairs_table([(*one.names, one.record) for one in self.judgements]), *ranked, *folders

    def as_dict(self) -> dict[str, Any]:
        """Per pair who it is, the result file, and what that holds; what was spent; the ranking of several models."""
        return {
            "spent": dict(self.spent),
            "ranking": [one.as_dict() for one in self.ranking],
            "judgements": [
                {"of": of, "against": against, "file": str(one.file), "scores": dict(one.record)}
                for one in self.judgements
                for of, against in (one.names,)
            ],
        }


def run(
    config: EvaluateLlmConfig, *, sleep: Sleep = asyncio.sleep, load: Callable[..., BaseModel] | None = None
) -> Judgements:
    """Judge every pair that `config` names and write its result.

    `sleep` waits between retries; `load` takes the place of `load_base_model` for a local judge. Raises UsageError
    (files, key, local model), DataError (rows that do not match), JudgeError (the endpoint refuses, or too few samples
    got a verdict), BudgetError (max_calls, max_cost), LockedError (another process asks); verdicts and results up to
    then are kept.
    """
    judge = _make_judge(config, sleep, load)
    asked_for = [(pair, _read_answers(config, pair, judge)) for pair in find_pairs(config)]
    found: list[Judgement] = []
    for baseline in dict.fromkeys(pair.baseline for pair, _ in asked_for):
        target = ResultPaths(config.evaluation_dir, baseline.run, baseline.round_number)
        own = [(pair, answers) for pair, answers in asked_for if pair.baseline == baseline]
        with _hold(target.judge_lock(baseline.output)):
            log = VerdictLog(target.verdicts(baseline.output))
            if config.overwrite:
                log.forget({question.key for _, answers in own for both in answers.questions for question in both})
            for pair, answers in own:
                asked = _ask_open_questions(answers, log, judge, target.unusable_reply(baseline.output))
                judged, result = make_result(config, answers, log, asked, judge.place)
                file = _write_result(config, pair, target, result, readable_text(answers, log))
                found.append(Judgement(pair, result, file, answers.outcomes(judged)))
    return Judgements(tuple(found), config, judge.spent)


@contextlib.contextmanager
def _hold(lock_file: Path) -> Iterator[None]:
    """Keep a second judge of the same baseline out: both would pay for the same verdicts, and one log lose lines."""
    make_folder(lock_file.parent)
    lock = FileLock(lock_file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise LockedError(
            f"{lock_file.parent}: another process judges this baseline",
            hint="wait until it has ended, or choose another --evaluation_dir",
        ) from None
    except OSError as error:
        raise StorageError(f"{lock_file}: {error.strerror}", hint="fix permissions, then run again") from error
    try:
        yield
    finally:
        lock.release()


def _write_result(
    config: EvaluateLlmConfig, pair: Pair, target: ResultPaths, result: dict[str, Any], texts: str
) -> Path:
    """The pair's own file, the texts, and the reference project's where its flags named the pair; the one to show."""
    write_json(target.pair(pair.stem), result)
    write_text(target.pair(pair.stem, "txt"), texts)
    if not config.by_contract:
        return target.pair(pair.stem)
    file = target.judge(pair.baseline.output)
    if file.is_file() and file.read_bytes() != json_text(result).encode():
        stem = recorded_stem(read_json(file), pair.baseline, config.prediction_dir)
        if stem and stem != pair.stem:
            if not target.pair(stem).is_file():
                write_json(target.pair(stem), read_json(file))
            say(f"judge: replacing {file}; the result of the pair before is in {target.pair(stem)}")
        elif not config.overwrite:
            say(f"judge: replacing {file}; its verdicts stay in {target.verdicts(pair.baseline.output)}")
    write_json(file, result)
    return file


class _Judge(Protocol):
    """An endpoint or a local model."""

    @property
    def place(self) -> str: ...

    @property
    def spent(self) -> dict[str, Any]: ...

    def ask(
        self, questions: Sequence[Question], log: VerdictLog, *, of: str, total: int, unusable_file: Path
    ) -> Asked: ...


def _make_judge(config: EvaluateLlmConfig, sleep: Sleep, load: Callable[..., BaseModel] | None) -> _Judge:
    if config.local_judge is None:
        return JudgeEndpoint(config, sleep=sleep)
    # these bring in torch
    from fedlora.evaluation.judge.local_judge import LocalJudge
    from fedlora.llm.base_model import load_base_model

    return LocalJudge(config, load or load_base_model)


def _read_answers(config: EvaluateLlmConfig, pair: Pair, judge: _Judge) -> ComparedAnswers:
    source = ResultPaths(config.prediction_dir, pair.baseline.run, pair.baseline.round_number)
    tests = _read_tests(config, pair)
    files = ComparedFiles(source.predictions(pair.baseline.output), pair.proposed, config.target_file, tests)
    samples = read_samples(files, prediction_key=config.prediction_key)
    questions = [
        tuple(
            make_question(sample, order, judge=config.gpt_model, host=judge.place, reasons=config.reasons)
            for order in ORDERS
        )
        for sample in samples
    ]
    return ComparedAnswers(files, samples, questions)


def _read_tests(config: EvaluateLlmConfig, pair: Pair) -> HeldOutRows | None:
    """The rows with reference answers, None where none are named."""
    if config.target_file is None:
        return None
    share = find_share([pair.baseline], config.model_dir) if is_silo_folder(config.target_file) else None
    # unless one is chosen, the answer has either of the names that it may have in training
    key = config.target_key if config.chosen("target_key") else None
    return read_test_rows(config.target_file, output_key=key, rules=config.read_rules, share=share)


def _ask_open_questions(answers: ComparedAnswers, log: VerdictLog, judge: _Judge, unusable_file: Path) -> Asked:
    """Ask what has no verdict yet."""
    waiting = answers.open_questions(log)
    samples = counted(len(answers.samples), "sample")
    if not waiting:
        say(f"judge: all verdicts on {samples} are stored in {log.path}; nothing to ask")
        return Asked({})
    try:
        return judge.ask(waiting, log, of=samples, total=answers.num_verdicts, unusable_file=unusable_file)
    except BudgetError as error:
        left = f"{answers.left(log)} of {samples} are left"
        hint = "verdicts so far are kept: run again, with a higher limit if need be"
        raise BudgetError(f"{error}; {left}", hint=hint) from None
