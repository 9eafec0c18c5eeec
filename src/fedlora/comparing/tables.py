"""A comparison as numbers: one row per setting and method, with the mean over seeds and its interval.

What failed stays visible: a row says of how many seeds it is the mean and why others are missing, and a method that
could not run at all is a row without numbers. Differences are paired: seed by seed against the first method of the
same setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.comparing.client_tables import client_table, forgetting, models_of, sound_runs
from fedlora.comparing.row_gains import OWN_ROWS, gather_row_gains, row_gain_remarks
from fedlora.comparing.silo_text import silo_remarks
from fedlora.evaluation.intervals import seed_interval
from fedlora.evaluation.own_loss import own_losses
from fedlora.plain_text import counted

Record = Mapping[str, Any]

METRICS = {
    "loss_own": "held-out loss, own",
    "loss_all": "held-out loss, all",
    "loss_worst": "worst client",
    "exact_own": "exact match, own",
    "rouge_l_own": "ROUGE-L, own",
    "aggregation_error": "aggregation error",
    "epsilon": "epsilon",
    "num_steps": "steps",
    "num_tokens": "tokens",
    "bytes_down": "bytes down",
    "bytes_up": "bytes up",
    "seconds": "seconds",
}
"""What is measured of a run, and its heading."""

MARK = "*"
"""Marks an epsilon that does not include the runs which chose the learning rate."""

PRIVATE = ("dp_noise_multiplier", "dp_example_noise_multiplier")


def gather_comparison(plan: Record, cells: Sequence[Record]) -> dict[str, Any]:
    """The result as JSON values; the same records give the same result."""
    settings = list(dict.fromkeys(cell["setting"] for cell in cells))
    silos = plan.get("silos")
    names = silos["names"] if silos else {}
    rows, clients, curves, sweeps, gains, gaps = [], [], [], [], [], []
    for setting in settings:
        group = [cell for cell in cells if cell["setting"] == setting]
        found = [row for cell in group for row in _rows_of(cell)]
        rows += _with_differences([_base_row(setting, group), *found])
        if table := client_table(setting, group):
            clients.append({**table, "names": names})
        if found_gains := gather_row_gains(plan, setting, group):
            gains.append({"setting": setting, "clients": found_gains})
        gaps += row_gain_remarks(plan, group, found_gains)
        curves += [{**curve, "names": names} for cell in group if (curve := forgetting(cell))]
        sweeps += [
            {"setting": setting, "method": cell["method"], "chosen": cell["learning_rate"], "tried": cell["sweep"]}
            for cell in group
            if cell["sweep"]
        ]
    return {
        "format": 1,
        "name": plan["name"],
        "experiment": plan["config"],
        "settings": settings,
        "rows": rows,
        "clients": clients,
        "curves": curves,
        "sweeps": sweeps,
        "remarks": [*_remarks(plan, cells, sweeps), *gaps],
        **({OWN_ROWS: gains} if gains else {}),
        **({"silos": silos} if silos else {}),
    }


def measure_run(record: Record) -> dict[str, float]:
    """Every metric of one run, of one kind of model (`models_of`)."""
    shares, score = record["shares"], record["test"]
    own = own_losses(score, shares)
    found = {
        "loss_own": _mean(own.values()),
        "loss_all": _mean(_mean(losses.values()) for losses in _models(score)),
        "loss_worst": max(own.values()),
    }
    if "answers" in record:
        answers = record["answers"]
        for name, key in (("exact_own", "exact"), ("rouge_l_own", "rouge_l")):
            found[name] = _mean(own_losses(_only(answers, key), shares).values())
    for name in ("num_steps", "num_tokens", "bytes_down", "bytes_up", "seconds", "aggregation_error", "epsilon"):
        if record.get("spent", {}).get(name) is not None:
            found[name] = record["spent"][name]
    return found


def _rows_of(cell: Record) -> list[dict[str, Any]]:
    """One row, or two where a method has a global model and personal ones."""
    models = models_of(cell)
    shared = {
        "setting": cell["setting"],
        "method": cell["method"],
        "mode": cell["mode"],
        "learning_rate": cell["learning_rate"],
        "rounds": sorted({record["spent"]["rounds"] for record in sound_runs(cell)}),
        "failed": [{"seed": r["seed"], "reason": r["reason"]} for r in cell["runs"] if r["state"] == "failed"],
        "refused": cell.get("refused", ""),
        "tuned_privately": _is_tuned_privately(cell),
    }
    return [
        {
            **shared,
            "label": label,
            "metrics": _metrics({str(record["seed"]): measure_run(record) for record in records}),
        }
        for label, records in models.items()
    ]


def _base_row(setting: str, group: Sequence[Record]) -> dict[str, Any]:
    """The untrained base, scored under the shares of the first method that has runs."""
    cell = next((cell for cell in group if cell["base"]), None)
    found: dict[str, dict[str, float]] = {}
    if cell is not None:
        sound = [record for record in cell["runs"] if record["state"] != "failed"]
        for base, record in zip(cell["base"], sound, strict=True):
            found[str(record["seed"])] = measure_run({**base, "shares": record["shares"]})
    row = {"setting": setting, "method": "base", "mode": "base", "label": "base", "learning_rate": None}
    nothing = {"rounds": [], "failed": [], "refused": "", "tuned_privately": False}
    return {**row, **nothing, "metrics": _metrics(found)}


def _metrics(by_seed: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    found = {}
    for name in METRICS:
        values = {seed: measured[name] for seed, measured in by_seed.items() if name in measured}
        if values:
            found[name] = summarise(values)
    return found


def summarise(values: Mapping[str, float]) -> dict[str, Any]:
    """Mean, interval and number of the values of several seeds."""
    interval = seed_interval(list(values.values()))
    return {
        "n": len(values),
        "mean": _mean(values.values()),
        "low": interval[0] if interval else None,
        "high": interval[1] if interval else None,
        "values": dict(values),
    }


def _with_differences(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to every row how far its own loss lies from that of the first method, seed by seed."""
    reference = next((row for row in rows if row["mode"] != "base"), None)
    if reference is None or "loss_own" not in reference["metrics"]:
        return rows
    then = reference["metrics"]["loss_own"]["values"]
    for row in rows:
        now = row["metrics"].get("loss_own", {"values": {}})["values"]
        paired = {seed: value - then[seed] for seed, value in now.items() if seed in then}
        if row is not reference and paired:
            row["metrics"]["difference"] = {**summarise(paired), "to": reference["label"]}
    return rows


