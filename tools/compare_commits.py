"""Train every method with an old commit and with the working tree, and compare what the two leave.

Adapters, uploads, moments and state must be equal byte for byte; metrics, run.json and the other records in their
values, but for the clock and hashes of the configuration. What one side refuses, the other must refuse with the same
exit code. With `--resume` the working tree continues, verifies, generates from and reports old runs instead.

Bytes depend on the processor, so both sides train here and now, and the test suite does not run this.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

from fork_server import Ending
from tiny_run import MODES
from two_commits import TwoCommits, compare_folders, compare_runs, open_two_commits

from fedlora.methods.table import METHODS

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"optimizer_state": "reset"},
    "keep": {"optimizer_state": "keep"},
    "sgd": {"optimizer_state": "reset", "local_optimizer": "sgd"},
    "pair": {"optimizer_state": "reset", "client_selection_frac": 0.3},
    "norm": {"optimizer_state": "reset", "max_update_norm": 0.1},
    "ratio": {"optimizer_state": "reset", "max_update_norm_ratio": 1.0},
    "weight": {"optimizer_state": "reset", "max_client_weight": 0.25},
    "ranks": {"optimizer_state": "reset", "client_ranks": "4,2,1,3,4,2"},
    "client_privacy": {"optimizer_state": "reset", "dp_noise_multiplier": 0.5, "dp_clip": 0.1},
    "example_privacy": {"optimizer_state": "reset", "dp_example_noise_multiplier": 0.5, "dp_example_clip": 0.1},
}
STATED: dict[str, dict[str, Any]] = {"trimmed_mean": {"trimmed_share": 0.2}, "multi_krum": {"krum_selected": 3}}
"""Hyper-parameters that both sides are given, so that another default is not taken for other arithmetic."""
RESUMED = ("plain", "keep", "pair", "client_privacy", "example_privacy")
"""The features with which runs are resumed: those that leave something to find again, and the smallest cohort."""
TAKEN_OVER = (*MODES, "finetune", "median", "trimmed_mean", "multi_krum")
"""Every kind of memory, a method bound to its number of rounds, and those that depend on the size of a cohort."""

Found = list[str] | None
"""What differs; None where both sides refuse."""


def main() -> int:
    """Print a line a method; 1 when something differs that `--except` does not name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--old", required=True, help="commit to compare with")
    parser.add_argument("--methods", default="", help="comma separated (default: all; a dozen with --resume)")
    parser.add_argument(
        "--features", default=",".join(FEATURES), help="combined with each method (default: %(default)s)"
    )
    parser.add_argument(
        "--except",
        dest="expected",
        default="",
        help="what may differ: METHOD, METHOD/FEATURE or METHOD/FEATURE/DIFFERENCE",
    )
    parser.add_argument("--dropout", type=float, default=0.0, help="lora_dropout of every run (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="continue runs of the old commit with the working tree")
    options = parser.parse_args()
    methods, features, expected = (words.split(",") for words in (options.methods, options.features, options.expected))
    if not options.methods:
        methods = list(TAKEN_OVER if options.resume else METHODS)
    if options.resume:
        features = [name for name in features if name in RESUMED]
    is_good = True
    with open_two_commits(options.old, dropout=options.dropout) as both:
        compare = compare_resumed if options.resume else compare_trained
        for method in methods:
            found = {feature: compare(both, method, feature) for feature in features}
            is_good &= show(method, found, expected)
    return 0 if is_good else 1


def compare_trained(both: TwoCommits, method: str, feature: str) -> Found:
    """Train the same run on both sides."""
    old, new = (side.folder / f"{method}-{feature}" for side in (both.old, both.new))
    changes = {**FEATURES[feature], **STATED.get(method, {})}
    was = both.old.run("train", both.training(method, old, **changes))
    now = both.new.run("train", both.training(method, new, **changes))
    if was.code != now.code:
        return [f"{_said('train', now)}; ended with {was.code}"]
    if was.code:
        return None
    found = compare_runs(old / "run", new / "run")
    for folder in (old, new):
        shutil.rmtree(folder)
    return found


def compare_resumed(both: TwoCommits, method: str, feature: str) -> Found:
    """Let the new side take over runs of the old one: finished, stopped in the second round, and after it."""
    whole, stopped, short = (both.old.folder / f"{method}-{feature}" / name for name in ("whole", "stopped", "short"))
    flags = FEATURES[feature]
    ending = both.old.run("train", both.training(method, whole, **flags))
    if ending.code:
        return None
    trap = {"action": "kill", "point": ending.points // 2}
    killed = both.old.run("train", both.training(method, stopped, **flags), trap=trap)
    both.old.run("train", both.training(method, short, **flags, num_communication_rounds=2))
    failed, found = [] if killed.code == -signal.SIGKILL else [_said("train", killed)], []
    for models in (stopped, short):
        options = both.training(method, models, **flags)
        again = both.new.run("train", options)
        # the number of rounds is part of some methods
        if again.code and not (models == short and both.old.run("train", options).code == again.code):
            failed.append(_said("train", again))
        elif not again.code:
            found += compare_runs(whole / "run", models / "run")
    answers = [side.folder / f"{method}-{feature}" / "answers" for side in (both.old, both.new)]
    both.old.run("generate", both.answering(whole, answers[0]))
    for command, options in (
        ("generate", both.answering(whole, answers[1])),
        ("report", {"exp_names": "run", "model_dir": whole, "report_dir": answers[1], "communication_rounds": 3}),
        *(("verify run", {"model_dir": models}) for models in (whole, stopped, short)),
    ):
        again = both.new.run(command, options)
        failed += [_said(command, again)] if again.code else []
    found += compare_folders(*answers)
    for folder in {models.parent for models in (whole, *answers)}:
        shutil.rmtree(folder)
    return failed + found


def show(method: str, found: Mapping[str, Found], expected: Sequence[str]) -> bool:
    """Print the line of a method; whether nothing differs but what is expected to."""
    bad = {feature: differences for feature, differences in found.items() if differences}
    allowed = {
        feature
        for feature, differences in bad.items()
        if all(_is_expected(f"{method}/{feature}/{what}", expected) for what in differences)
    }
    refused = [feature for feature, differences in found.items() if differences is None]
    parts = [f"{len(found) - len(bad) - len(refused)} equal"]
    parts += [f"both refuse {', '.join(refused)}"] if refused else []
    for feature, differences in bad.items():
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        verdict = "differs as expected" if feature in allowed else "DIFFERS"
        parts.append(f"{feature} {verdict}: {', '.join(differences[:3])}{more}")
    print(f"{method:<17} {'; '.join(parts)}", flush=True)
    return bad.keys() <= allowed


def _is_expected(difference: str, expected: Sequence[str]) -> bool:
    return any(fnmatch(difference, pattern) or fnmatch(difference, f"{pattern}/*") for pattern in expected)


def _said(command: str, ending: Ending) -> str:
    return f"{command} ends with {ending.code}: {' '.join(ending.said.split())[-300:]}"


if __name__ == "__main__":
    sys.exit(main())
