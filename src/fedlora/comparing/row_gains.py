"""Who gains by joining, on each client's own test rows: every model's loss and gain, with 95 % intervals.

From the loss of every row, which a comparison keeps where the test rows belong to clients. Models are paired row by row
within a seed; a number is the mean over seeds. One seed leaves the choice of rows: a bootstrap over prompts, in which a
prompt that several seeds test counts once. Of several seeds the luck of training comes on top, as Student's t of the
seeds' numbers. The two distances add up as standard deviations do (Zou, Huang and Zhang, Computational Statistics &
Data Analysis 2009). Where every seed draws other test rows, t has part of their choice already: the interval is then
too wide rather than too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.comparing.client_tables import models_of, sound_runs
from fedlora.evaluation.intervals import bootstrap_weights, percentile_interval, seed_interval
from fedlora.evaluation.score_table import Estimate
from fedlora.methods.table import find_recorded
from fedlora.plain_text import counted
from fedlora.reporting.own_rows import BASE, ClientGains, MeanGain

Record = Mapping[str, Any]
Numbers = NDArray[np.floating]
OWN_ROWS = "own_rows"
"""Key of the losses row by row in what was measured of a run, and of the gains in the result."""
LOSS = "loss"


@dataclass(frozen=True)
class _Model:
    """A label of the table, whether others' rows are in it, and what was measured of it, by seed."""

    label: str
    is_joint: bool
    by_seed: Mapping[int, Record]


def gather_row_gains(plan: Record, setting: str, group: Sequence[Record]) -> list[dict[str, Any]]:
    """One record of `ClientGains` for each client with test rows of its own; none where the rows belong to none."""
    silos = plan.get("silos")
    if not silos or silos["grouped_by"] != "client":
        return []
    models = [one for one in _models(group) if one.by_seed]
    found = (_compare(number, name, models) for number, name in silos["names"].items())
    return [one.record() for one in found if one is not None]


def row_gain_remarks(plan: Record, group: Sequence[Record], gains: Sequence[Record]) -> list[str]:
    """What is missing in the gains, and what fills the gap."""
    silos = plan.get("silos")
    if not silos or silos["grouped_by"] != "client":
        return []
    old = [run["run"] for run in _all_runs(group) if OWN_ROWS not in run]
    remarks = []
    if old:
        remarks.append(
            f"{counted(len(old), 'run')} of an earlier version without the loss of every row are not in the gains on "
            f"own test rows: delete {', '.join(f'scores/{name}.json' for name in old)} and run `fedlora compare` again"
        )
    without = [name for name, rows in silos["rows"].items() if rows[2]]
    without = [name for name in without if name not in {one["client"] for one in gains}]
    if without and not old and _all_runs(group):
        remarks.append(f"no gain on the own test rows of {', '.join(without)}: it takes two different prompts at least")
    return remarks


def read_gains(records: Iterable[Record]) -> list[ClientGains]:
    """`ClientGains` of the records in comparison.json."""

    def estimates(found: Record) -> dict[str, Estimate]:
        return {label: Estimate(one["mean"], tuple(one["interval"])) for label, one in found.get(LOSS, {}).items()}

    return [
        ClientGains(
            one["client"],
            one["num_rows"],
            {LOSS: estimates(one["scores"])},
            one["reference"],
            {LOSS: {label: MeanGain(found) for label, found in estimates(one["gains"]).items()}},
        )
        for one in records
    ]


def _all_runs(group: Sequence[Record]) -> list[Record]:
    return [run for cell in group for run in sound_runs(cell)]


def _models(group: Sequence[Record]) -> list[_Model]:
    """The base, then every method's models."""
    base = {}
    for cell in group:
        base |= {run["seed"]: one for run, one in zip(sound_runs(cell), cell["base"], strict=True) if OWN_ROWS in one}
    found = [_Model(BASE, False, base)]
    for cell in group:
        is_joint = find_recorded(cell["mode"]).combines
        for label, runs in models_of(cell).items():
            found.append(_Model(label, is_joint, {run["seed"]: run for run in runs if OWN_ROWS in run}))
    return found


def _losses(record: Record, client: str) -> Sequence[float] | None:
    """Of the client's rows, under its own adapter where the record has one, else under the global one."""
    own = record[OWN_ROWS]
    return own["clients"].get(client) or (own["global"] or {}).get(client)


def _compare(client: str, name: str, models: Sequence[_Model]) -> ClientGains | None:
    """A client's losses and gains; None without a joint model, without a reference, or with one prompt alone."""
    known = [one for one in models if any(_losses(record, client) for record in one.by_seed.values())]
    references = [one for one in known if not one.is_joint]
    if not references or len(references) == len(known):
        return None
    rows: dict[int, Record] = {
        seed: record[OWN_ROWS] for one in known for seed, record in one.by_seed.items() if _losses(record, client)
    }
    prompts = [prompt for seed in sorted(rows) for prompt in rows[seed]["prompts"][client]]
    if len(set(prompts)) < 2:
        return None
    means = dict(zip((one.label for one in known), _resample(client, rows, prompts, known), strict=True))
    reference = next((one.label for one in references if one.label != BASE), BASE)
    gains = {one.label: means[reference] - means[one.label] for one in known if one.is_joint}
    return ClientGains(
        name,
        len(rows[min(rows)]["prompts"][client]),
        {LOSS: {label: _estimate(found) for label, found in means.items()}},
        reference,
        {LOSS: {label: MeanGain(_estimate(gain)) for label, gain in gains.items() if not np.isnan(gain[0]).all()}},
    )


def _resample(client: str, rows: Mapping[int, Record], prompts: Sequence[str], models: Sequence[_Model]) -> Numbers:
    """Losses per response token (models, 1 + draws, seeds), first of the rows as they are; NaN where a model lacks a
    seed or a resample has no row of it."""
    weights = np.concatenate([np.ones((1, len(prompts))), *bootstrap_weights(prompts)])
    means = np.full((len(models), len(weights), len(rows)), np.nan)
    start = 0
    for place, seed in enumerate(sorted(rows)):
        tokens = np.array(rows[seed]["tokens"][client], dtype=float)
        part = weights[:, start : start + len(tokens)]
        start += len(tokens)
        sizes = part @ tokens
        for number, one in enumerate(models):
            sums = _losses(one.by_seed[seed], client) if seed in one.by_seed else None
            if sums:
                np.divide(part @ np.array(sums), sizes, out=means[number, :, place], where=sizes > 0)
    return means


def _estimate(drawn: Numbers) -> Estimate:
    """The mean over seeds of numbers (1 + draws, seeds), with the interval of both the rows and the seeds."""
    there = ~np.isnan(drawn)
    counts = there.sum(axis=1)
    sums = np.where(there, drawn, 0.0).sum(axis=1)
    means = np.divide(sums, counts, out=np.full(len(drawn), np.nan), where=counts > 0)
    mean = float(means[0])
    low, high = percentile_interval(means[1:])
    if seeds := seed_interval([float(value) for value in drawn[0][there[0]]]):
        low, high = mean - math.hypot(mean - low, mean - seeds[0]), mean + math.hypot(high - mean, seeds[1] - mean)
    return Estimate(round(mean, 9), (round(low, 9), round(high, 9)))