def _remarks(plan: Record, cells: Sequence[Record], sweeps: Sequence[Record]) -> list[str]:
    """The remarks that a reader needs to judge the table."""
    remarks = silo_remarks(plan.get("silos"))
    for cell in cells:
        what = cell["method"] + (f" ({cell['setting']})" if cell["setting"] else "")
        if cell.get("refused"):
            remarks.append(f"{what} has no run: {cell['refused']}")
        for record in cell["runs"]:
            if record["state"] == "failed":
                remarks.append(f"{what}, seed {record['seed']} failed: {record['reason']}")
            elif record["spent"]["quarantined"]:
                remarks.append(
                    f"{what}, seed {record['seed']}: {counted(record['spent']['quarantined'], 'update')} "
                    f"could not be used"
                )
        if _is_tuned_privately(cell):
            remarks.append(
                f"{what}: epsilon{MARK} is that of one run; the learning rate was chosen by private runs with "
                f"{len(cell['sweep'])} rates on the same rows, and what those spent is not in it"
            )
        remarks += _remark_spending(plan, what, cell)
    for sweep in sweeps:
        rates = [entry["learning_rate"] for entry in sweep["tried"]]
        if sweep["chosen"] in (min(rates), max(rates)):
            setting = f" ({sweep['setting']})" if sweep["setting"] else ""
            remarks.append(
                f"{sweep['method']}{setting}: the learning rate {sweep['chosen']:g} is at the edge of those tried"
            )
    if any(_is_private(record) for cell in cells for record in cell["runs"]):
        remarks.append(
            "private runs draw cohorts and noise from a secret and not from the seed: they are paired in data and "
            "adapter only, take the budget on average, and differ when they are repeated"
        )
    return remarks


def _remark_spending(plan: Record, what: str, cell: Record) -> list[str]:
    """Remark on runs that spend less than the budget, because rounds are whole; none spends more."""
    unit = "steps" if plan["config"]["budget_steps"] is not None else "tokens"
    budget = plan["config"][f"budget_{unit}"]
    counted = [record for record in cell["runs"] if record["state"] != "failed" and not _is_private(record)]
    spent = [record["spent"][f"num_{unit}"] for record in counted]
    if spent and min(spent) < 0.9 * budget:
        return [f"{what} spent {min(spent):,} of {budget:,} {unit}: a further round would not have fitted"]
    return []


def _is_private(record: Record) -> bool:
    return any(record.get("config", {}).get(name) is not None for name in PRIVATE)


def _is_tuned_privately(cell: Record) -> bool:
    """Whether the learning rate was chosen among several by runs that spent privacy which no epsilon shows."""
    return len(cell["sweep"]) > 1 and any(_is_private(record) for record in cell["runs"])


def _only(answers: Record, key: str) -> dict[str, Any]:
    """Category -> one of the scores, in the form of losses."""
    pick = {name: {c: v[key] for c, v in found.items()} for name, found in answers["clients"].items()}
    whole = answers["global"]
    return {"global": None if whole is None else {c: v[key] for c, v in whole.items()}, "clients": pick}


def _models(score: Record) -> list[Mapping[str, float]]:
    return list(score["clients"].values()) or [score["global"]]


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)
