"""The `evaluate_rouge` stage: ROUGE and exact match of prediction files, as the reference project has them.

Predictions and test rows are paired by content, so the order of the lines means nothing, and a file that
belongs to another test set is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.config.evaluate import EvaluateRougeConfig, RougeTokenizer
from fedlora.console import Progress, say
from fedlora.data.client_files import is_silo_folder
from fedlora.data.held_out import HeldOutRows, read_test_rows
from fedlora.errors import UsageError
from fedlora.evaluation.matching import excerpt, first_few, pair_rows, read_predictions
from fedlora.evaluation.rouge import METRICS, AnswerScore, AnswerScorer, by_group, check_categories, summarise
from fedlora.files import sha256_of, write_json
from fedlora.paths import ResultPaths
from fedlora.plain_text import Table, counted, one_line, table_text
from fedlora.results import Result
from fedlora.rows import Row
from fedlora.runs.subjects import Subject, find_answers, find_share, report_command, shown_names

MOST_CLIENTS = 12
"""Clients in the table beside the categories; the result file has all."""


@dataclass(frozen=True)
class SubjectScores:
    """The scores of one subject's predictions, as the result file holds them."""

    subject: Subject
    record: Mapping[str, Any]
    file: Path

    @property
    def name(self) -> str:
        """Whose answers were scored, as tables call them."""
        return self.subject.name

    @property
    def num_rows(self) -> int:
        """Answers that were scored."""
        return sum(self.record["fedlora"]["num_samples"].values())

    @property
    def exact_match(self) -> float:
        """Share of answers that are right: the plain mean over the categories, in 0..1."""
        return self.record["fedlora"]["exact_match"]["macro"]

    @property
    def overall(self) -> tuple[float, ...]:
        """Exact match, then METRICS: plain means over the categories, in 0..1."""
        means = self.record["overall"]
        return (self.exact_match, *(means[f"avg_{metric}"] for metric in METRICS))


@dataclass(frozen=True, repr=False)
class RougeScores(Result):
    """The scores of everyone who was asked for, in that order."""

    scores: tuple[SubjectScores, ...]
    config: EvaluateRougeConfig

    @property
    def next_command(self) -> str:
        """How the scores become a report; empty where there is no run."""
        config = self.config
        folders = {"model_dir": config.model_dir, "prediction_dir": config.prediction_dir}
        return report_command(
            [one.subject for one in self.scores], config.evaluation_dir, rouge_dir=config.evaluation_dir, **folders
        )

    def __getitem__(self, name: str) -> SubjectScores:
        """The scores of one subject, by the name in the table. Raises UsageError for another name."""
        named = dict(zip(self.names, self.scores, strict=True))
        if name not in named:
            raise UsageError(f"no scores of {name!r}", hint=f"there are {', '.join(named)}")
        return named[name]

    @property
    def names(self) -> list[str]:
        """Whose answers were scored, as the table calls them."""
        return shown_names([one.subject for one in self.scores])

    def parts(self) -> Sequence[str]:
        """Of one subject the table by category, of several a row each; then where the results lie."""
        if len(self.scores) == 1:
            one = self.scores[0]
            return _categories_table(one), *clients_table(self.scores), str(one.file)
        rows = [_cells(name, one.num_rows, *one.overall) for name, one in zip(self.names, self.scores, strict=True)]
        folders = dict.fromkeys(str(one.file.parent) for one in self.scores)
        return table_text(("of", "rows", "exact", *METRICS), rows), *clients_table(self.scores), *folders

    def as_dict(self) -> dict[str, Any]:
        """Per subject who it is, the result file, and what that holds; categories are names of its own."""
        return {
            "scores": [
                {**one.subject.record(), "file": str(one.file), "scores": dict(one.record)} for one in self.scores
            ]
        }


@dataclass(frozen=True)
class AnsweredRows:
    """Test rows, and per subject its answers to them: (prediction, target) pairs in the rows' order, and their file."""

    tests: HeldOutRows
    pairs: Mapping[Subject, Sequence[tuple[Row, Row]]]
    sources: Mapping[Subject, Path]


def run(config: EvaluateRougeConfig) -> RougeScores:
    """Score the predictions that `config` names and write a result file for each.

    Raises UsageError when a file is missing, DataError when predictions and test rows do not belong together; nothing
    is written then.
    """
    subjects = find_subjects(config, config.words)
    answered = pair_answers(config, subjects, read_tests(config, subjects))
    return RougeScores(write_scores(config, answered, score_answers(config, answered)), config)


def find_subjects(config: EvaluateRougeConfig, words: Sequence[str]) -> list[Subject]:
    """Whose predictions `words` mean."""
    return find_answers(
        words,
        run=config.exp_name,
        round_number=config.communication_rounds,
        model_dir=config.model_dir,
        prediction_dir=config.prediction_dir,
    )


def read_tests(config: EvaluateRougeConfig, subjects: Sequence[Subject], *, keep: tuple[str, ...] = ()) -> HeldOutRows:
    """The rows with the reference answers, with the columns to `keep`."""
    share = find_share(subjects, config.model_dir) if is_silo_folder(config.target_file) else None
    # unless one is chosen, the answer has either of the names that it may have in training
    key = config.target_key if config.chosen("target_key") else None
    rules = replace(config.read_rules, keep=keep)
    tests = read_test_rows(config.target_file, output_key=key, rules=rules, share=share)
    check_categories(tests.groups, str(config.target_file))
    return tests


