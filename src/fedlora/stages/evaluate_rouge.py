"""The `evaluate_rouge` stage: ROUGE and exact match of one prediction file.

Predictions and test rows are paired by content, so the order of the lines means nothing, and a file that
belongs to another test set is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.evaluate import EvaluateRougeConfig
from fedlora.console import Progress, say
from fedlora.data.records import read_rows
from fedlora.evaluation.matching import pair_rows, read_predictions
from fedlora.evaluation.rouge import METRICS, AnswerScorer, check_categories, summarise
from fedlora.files import sha256_of, write_json
from fedlora.paths import OutputName, ResultPaths
from fedlora.plain_text import one_line, table_text
from fedlora.results import Result
from fedlora.types import Row


@dataclass(frozen=True, repr=False)
class RougeScores(Result):
    """The scores of one file of predictions, as the result file holds them."""

    record: Mapping[str, Any]
    file: Path

    def parts(self) -> Sequence[str]:
        """The table by category and the result file."""
        ours = self.record["fedlora"]
        exact, counts = ours["exact_match"], ours["num_samples"]
        rows = [
            _cells(
                one_line(category), count, exact["categories"][category], [self.record[category][m] for m in METRICS]
            )
            for category, count in counts.items()
        ]
        overall = [self.record["overall"][f"avg_{metric}"] for metric in METRICS]
        rows.append(_cells("overall", sum(counts.values()), exact["macro"], overall))
        table = table_text(("category", "rows", "exact", *METRICS), rows, rules=(len(counts),))
        return table, str(self.file)

    def as_dict(self) -> dict[str, Any]:
        """The result file, and where it lies: categories are names of its own, so it is not flattened."""
        return {"file": str(self.file), "scores": dict(self.record)}


def run(config: EvaluateRougeConfig) -> RougeScores:
    """Score the predictions that `config` names and write the result file.

    Raises UsageError when a file is missing, DataError when predictions and test rows do not belong together.
    """
    name = OutputName.choose(
        is_base_model=config.is_base_model, is_global_model=config.is_global_model, client_id=config.client_id
    )
    source = ResultPaths(config.prediction_dir, config.exp_name, config.communication_rounds).predictions(name)
    result_file = ResultPaths(config.evaluation_dir, config.exp_name, config.communication_rounds).rouge(name)
    predictions = read_predictions(source, config.prediction_key)
    targets = read_rows(config.target_file, output_key=config.target_key, rules=config.read_rules)
    check_categories([row.category for row in targets], str(config.target_file))
    pairs = pair_rows(predictions, targets, predictions_name=str(source), targets_name=str(config.target_file))

    result = _score(pairs, f"scoring {config.exp_name}/{config.communication_rounds}/{name}")
    result["fedlora"]["predictions_sha256"] = sha256_of(source)
    result["fedlora"]["targets_sha256"] = sha256_of(config.target_file)
    write_json(result_file, result)
    return RougeScores(result, result_file)


def _score(pairs: list[tuple[Row, Row]], label: str) -> dict[str, Any]:
    scorer = AnswerScorer()
    scores = []
    with Progress(label, len(pairs)) as progress:
        for prediction, target in pairs:
            scores.append(scorer.score(prediction.output, target.output, target.category))
            progress.advance()
    unseen = sum(score.unseen_by_rouge for score in scores)
    if unseen:
        say(f"note: {unseen} right answers hold no letter a-z and no digit, and count 0 in ROUGE (not in exact match)")
    return summarise(scores)


def _cells(category: str, num_rows: int, exact: float, means: Sequence[float]) -> list[str]:
    return [category, str(num_rows), f"{exact:.3f}", *(f"{value:.4f}" for value in means)]
