"""The `evaluate_llm` stage: a judge compares predictions with a baseline's.

Verdicts are stored as they come, keyed by what was asked: an interrupted run resumes, and a second run asks nothing.
Samples without a verdict are counted by kind and asked again next time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config.evaluate import EvaluateLlmConfig
from fedlora.console import say
from fedlora.data.client_files import is_silo_folder
from fedlora.data.held_out import HeldOutRows, read_test_rows
from fedlora.errors import BudgetError, JudgeError, PendingError
from fedlora.evaluation.judge.asking import Asked, Sleep
from fedlora.evaluation.judge.bradley_terry import Compared, Strength, rank_models, ranking_table
from fedlora.evaluation.judge.desks import Desk, open_desk
from fedlora.evaluation.judge.judges import Judge, forecast_text, make_judges
from fedlora.evaluation.judge.mirrors import Mirrors
from fedlora.evaluation.judge.panel import JudgeResult, describe_panel, majority_of, panel_parts
from fedlora.evaluation.judge.readable_text import readable_text
from fedlora.evaluation.judge.results import pairs_table, results_parts
from fedlora.evaluation.judge.samples import ComparedFiles, read_samples
from fedlora.evaluation.judge.verdict_results import ComparedAnswers, Said, make_result, read_verdicts
from fedlora.files import json_text, read_json, write_json, write_text
from fedlora.paths import ResultPaths
from fedlora.plain_text import counted
from fedlora.results import Result
from fedlora.runs.judged_pairs import Pair, find_pairs, judge_stem, recorded_stem
from fedlora.runs.subjects import Subject, find_share, report_command

if TYPE_CHECKING:
    from fedlora.llm.base_model import BaseModel


@dataclass(frozen=True)
class Judgement:
    """What the judge said of one pair, as the result file holds it."""

    pair: Pair
    record: Mapping[str, Any]
    file: Path
    compared: Compared
    judges: tuple[JudgeResult, ...] = ()
    """Of several judges what each said; the record is then their majority's."""

    @property
    def names(self) -> tuple[str, str]:
        """Who was judged and against whom, as tables call them."""
        return self.pair.name, self.pair.baseline.name

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        of, against = self.names
        shown = {"of": of, "against": against, "file": str(self.file), "scores": dict(self.record)}
        return shown | ({"judges": [one.as_dict() for one in self.judges]} if self.judges else {})


@dataclass(frozen=True, repr=False)
class Judgements(Result):
    """What the judge said of every pair that was asked for."""

    judgements: tuple[Judgement, ...]
    config: EvaluateLlmConfig
    spent: Mapping[str, Any]
    """Calls, tokens and cost of this call; a later one that finds all verdicts spends nothing."""
    pending: tuple[Mapping[str, Any], ...] = ()
    """Batches that an endpoint works on."""

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
        if not self.judgements:
            return ()
        if len(self.judgements) == 1:
            (judged,) = self.judgements
            panel = panel_parts(judged.record) if judged.judges else []
            return *results_parts(judged.record), *panel, str(judged.file)
        folders = dict.fromkeys(str(one.file.parent) for one in self.judgements)
        ranked = [ranking_table(self.ranking)] if self.ranking else []
        return pairs_table([(*one.names, one.record) for one in self.judgements]), *ranked, *folders

    def as_dict(self) -> dict[str, Any]:
        """Per pair who it is, the result file, and what that holds; what was spent; the ranking of several models."""
        return {
            "spent": dict(self.spent),
            "ranking": [one.as_dict() for one in self.ranking],
            "judgements": [one.as_dict() for one in self.judgements],
        } | ({"pending": list(map(dict, self.pending))} if self.pending else {})


def run(
    config: EvaluateLlmConfig, *, sleep: Sleep = asyncio.sleep, load: Callable[..., BaseModel] | None = None
) -> Judgements:
    """Let every judge that `config` names judge every pair, and write the results.

    `sleep` waits between retries; `load` takes the place of `load_base_model` for a local judge. Raises UsageError
    (files, key, local model), DataError (rows that do not match), JudgeError (the endpoint refuses, or too few samples
    got a verdict), BudgetError (max_calls, max_cost), LockedError (another process asks); verdicts and results up to
    then are kept. With `batch` PendingError, with the results so far, until all batches are collected.
    """
    judges, spending = make_judges(config, sleep, load)
    asked_for = [(pair, _read_answers(config, pair, judges)) for pair in find_pairs(config)]
    with contextlib.ExitStack() as held:
        desks = {
            baseline: held.enter_context(
                open_desk(ResultPaths(config.evaluation_dir, baseline.run, baseline.round_number), baseline.output)
            )
            for baseline in dict.fromkeys(pair.baseline for pair, _ in asked_for)
        }
        keys = {key for _, panel in asked_for for answers in panel for key in answers.keys}
        for desk in desks.values():
            if config.overwrite:
                desk.forget(keys)
            if config.batch:
                spending.resume(desk.batches.spent)
            for judge in judges:
                judge.open(desk)
        mirrors = Mirrors(list(desks.values()), only=keys if config.overwrite else None)
        for pair, panel in asked_for:
            for answers in panel:
                mirrors.copy(answers.every_question, desks[pair.baseline].log)
        if forecast := forecast_text(judges, [(panel, desks[pair.baseline]) for pair, panel in asked_for]):
            say(f"judge: {forecast}")
        try:
            found, waiting = _judge_pairs(config, judges, asked_for, desks, mirrors)
        except JudgeError:
            for desk in desks.values():
                desk.batches.give_up()
            raise
        result = Judgements(tuple(found), config, spending.as_dict(), _pending(desks.values()) if waiting else ())
        if waiting:
            raise _not_collected(result, len(waiting))
        for desk in desks.values() if config.batch else ():
            desk.batches.close()
    return result


