"""Gains on each client's own test rows in a comparison: by hand, over seeds, and of records without rows."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fedlora.comparing.row_gains import gather_row_gains, read_gains, row_gain_remarks
from fedlora.evaluation.intervals import mean_interval, seed_interval

PLAN: dict[str, Any] = {"silos": {"grouped_by": "client", "names": {"0": "north"}, "rows": {"north": [9, 1, 4]}}}
PROMPTS = ["a", "b", "c", "d"]
BASE = [3.0, 4.0, 5.0, 6.0]
ALONE = [2.0, 2.5, 4.0, 3.0]


def scored(seed: int, sums: list[float] | None, *, own: list[float] | None = None, **more: Any) -> dict[str, Any]:
    rows = {"tokens": {"0": [2, 2, 2, 2]}, "prompts": {"0": PROMPTS}, **more}
    rows |= {"global": {"0": sums} if sums else None, "clients": {"0": own} if own else {}}
    test = {"global": {"north": 1.0} if sums else None, "clients": {"0": {"north": 1.0}} if own else {}}
    return {"seed": seed, "run": f"run-{seed}", "state": "trained", "test": test, "own_rows": rows}


def cell(method: str, runs: list[dict[str, Any]], mode: str = "homo") -> dict[str, Any]:
    return {"method": method, "mode": mode, "runs": runs, "base": [scored(run["seed"], BASE) for run in runs]}


def less(losses: list[float], by: list[float]) -> list[float]:
    return [loss - one for loss, one in zip(losses, by, strict=True)]


def alone(*seeds: int) -> dict[str, Any]:
    return cell("none", [scored(seed, None, own=ALONE) for seed in seeds], "none")


def test_a_gain_is_paired_row_by_row_over_the_client_alone():
    apart = [0.5, 0.1, 1.5, -0.3]
    (found,) = gather_row_gains(PLAN, "", [cell("homo", [scored(1, less(ALONE, apart))]), alone(1)])
    assert (found["client"], found["num_rows"], found["reference"]) == ("north", 4, "none")
    assert set(found["scores"]["loss"]) == {"base", "homo", "none"}
    assert found["scores"]["loss"]["base"]["mean"] == pytest.approx(18 / 8)
    gain = found["gains"]["loss"]["homo"]
    assert gain["mean"] == pytest.approx(sum(apart) / 8)
    assert gain["interval"] == pytest.approx(mean_interval([one / 2 for one in apart], PROMPTS))


def test_several_seeds_add_the_luck_of_training_to_the_choice_of_rows():
    apart = {1: [0.5, 0.1, 1.5, 0.3], 2: [0.7, 0.3, 1.7, 0.5]}
    runs = [scored(seed, less(ALONE, one)) for seed, one in apart.items()]
    (found,) = gather_row_gains(PLAN, "", [cell("homo", runs), alone(1, 2)])
    gain = found["gains"]["loss"]["homo"]
    rows = mean_interval([(one + other) / 4 for one, other in zip(*apart.values(), strict=True)], PROMPTS)
    seeds = seed_interval([sum(one) / 8 for one in apart.values()])
    assert seeds is not None
    mean = gain["mean"]
    assert mean == pytest.approx(0.35)
    assert mean - gain["interval"][0] == pytest.approx(math.hypot(mean - rows[0], mean - seeds[0]), abs=1e-6)
    assert gain["interval"][1] - mean == pytest.approx(math.hypot(rows[1] - mean, seeds[1] - mean), abs=1e-6)


def test_seeds_that_one_model_lacks_are_in_no_gain():
    runs = [scored(1, less(ALONE, [0.5, 0.5, 0.5, 0.5])), scored(2, less(ALONE, [9.0, 9.0, 9.0, 9.0]))]
    (found,) = gather_row_gains(PLAN, "", [cell("homo", runs), alone(1)])
    assert found["gains"]["loss"]["homo"]["mean"] == pytest.approx(0.25)


def test_global_and_personal_models_are_two_columns():
    runs = [scored(1, less(ALONE, [0.2] * 4), own=less(ALONE, [0.4] * 4))]
    (found,) = gather_row_gains(PLAN, "", [cell("ditto", runs, "ditto"), alone(1)])
    gains = {label: one["mean"] for label, one in found["gains"]["loss"].items()}
    assert gains == pytest.approx({"ditto (global)": 0.1, "ditto (personal)": 0.2})


def test_records_read_back_give_the_same_gains():
    records = gather_row_gains(PLAN, "", [cell("homo", [scored(1, less(ALONE, [0.5, 0.1, 1.5, 0.3]))]), alone(1)])
    (client,) = read_gains(records)
    assert client.record() == records[0]
    assert client.gains["loss"]["homo"].is_clear


def test_records_of_an_earlier_version_are_left_out_and_the_command_is_named():
    run = scored(1, BASE)
    del run["own_rows"]
    group = [cell("homo", [run]), alone(1)]
    gains = gather_row_gains(PLAN, "", group)
    assert gains == []
    (remark,) = row_gain_remarks(PLAN, group, gains)
    assert "scores/run-1.json" in remark
    assert "fedlora compare" in remark


def test_one_prompt_gives_no_interval_and_therefore_no_gain():
    same: dict[str, Any] = {"prompts": {"0": ["a"] * 4}}
    runs = {"homo": [scored(1, ALONE, **same)], "none": [scored(1, None, own=ALONE, **same)]}
    group = [cell("homo", runs["homo"]), cell("none", runs["none"], "none")]
    for one in group:
        one["base"] = [scored(1, BASE, **same)]
    assert gather_row_gains(PLAN, "", group) == []
    assert "north" in row_gain_remarks(PLAN, group, [])[0]


def test_rows_that_belong_to_no_client_have_no_gains():
    shared = {"silos": {**PLAN["silos"], "grouped_by": "category"}}
    group = [cell("homo", [scored(1, BASE)]), alone(1)]
    assert gather_row_gains(shared, "", group) == [] == row_gain_remarks(shared, group, [])
    assert gather_row_gains({}, "", group) == []
