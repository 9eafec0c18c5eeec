"""Which clients gain from joining, under every method, and what `seq` forgets between rounds.

A client's column of categories is shown where it is the same client under every seed (the same mix of rows); where the
deal differs from seed to seed, clients of one number have nothing in common, and only counts are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.evaluation.own_loss import own_loss, own_losses
from fedlora.methods.table import find_recorded

Record = Mapping[str, Any]


def client_table(setting: str, group: Sequence[Record]) -> dict[str, Any] | None:
    """Per method: each client's own loss, its loss per category less that of the client alone, who gains and who loses.

    None where no client alone (`none`) was measured. Everything is a mean over the seeds at which both were measured.
    """
    alone = next((cell for cell in group if not find_recorded(cell["mode"]).combines and sound_runs(cell)), None)
    if alone is None:
        return None
    by_seed = {record["seed"]: record for record in sound_runs(alone)}
    methods = {}
    for cell in group:
        for label, records in models_of(cell).items():
            pairs = [(record, by_seed[record["seed"]]) for record in records if record["seed"] in by_seed]
            if pairs:
                methods[label] = _compare_clients(pairs)
    base = {record["seed"]: score for record, score in zip(sound_runs(alone), alone["base"], strict=True)}
    scored = [({**base[seed], "shares": record["shares"]}, record) for seed, record in by_seed.items()]
    shares = [record["shares"] for record in by_seed.values()]
    return {
        "setting": setting,
        "same_clients": all(mix == shares[0] for mix in shares),
        "shares": shares[0],
        "methods": {"base": _compare_clients(scored), **methods},
    }


def models_of(cell: Record) -> dict[str, list[Record]]:
    """Label -> the cell's runs, scored under one kind of model: two labels where each has a global model and personal
    ones."""
    runs = sound_runs(cell)
    if not runs or not all(run["test"]["global"] and run["test"]["clients"] for run in runs):
        return {cell["method"]: runs}
    return {
        f"{cell['method']} (global)": [_only(run, clients={}) for run in runs],
        f"{cell['method']} (personal)": [_only(run, **{"global": None}) for run in runs],
    }


def _only(run: Record, **left_out: Any) -> Record:
    scores = {name: {**run[name], **left_out} for name in ("test", "answers", "own_rows") if name in run}
    return {**run, **scores}


def _compare_clients(pairs: Sequence[tuple[Record, Record]]) -> dict[str, Any]:
    """Of runs and the runs of the clients alone, seed by seed."""
    own: dict[str, list[float]] = {}
    gains: dict[str, list[float]] = {}
    cells: dict[str, dict[str, list[float]]] = {}
    num_gaining, worst = [], []
    for record, alone in pairs:
        losses = own_losses(record["test"], record["shares"])
        then = own_losses(alone["test"], alone["shares"])
        for client in losses.keys() & then.keys():
            own.setdefault(client, []).append(losses[client])
            gains.setdefault(client, []).append(then[client] - losses[client])
            now_by_category = record["test"]["clients"].get(client) or record["test"]["global"]
            for category, value in alone["test"]["clients"][client].items():
                cells.setdefault(client, {}).setdefault(category, []).append(now_by_category[category] - value)
        num_gaining.append(sum(then[client] > losses[client] for client in losses.keys() & then.keys()))
        worst.append(max(losses, key=lambda client: losses[client]))
    order = sorted(own, key=int)
    return {
        "own": {client: _mean(own[client]) for client in order},
        "gain": {client: _mean(gains[client]) for client in order},
        "less_than_alone": {c: {name: _mean(v) for name, v in sorted(cells[c].items())} for c in order},
        "clients_that_gain": num_gaining,
        "clients": len(order),
        "worst_client": worst,
        "n": len(pairs),
    }


def forgetting(cell: Record) -> dict[str, Any] | None:
    """Every client's own loss along the runs of a method, hop by hop; None where no curve was measured.

    `forgotten` is, per client and averaged over seeds, how far the last loss lies above the best one on the way.
    """
    runs = [record for record in sound_runs(cell) if record.get("curve")]
    if not runs:
        return None
    curves = {}
    forgotten: dict[str, list[float]] = {}
    for record in runs:
        points = [
            {
                "round": hop["round"],
                "client": hop["client"],
                "steps": hop["steps"],
                "own": {c: own_loss(hop["losses"], mix) for c, mix in sorted(record["shares"].items(), key=_number)},
            }
            for hop in record["curve"]
        ]
        curves[str(record["seed"])] = points
        for client in points[0]["own"]:
            values = [point["own"][client] for point in points]
            forgotten.setdefault(client, []).append(values[-1] - min(values))
    means = {client: _mean(values) for client, values in forgotten.items()}
    return {
        "setting": cell["setting"],
        "method": cell["method"],
        "seeds": curves,
        "forgotten": means,
        "mean_forgotten": _mean(means.values()),
        "swing": _mean([_swing(points) for points in curves.values()]),
    }


def _swing(points: Sequence[Record]) -> float:
    """How far a client's loss goes up and down inside a round, in the second half of the run: the size of the
    saw-tooth.

    The mean over clients and rounds of the largest less the smallest loss after the hops of a round; 0 with one hop.
    """
    late = points[-1]["round"] // 2
    rounds = sorted({point["round"] for point in points if point["round"] > late})
    spans = []
    for number in rounds:
        inside = [point["own"] for point in points if point["round"] == number]
        spans += [max(own[c] for own in inside) - min(own[c] for own in inside) for c in inside[0]]
    return _mean(spans)


def sound_runs(cell: Record) -> list[Record]:
    """The runs of a cell that did not fail."""
    return [record for record in cell["runs"] if record["state"] != "failed"]


def _number(item: tuple[str, Any]) -> int:
    return int(item[0])


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)
