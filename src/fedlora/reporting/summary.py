"""The rows of a report: what every adapter of a set of experiments can do, and what it cost.

"own" is exact match on a client's test rows, or weighed by its share of training rows per category; a model that
everyone shares gets the mean of that over all clients. A number that was not measured is None, never 0, and a
mean is there only when all its parts are. The costs in a `mean` row are totals over its clients, so that
they compare with the totals of homo, seq and pooled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from fedlora.config.evaluate import ReportConfig
from fedlora.data.client_names import name_of_file
from fedlora.llm.base_identity import BaseIdentity
from fedlora.plain_text import counted
from fedlora.reporting.curves import last_loss, last_personal_loss
from fedlora.reporting.experiments import NEVER_TRAINED, STAYS_ON_NODE, Experiment, answer_commands, runs_command
from fedlora.reporting.model_scores import mean_of, scores_of

COSTS_ARE_TOTALS = " (costs: total)"
"""Ends the label of a mean row, whose scores are means and whose costs are sums."""


@dataclass(frozen=True)
class Costs:
    """Sums over the rounds 1 up to the compared one; bytes of adapters up and down, seconds of training."""

    steps: int
    tokens: int
    bytes_sent: int
    seconds: float


@dataclass(frozen=True)
class ModelRow:
    """One model of the comparison; shares and ROUGE-L in 0..1, losses in nats per response token."""

    label: str
    experiment: str
    mode: str
    subject: Literal["base", "client", "mean", "global", "absent"]
    client_id: int | None = None
    client_name: str = ""
    """What tables call the client."""
    own: float | None = None
    all: float | None = None
    all_interval: tuple[float, float] | None = None
    rouge_l: float | None = None
    f1: float | None = None
    chrf: float | None = None
    test_loss: float | None = None
    """Of the test rows, where `loss` measured it."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """95 % interval of `rouge_l`, `f1`, `chrf` and `test_loss`, where there is one."""
    held_out_loss: float | None = None
    costs: Costs | None = None
    categories: Mapping[str, float] = field(default_factory=dict)
    """Exact match per test category; empty when the answers were not scored."""
    category_intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """95 % interval of each, over the choice of test rows; a mean over clients has none."""
    own_categories: tuple[str, ...] = ()
    """What a single client was trained on."""

    def record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Gap:
    """Why cells are empty, and the commands that fill them where these are known."""

    text: str
    commands: tuple[str, ...]

    def remedy(self, shown: Callable[[str], str] = str) -> str:
        """The commands, each as `shown` writes it, to follow the text; nothing where none is known."""
        return f"; run {', then '.join(map(shown, self.commands))}" if self.commands else ""


def make_rows(experiments: Sequence[Experiment], absent: Sequence[str]) -> list[ModelRow]:
    """All rows in the report's order: base, none with its clients and mean, seq, homo, others, pooled.

    Clients have rows wherever a method leaves them models of their own, after the global adapter if it has one. Needs
    at least one experiment; the `absent` ones get a row without numbers.
    """
    titles = experiment_titles(experiments)
    rows = [_base_row(experiments)]
    for experiment in in_report_order(experiments):
        title = titles[experiment.name]
        if experiment.has_global_adapter:
            rows.append(_global_row(experiment, global_title(experiment, title)))
        if experiment.has_personal_models:
            title = personal_title(experiment, title)
            clients = [_client_row(experiment, client, title) for client in experiment.clients]
            rows += [*clients, _mean_row(experiment, clients, title)]
    return [*rows, *(ModelRow(name, name, "", "absent") for name in absent)]


def find_gaps(
    config: ReportConfig, experiments: Sequence[Experiment], absent: Sequence[str], rows: Sequence[ModelRow]
) -> list[Gap]:
    """One gap for each thing that is missing; models of one experiment that miss the same share one."""
    gaps = [Gap(f"{name}: no run of that name", (runs_command(config),)) for name in absent]
    groups: defaultdict[tuple[str, str], list[ModelRow]] = defaultdict(list)
    known = {experiment.name: experiment for experiment in experiments}
    metas = [answers.meta for experiment in experiments for answers in experiment.answers.values() if answers.meta]
    test_path = next((Path(meta["test_path"]) for meta in metas if "test_path" in meta), None)
    for row in rows:
        if row.subject not in ("mean", "absent") and (
            missing := known[row.experiment].answers[_output_name(row)].missing
        ):
            groups[row.experiment, missing].append(row)
    for (name, missing), members in groups.items():
        text = f"{', '.join(row.label for row in members)}: {missing}"
        outputs = list(map(_output_name, members))
        gaps.append(Gap(text, answer_commands(config, known[name], outputs, missing, test_path)))
    for experiment in experiments:
        done, rounds = experiment.rounds_done, experiment.round_number
        if done < rounds:
            text = (
                f"trained {done} of {counted(rounds, 'round')}; its train command with --rounds {rounds} "
                f"trains the others"
            )
            gaps.append(Gap(f"{experiment.name}: {text}", ()))
        elif any(_lacks_loss(experiment, row) for row in rows):
            text = "no held-out loss: no rows were held out; fedlora loss measures that of stored adapters"
            gaps.append(Gap(f"{experiment.name}: {text}", ()))
    return gaps


def experiment_titles(experiments: Iterable[Experiment]) -> dict[str, str]:
    """The title of each experiment: its method, or its name where several have that method."""
    every = list(experiments)
    modes = [experiment.mode for experiment in every]
    return {one.name: one.mode if modes.count(one.mode) == 1 else one.name for one in every}


def global_title(experiment: Experiment, title: str) -> str:
    """What the global adapter of an experiment is called."""
    return f"{title} (global)" if experiment.has_personal_models else title


def personal_title(experiment: Experiment, title: str) -> str:
    """What the models of an experiment's clients are called together."""
    return f"{title} (personal)" if experiment.has_global_adapter else title


