"""Configuration of the `score` stage."""

from __future__ import annotations

from fedlora.config.evaluate import EvaluateRougeConfig
from fedlora.config.schema import flag
from fedlora.config.who import Subjects


class ScoreConfig(EvaluateRougeConfig):
    """Score predictions against the test file's answers: exact match, token F1, ROUGE and chrF, each with a 95 %
    interval, and how far models differ on the same rows.

    The result files of evaluate_rouge are written too.
    """

    against_subjects: Subjects = flag(
        None,
        "whose predictions the others are compared with, as in of; all: any two",
        everyday=True,
        if_none="base, where it has predictions",
    )