def _judge_pairs(
    config: EvaluateLlmConfig,
    judges: Sequence[Judge],
    asked_for: Sequence[tuple[Pair, Sequence[ComparedAnswers]]],
    desks: Mapping[Subject, Desk],
    mirrors: Mirrors,
) -> tuple[list[Judgement], list[Pair]]:
    """Ask every judge about every pair; the results, and the pairs whose replies are in batches."""
    found: list[Judgement] = []
    waiting: list[Pair] = []
    for pair, panel in asked_for:
        desk = desks[pair.baseline]
        asked = [
            _ask_open_questions(answers, desk, judge, mirrors) for judge, answers in zip(judges, panel, strict=True)
        ]
        if any(one.is_pending for one in asked):
            waiting.append(pair)
            continue
        said = [
            read_verdicts(answers, desk.log, one, judge=judge.name, place=judge.place)
            for judge, answers, one in zip(judges, panel, asked, strict=True)
        ]
        found.append(_write_results(config, pair, panel[0], said))
    return found, waiting


def _pending(desks: Iterable[Desk]) -> tuple[dict[str, Any], ...]:
    """The batches that are worked on."""
    return tuple(
        {"judge": batch.model, "host": batch.host, "batch": batch.id, "requests": len(batch.requests)}
        for desk in desks
        for batch in desk.batches.batches
    )


def _not_collected(result: Judgements, pairs: int) -> PendingError:
    requests = sum(batch["requests"] for batch in result.pending)
    batches, hosts = counted(len(result.pending), "batch", "batches"), {batch["host"] for batch in result.pending}
    where = f"{counted(requests, 'request')} in {batches} at {', '.join(sorted(hosts))}"
    what = f"{where}; {counted(pairs, 'pair')} without a result"
    return PendingError(what, hint="the same command collects the replies; a batch takes up to 24 hours", result=result)


def _write_results(config: EvaluateLlmConfig, pair: Pair, answers: ComparedAnswers, said: Sequence[Said]) -> Judgement:
    """The pair's files; of several judges each one's own, and the majority's as the pair's."""
    target = ResultPaths(config.evaluation_dir, pair.baseline.run, pair.baseline.round_number)
    judges = []
    for one in said if len(said) > 1 else ():
        file = target.pair(judge_stem(pair.stem, one.judge))
        judges.append(JudgeResult(one.judge, file, make_result(config, answers, one)))
        write_json(file, judges[-1].record)
    whole = majority_of(said) if judges else said[0]
    result = make_result(config, answers, whole)
    if judges:
        result |= describe_panel(said, judges)
    write_text(target.pair(pair.stem, "txt"), readable_text(answers.samples, whole, said))
    file = _write_pair(config, pair, target, result)
    return Judgement(pair, result, file, answers.outcomes(whole.judged), tuple(judges))


def _write_pair(config: EvaluateLlmConfig, pair: Pair, target: ResultPaths, result: dict[str, Any]) -> Path:
    """The pair's own file, and the reference project's where its flags named the pair; the one to show."""
    write_json(target.pair(pair.stem), result)
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


def _read_answers(config: EvaluateLlmConfig, pair: Pair, judges: Sequence[Judge]) -> list[ComparedAnswers]:
    """What is compared, with the questions of each judge."""
    source = ResultPaths(config.prediction_dir, pair.baseline.run, pair.baseline.round_number)
    tests = _read_tests(config, pair)
    files = ComparedFiles(source.predictions(pair.baseline.output), pair.proposed, config.target_file, tests)
    samples = read_samples(files, prediction_key=config.prediction_key)
    return [ComparedAnswers(files, samples, [judge.questions(sample) for sample in samples]) for judge in judges]


def _read_tests(config: EvaluateLlmConfig, pair: Pair) -> HeldOutRows | None:
    """The rows with reference answers, None where none are named."""
    if config.target_file is None:
        return None
    share = find_share([pair.baseline], config.model_dir) if is_silo_folder(config.target_file) else None
    # unless one is chosen, the answer has either of the names that it may have in training
    key = config.target_key if config.chosen("target_key") else None
    return read_test_rows(config.target_file, output_key=key, rules=config.read_rules, share=share)


def _ask_open_questions(answers: ComparedAnswers, desk: Desk, judge: Judge, mirrors: Mirrors) -> Asked:
    """Ask what has no verdict yet, in this direction of the pair or the other."""
    mirrors.copy(answers.every_question, desk.log)
    left = answers.open_questions(desk.log)
    failed = mirrors.failures(left)
    pending = mirrors.pending()
    waiting = [one for one in left if one.key not in failed and one.mirror not in pending]
    samples = counted(len(answers.samples), "sample")
    if not waiting:
        if len(failed) < len(left):
            return Asked(failed, is_pending=True)
        if not failed:
            say(f"judge: all verdicts on {samples} are stored in {desk.log.path}; nothing to ask")
        return Asked(failed)
    try:
        asked = judge.ask(waiting, desk, of=samples, total=len(answers.keys))
    except BudgetError as error:
        left_over = f"{answers.left(desk.log)} of {samples} are left"
        hint = "verdicts so far are kept: run again, with a higher limit if need be"
        raise BudgetError(f"{error}; {left_over}", hint=hint) from None
    mirrors.add_failures(asked.failures)
    is_pending = asked.is_pending or len(waiting) + len(failed) < len(left)
    return replace(asked, failures={**failed, **asked.failures}, is_pending=is_pending)
