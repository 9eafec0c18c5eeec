"""The `evaluate_rouge` stage: ROUGE and exact match of one prediction file.

Predictions and test rows are paired by content, so the order of the lines means nothing, and a file that
belongs to another test set is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlora.config.evaluate import EvaluateRougeConfig
from fedlora.console import Progress, printable, say
from fedlora.data.records import read_rows
from fedlora.evaluation.matching import pair_rows, read_predictions
from fedlora.evaluation.rouge import METRICS, AnswerScorer, check_categories, summarise
from fedlora.files import sha256_of, write_json
from fedlora.paths import OutputName, ResultPaths
from fedlora.types import Row


def run(config: EvaluateRougeConfig) -> dict[str, Any]:
    """Score the predictions that `config` names, write the result file, print its table; returns the result.

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
    print(_table(result, result_file))
    return result


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


def _table(result: dict[str, Any], path: Path) -> str:
    ours = result["fedlora"]
    exact, counts = ours["exact_match"], ours["num_samples"]
    lines = [
        [printable(category).replace("\n", " "), counts[category], exact["categories"][category], *means]
        for category, means in ((key, [result[key][metric] for metric in METRICS]) for key in counts)
    ]
    overall = [result["overall"][f"avg_{metric}"] for metric in METRICS]
    lines.append(["overall", sum(counts.values()), exact["macro"], *overall])
    width = max(8, *(len(line[0]) for line in lines))
    head = f"{'category':<{width}}  {'rows':>6}  {'exact':>6}" + "".join(f"  {metric:>9}" for metric in METRICS)
    body = [
        f"{label:<{width}}  {rows:>6}  {share:>6.3f}" + "".join(f"  {value:>9.4f}" for value in means)
        for label, rows, share, *means in lines
    ]
    return "\n".join([head, *body[:-1], "-" * len(head), body[-1], str(path)])
