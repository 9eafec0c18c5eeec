"""The commands that make a report again, and those that fill what it lacks."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from fedlora.config.command_line import command_line
from fedlora.config.compare import CompareConfig
from fedlora.config.evaluate import ReportConfig
from fedlora.config.plan import PlanConfig
from fedlora.config.train import TrainConfig
from fedlora.reporting.experiments import NO_PREDICTIONS, Experiment, answer_commands
from fedlora.reporting.page.blocks import Commands

DATA = Path("DATA")
"""Stands for the folder of the clients' files: no record of a run says where it lay."""
MADE_BY = "What makes all this again. DATA is the folder of the clients' files, whose SHA-256 the data's table has:"


def commands_of(config: ReportConfig, experiments: Sequence[Experiment]) -> Commands:
    """Train, answer, score and report, run by run."""
    lines = []
    for one in experiments:
        lines += [f"# {one.name}", train_command(config, one), *_answering(config, one), ""]
    fields = ("exp_names", "communication_rounds", "model_dir", "prediction_dir", "rouge_dir", "llm_dir", "tasks_dir")
    asked = {name: getattr(config, name) for name in (*fields, "report_dir", "report_name")}
    asked["communication_rounds"] = experiments[0].round_number
    lines += ["# this report", command_line("report", ReportConfig, asked, positional="exp_names")]
    return Commands(MADE_BY, lines)


def train_command(config: ReportConfig, experiment: Experiment) -> str:
    """The call of `train` that run.json records; options of methods from outside are given with --set."""
    known = TrainConfig.flat_fields()
    recorded = {name: tuple(v) if isinstance(v, list) else v for name, v in experiment.run["config"].items()}
    values = {name: value for name, value in recorded.items() if name in known}
    more = [f"--set {shlex.quote(f'{name}={value}')}" for name, value in recorded.items() if name not in known]
    given = {**values, "data_path": DATA, "model_dir": config.model_dir}
    return " ".join([command_line("train", TrainConfig, given), *more])


def round_commands(config: ReportConfig, experiments: Sequence[Experiment]) -> list[str]:
    """How the round before the compared one gets scores; nothing after one round."""
    one = next((each for each in experiments if each.has_global_adapter and each.round_number > 1), None)
    test = _test_path(experiments)
    if one is None or test is None:
        return []
    text = "\n".join(answer_commands(config, one, ["global"], NO_PREDICTIONS, test))
    return text.replace(f"--round {one.round_number}", f"--round {one.round_number - 1}").split("\n")


def plan_command(experiment: Experiment) -> str:
    """How duplicates within and across the clients' files are found."""
    shown = {
        "federation_mode": experiment.mode,
        "base_model": experiment.run["base_model"],
        "data_path": DATA,
        "probe": False,
    }
    return command_line("plan", PlanConfig, shown)


def forgetting_command(chains: Sequence[Experiment]) -> str:
    """How the losses of clients are measured hop by hop, with as many steps as the first of these runs took."""
    one = chains[0]
    rate = one.run["config"].get("local_learning_rate")
    asked = {
        "name": "forgetting",
        "modes": (one.mode,),
        "curves": (one.mode,),
        "data_path": DATA,
        "budget_steps": max(1, sum(row["num_steps"] for row in one.client_rows)),
        "learning_rates": (rate,) if rate else None,
        "train": {"base_model": one.run["base_model"]},
    }
    return command_line("compare", CompareConfig, asked)


def _answering(config: ReportConfig, experiment: Experiment) -> tuple[str, ...]:
    names = [name for name, answers in experiment.answers.items() if answers.rouge is not None]
    if not names:
        return ()
    return answer_commands(config, experiment, names, NO_PREDICTIONS, _test_path([experiment]))


def _test_path(experiments: Sequence[Experiment]) -> Path | None:
    metas = [answers.meta for one in experiments for answers in one.answers.values() if answers.meta]
    return next((Path(meta["test_path"]) for meta in metas if "test_path" in meta), None)