def pair_answers(config: EvaluateRougeConfig, subjects: Sequence[Subject], tests: HeldOutRows) -> AnsweredRows:
    """The predictions of every subject, paired with the test rows by content."""
    sources = {
        one: ResultPaths(config.prediction_dir, one.run, one.round_number).predictions(one.output) for one in subjects
    }
    pairs = {
        one: pair_rows(
            read_predictions(source, config.prediction_key),
            tests.rows,
            predictions_name=str(source),
            targets_name=str(config.target_file),
        )
        for one, source in sources.items()
    }
    return AnsweredRows(tests, pairs, sources)


def score_answers(config: EvaluateRougeConfig, answered: AnsweredRows) -> dict[Subject, list[AnswerScore]]:
    """ROUGE and exact match of every answer; says which texts ROUGE does not see."""
    scorer, tests = AnswerScorer(config.rouge_tokenizer), answered.tests
    found: dict[Subject, list[AnswerScore]] = {}
    label = f"scoring {', '.join(shown_names(list(answered.pairs)))}"
    with Progress(label, sum(map(len, answered.pairs.values())), "answers") as progress:
        for subject, rows in answered.pairs.items():
            found[subject] = []
            for (prediction, target), group in zip(rows, tests.groups, strict=True):
                found[subject].append(scorer.score(prediction.output, target.output, group))
                progress.advance()
    if hidden := _hidden_text(found, tests.rows):
        hint = "; --rouge_tokenizer unicode reads any script" if config.rouge_tokenizer == "ascii" else ""
        say(f"warning: ROUGE's tokenizer keeps less than half of the letters of {hidden}{hint}")
    return found


def write_scores(
    config: EvaluateRougeConfig, answered: AnsweredRows, found: Mapping[Subject, Sequence[AnswerScore]]
) -> tuple[SubjectScores, ...]:
    """The reference project's result file of every subject."""
    written = []
    for one, scores in found.items():
        record = _record(scores, answered.tests, config.rouge_tokenizer)
        record["fedlora"]["predictions_sha256"] = sha256_of(answered.sources[one])
        record["fedlora"]["targets_sha256"] = answered.tests.sha256
        file = ResultPaths(config.evaluation_dir, one.run, one.round_number).rouge(one.output)
        write_json(file, record)
        written.append(SubjectScores(one, record, file))
    return tuple(written)


def _record(scores: Sequence[AnswerScore], tests: HeldOutRows, tokenizer: RougeTokenizer) -> dict[str, Any]:
    result = summarise(scores)
    if tests.clients:
        result["fedlora"] |= {"grouped_by": tests.grouped_by, "clients": by_group(scores, tests.clients)}
    if tokenizer != "ascii":
        result["fedlora"]["rouge_tokenizer"] = tokenizer
    return result


def _hidden_text(found: Mapping[Subject, Sequence[AnswerScore]], rows: Sequence[Row]) -> str:
    """Which texts ROUGE does not see; empty where it sees all."""
    first = next(iter(found.values()))
    targets = [excerpt(row) for row, score in zip(rows, first, strict=True) if score.hides_target]
    what = [f"{len(targets)} of {counted(len(rows), 'reference')} (to {first_few(targets)})"] if targets else []
    counts = {subject: sum(score.hides_answer for score in scores) for subject, scores in found.items()}
    answers = [f"{count} of {subject.name}" for subject, count in counts.items() if count]
    return " and ".join([*what, *([f"of answers ({first_few(answers)})"] if answers else [])])


def _categories_table(scores: SubjectScores) -> Table:
    ours = scores.record["fedlora"]
    exact, counts = ours["exact_match"]["categories"], ours["num_samples"]
    rows = [
        _cells(one_line(category), count, exact[category], *(scores.record[category][m] for m in METRICS))
        for category, count in counts.items()
    ]
    rows.append(_cells("overall", scores.num_rows, *scores.overall))
    head = ours.get("grouped_by", "category")
    return table_text((head, "rows", "exact", *METRICS), rows, rules=(len(counts),))


def clients_table(scores: Sequence[SubjectScores]) -> list[Table]:
    """ROUGE-L on every client's test rows, a row for each whose answers were scored; none where the only table has it
    already, or where rows belong to no client."""
    known = [one for one in scores if "clients" in one.record["fedlora"]]
    if not known or (len(scores) == 1 and known[0].record["fedlora"]["grouped_by"] == "client"):
        return []
    clients = list(known[0].record["fedlora"]["clients"])[:MOST_CLIENTS]
    rows = [
        [name, *(f"{one.record['fedlora']['clients'][client]['rougeL']:.4f}" for client in clients)]
        for name, one in zip(shown_names([one.subject for one in known]), known, strict=True)
    ]
    return [table_text(("rougeL on the rows of", *map(one_line, clients)), rows)]


def _cells(name: str, num_rows: int, exact: float, *means: float) -> list[str]:
    return [name, str(num_rows), f"{exact:.3f}", *(f"{value:.4f}" for value in means)]
