"""The `evaluate_llm` stage: a judge compares our predictions with a baseline's.

Verdicts are stored as they come, keyed by what was asked: a run that was stopped goes on where it was, and a
second run asks nothing. Samples without a verdict are counted by kind and asked again next time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from fedlora.config.evaluate import EvaluateLlmConfig
from fedlora.console import Progress, say
from fedlora.errors import BudgetError, JudgeError, LockedError, StorageError
from fedlora.evaluation.judge.completion import complete
from fedlora.evaluation.judge.key import load_key
from fedlora.evaluation.judge.protocol import ORDERS, PROMPT_VERSION, Question, Sample, make_question
from fedlora.evaluation.judge.results import combine, describe_judges, results_parts, summarise
from fedlora.evaluation.judge.samples import ComparedFiles, read_samples
from fedlora.evaluation.judge.verdict_log import VerdictLog
from fedlora.files import json_text, make_folder, write_json
from fedlora.paths import OutputName, ResultPaths
from fedlora.redaction import redacted_logs
from fedlora.results import Result
from fedlora.runs.subjects import Subject, find_answers

if TYPE_CHECKING:
    from fedlora.evaluation.judge.client import Sleep
    from fedlora.evaluation.judge.replies import FailureKind


@dataclass(frozen=True)
class _Comparison:
    """What is compared, and the questions that this takes: two for each sample."""

    files: ComparedFiles
    samples: Sequence[Sample]
    questions: Sequence[tuple[Question, ...]]

    def open_questions(self, log: VerdictLog) -> list[Question]:
        """Questions without a verdict, each once: equal rows share theirs."""
        every = {question.key: question for pair in self.questions for question in pair}
        return [question for question in every.values() if question.key not in log]

    def left(self, log: VerdictLog) -> int:
        """Samples that lack a verdict in one order or both."""
        return sum(any(question.key not in log for question in pair) for pair in self.questions)


@dataclass(frozen=True, repr=False)
class Judgement(Result):
    """What the judge said of two sets of answers, as the result file holds it."""

    record: Mapping[str, Any]
    file: Path

    def parts(self) -> Sequence[str]:
        """The table by category and the result file."""
        return (*results_parts(self.record), str(self.file))

    def as_dict(self) -> dict[str, Any]:
        """The result file, and where it lies."""
        return {"file": str(self.file), "scores": dict(self.record)}


def run(config: EvaluateLlmConfig, *, sleep: Sleep = asyncio.sleep) -> Judgement:
    """Judge what `config` names and write the result file.

    `sleep` waits between retries. Raises UsageError (files, key), DataError (rows that do not match), JudgeError (the
    endpoint refuses, or no sample got a verdict), BudgetError (max_calls), LockedError (another process asks); verdicts
    up to then are kept.
    """
    (baseline,) = find_answers(
        config.words,
        run=config.exp_name,
        round_number=config.communication_rounds,
        model_dir=config.model_dir,
        prediction_dir=config.prediction_dir,
    )
    name = baseline.output
    target = ResultPaths(config.evaluation_dir, baseline.run, baseline.round_number)
    comparison = _read_comparison(config, baseline)
    with _hold(target.judge_lock(name)):
        return _judge(config, comparison, target, name, sleep)


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


def _judge(
    config: EvaluateLlmConfig, comparison: _Comparison, target: ResultPaths, name: OutputName, sleep: Sleep
) -> Judgement:
    """Ask what has no verdict yet and write the result."""
    result_file = target.judge(name)
    log = VerdictLog(target.verdicts(name))
    if config.overwrite:
        log.forget({question.key for pair in comparison.questions for question in pair})

    failures = _ask_open_questions(config, comparison, log, sleep)
    result = _make_result(config, comparison, log, failures)
    if not config.overwrite and result_file.is_file() and result_file.read_bytes() != json_text(result).encode():
        say(f"judge: replacing {result_file}; the verdicts behind it stay in {log.path}")
    write_json(result_file, result)
    return Judgement(result, result_file)


def _read_comparison(config: EvaluateLlmConfig, baseline: Subject) -> _Comparison:
    source = ResultPaths(config.prediction_dir, baseline.run, baseline.round_number)
    proposed = config.prediction_dir / config.proposed_file
    files = ComparedFiles(source.predictions(baseline.output), proposed, config.target_file)
    samples = read_samples(
        files, prediction_key=config.prediction_key, target_key=config.target_key, rules=config.read_rules
    )
    host = urlsplit(config.base_url).hostname or ""
    questions = [
        tuple(make_question(sample, order, judge=config.gpt_model, host=host) for order in ORDERS) for sample in samples
    ]
    return _Comparison(files, samples, questions)


def _ask_open_questions(
    config: EvaluateLlmConfig, comparison: _Comparison, log: VerdictLog, sleep: Sleep
) -> dict[str, FailureKind]:
    """Ask what has no verdict yet; the kinds of the failures by question key."""
    waiting = comparison.open_questions(log)
    if not waiting:
        say(f"judge: all verdicts on {len(comparison.samples)} samples are stored in {log.path}; nothing to ask")
        return {}
    key = load_key(config.api_key_file, os.environ)

    # these bring in the client library, which takes a second
    from fedlora.evaluation.judge.client import JudgeClient
    from fedlora.evaluation.judge.judging import Judging, make_batches

    batches = make_batches(waiting, config.batch_size)
    say(_plan(config, comparison, len(waiting), len(batches)))

    async def ask_all(progress: Progress) -> dict[str, FailureKind]:
        async with JudgeClient(config, key, sleep=sleep) as client:
            judging = Judging(client, log, seed=config.seed, advance=progress.advance)
            try:
                await judging.run(batches, config.concurrency)
            finally:
                say(f"judge: {client.calls} calls in this run")
            return judging.failures

    try:
        with redacted_logs(), Progress("judge", len(waiting)) as progress:
            return complete(ask_all(progress))
    except BudgetError as error:
        left = f"{comparison.left(log)} of {len(comparison.samples)} samples are left"
        hint = "verdicts so far are kept: run again, with a higher --max_calls if need be"
        raise BudgetError(f"{error}; {left}", hint=hint) from None


def _plan(config: EvaluateLlmConfig, comparison: _Comparison, waiting: int, requests: int) -> str:
    address = urlsplit(config.base_url)
    total = len({question.key for pair in comparison.questions for question in pair})
    text = (
        f"judge: {len(comparison.samples)} samples in both orders, {total - waiting} of {total} verdicts stored; "
        f"{requests} requests (more with repairs and retries) to {config.gpt_model} "
        f"at {address.scheme}://{address.netloc}{address.path}"
    )
    if config.max_calls is not None and config.max_calls < requests:
        text += f"; max_calls={config.max_calls} will end this run early"
    return text


def _make_result(
    config: EvaluateLlmConfig, comparison: _Comparison, log: VerdictLog, failures: dict[str, FailureKind]
) -> dict[str, Any]:
    judged, verdicts, kinds = [], {}, []
    for sample, pair in zip(comparison.samples, comparison.questions, strict=True):
        failed = [failures[question.key] for question in pair if question.key in failures]
        if failed:
            # half a verdict is none: without the other order nobody knows whether the position decided
            kinds.append(failed[0])
            continue
        first, second = (log[question.key] for question in pair)
        judged.append(combine(sample.category, first, second))
        verdicts.update({first.key: first, second.key: second})
    by_kind = dict(sorted(Counter(kinds).items()))
    if not judged:
        reasons = ", ".join(f"{kind} {count}" for kind, count in by_kind.items())
        hint = "check --base_url and --gpt_model, or lower --batch_size; no result was written"
        raise JudgeError(f"no sample got a verdict ({reasons})", hint=hint)
    return {
        **summarise(judged),
        "votes_per_sample": len(ORDERS),
        "eval_failures": len(kinds),
        "failures_by_kind": by_kind,
        "total_in_files": len(comparison.samples),
        "batch_size": config.batch_size,
        "calls": len({verdict.request for verdict in verdicts.values()}),
        "judge": {
            "model_asked": config.gpt_model,
            "host": urlsplit(config.base_url).hostname,
            **describe_judges(list(verdicts.values())),
        },
        "prompt_version": PROMPT_VERSION,
        "files": comparison.files.record(),
    }