def in_report_order(experiments: Iterable[Experiment]) -> list[Experiment]:
    """none, seq, homo, other methods, pooled; experiments of one method stay in the given order."""
    return sorted(experiments, key=lambda experiment: experiment.method.place)


def base_owner(experiments: Sequence[Experiment]) -> Experiment:
    """The experiment whose base-model scores the table shows: the first that has any, else the first."""
    scored = [experiment for experiment in experiments if experiment.answers["base"].rouge is not None]
    return (scored or list(experiments))[0]


def base_names(experiments: Sequence[Experiment]) -> dict[str, str]:
    """Experiment -> what its base model is called: two have one name where their bases are the same by identity, or by
    the recorded name where some run has no identity."""
    names = {one.name: one.run["base_model"] for one in experiments}
    read = {one.name: BaseIdentity.from_record(one.run.get("base_identity")) for one in experiments}
    known = {name: identity for name, identity in read.items() if identity is not None}
    if len(known) < len(names):
        return names
    first = {
        name: next(other for other in known if not known[other].differences(identity))
        for name, identity in known.items()
    }
    return {name: f"{names[other]} {known[other]}" for name, other in first.items()}


def _lacks_loss(experiment: Experiment, row: ModelRow) -> bool:
    """Whether a model of the experiment that is here has no held-out loss."""
    if row.experiment != experiment.name or row.subject in ("mean", "absent") or row.held_out_loss is not None:
        return False
    return experiment.answers[_output_name(row)].missing not in (NEVER_TRAINED, STAYS_ON_NODE)


def _output_name(row: ModelRow) -> str:
    return f"client_{row.client_id}" if row.subject == "client" else row.subject


def _base_row(experiments: Sequence[Experiment]) -> ModelRow:
    owner = base_owner(experiments)
    bases = base_names(experiments)
    same_base = [owner, *(one for one in experiments if bases[one.name] == bases[owner.name])]
    losses = [row["val_loss"] for one in same_base for row in one.round_rows if row["round"] == 0 and "val_loss" in row]
    loss = losses[0] if losses else None
    scores = scores_of(owner, "base", owner.clients)
    return ModelRow("base", owner.name, "base", "base", held_out_loss=loss, costs=Costs(0, 0, 0, 0.0), **scores)


def _global_row(experiment: Experiment, title: str) -> ModelRow:
    scores = scores_of(experiment, "global", experiment.clients)
    loss = last_loss(experiment, experiment.round_rows)
    costs = _costs(experiment, experiment.client_rows)
    return ModelRow(title, experiment.name, experiment.mode, "global", held_out_loss=loss, costs=costs, **scores)


def _client_row(experiment: Experiment, client: Mapping[str, Any], title: str) -> ModelRow:
    client_id = client["client_id"]
    name = experiment.shown(client_id)
    categories = tuple(sorted(client["categories"]))
    label = f"{title} {name}" + (f" ({categories[0]})" if len(categories) == 1 and categories[0] else "")
    rouge = experiment.answers[f"client_{client_id}"].rouge
    if rouge is not None and rouge["fedlora"].get("grouped_by") == "client":
        categories = (name_of_file(client["file"]),)
    rows = [row for row in experiment.client_rows if row["client_id"] == client_id]
    return ModelRow(
        label,
        experiment.name,
        experiment.mode,
        "client",
        client_id,
        client_name=name,
        held_out_loss=last_personal_loss(experiment, rows),
        costs=_costs(experiment, rows),
        own_categories=categories,
        **scores_of(experiment, f"client_{client_id}", [client]),
    )


def _mean_row(experiment: Experiment, clients: Sequence[ModelRow], title: str) -> ModelRow:
    names = set(clients[0].categories) if all(row.categories for row in clients) else set()
    return ModelRow(
        f"{title} mean of {len(clients)}{COSTS_ARE_TOTALS}",
        experiment.name,
        experiment.mode,
        "mean",
        own=mean_of(row.own for row in clients),
        all=mean_of(row.all for row in clients),
        rouge_l=mean_of(row.rouge_l for row in clients),
        f1=mean_of(row.f1 for row in clients),
        chrf=mean_of(row.chrf for row in clients),
        test_loss=mean_of(row.test_loss for row in clients),
        held_out_loss=mean_of(row.held_out_loss for row in clients),
        costs=_costs(experiment, experiment.client_rows),
        categories={name: fmean(row.categories[name] for row in clients) for name in sorted(names)},
    )


def _costs(experiment: Experiment, rows: Sequence[Mapping[str, Any]]) -> Costs | None:
    if experiment.rounds_done < experiment.round_number:
        return None
    return Costs(
        steps=sum(row["num_steps"] for row in rows),
        tokens=sum(row["num_tokens"] for row in rows),
        bytes_sent=sum(row["bytes_down"] + row["bytes_up"] for row in rows),
        seconds=sum(row["seconds"] for row in rows),
    )
