"""Means, intervals and tables of a comparison."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.comparing.client_tables import forgetting
from fedlora.comparing.comparison_text import comparison_markdown, comparison_parts
from fedlora.comparing.latex import escape_latex, latex_table
from fedlora.comparing.tables import gather_comparison
from fedlora.evaluation.own_loss import mean_own_loss, own_losses

SHARES = {"0": {"a": 1.0}, "1": {"a": 0.25, "b": 0.75}}
PLAN = {"name": "x_1", "config": {"budget_steps": 10, "seeds": [1, 2], "validation_per_cat": 3, "test_per_cat": 4}}


def test_an_own_loss_weighs_categories_as_the_client_s_rows_are():
    score = {"global": {"a": 1.0, "b": 3.0}, "clients": {}}
    assert own_losses(score, SHARES) == {"0": 1.0, "1": 2.5}
    assert mean_own_loss(score, SHARES) == 1.75


def test_a_client_with_an_adapter_of_its_own_is_measured_under_it():
    score = {"global": {"a": 1.0, "b": 3.0}, "clients": {"1": {"a": 0.0, "b": 2.0}}}
    assert own_losses(score, SHARES) == {"0": 1.0, "1": 1.5}


def run_of(seed: int, a: float, b: float, *, clients: bool = False) -> dict[str, Any]:
    losses = {"a": a, "b": b}
    test = {"global": None, "clients": {"0": losses, "1": losses}} if clients else {"global": losses, "clients": {}}
    spent = {"num_steps": 10, "num_tokens": 50, "bytes_down": 2000, "bytes_up": 1000, "seconds": 1.5, "rounds": 2}
    spent |= {"quarantined": 0, "aggregation_error": 0.25}
    return {"state": "trained", "seed": seed, "test": test, "shares": SHARES, "spent": spent}


def cell_of(method: str, runs: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    base = [{"seed": run["seed"], "test": {"global": {"a": 4.0, "b": 4.0}, "clients": {}}} for run in runs]
    sound = [one for one, run in zip(base, runs, strict=True) if run["state"] != "failed"]
    cell = {"setting": "", "values": {}, "method": method, "mode": method, "learning_rate": 1e-3, "sweep": []}
    return {**cell, "runs": runs, "base": sound, **more}


@pytest.fixture
def result() -> dict[str, Any]:
    homo = cell_of("homo", [run_of(1, 1.0, 2.0), run_of(2, 2.0, 2.0)])
    failed = {"state": "failed", "seed": 2, "reason": "a loss of 100 % & more"}
    ffa = cell_of("ffa", [run_of(1, 0.5, 1.0), failed])
    none = cell_of("none", [run_of(1, 1.5, 1.0, clients=True), run_of(2, 1.5, 3.0, clients=True)])
    return gather_comparison(PLAN, [homo, ffa, none])


def test_rows_are_means_over_the_seeds_that_there_are(result):
    rows = {row["label"]: row for row in result["rows"]}
    assert rows["base"]["metrics"]["loss_own"]["mean"] == 4.0
    # seed 1: (1 + 1.75) / 2, seed 2: 2
    assert rows["homo"]["metrics"]["loss_own"]["mean"] == pytest.approx((1.375 + 2.0) / 2)
    assert rows["ffa"]["metrics"]["loss_own"]["n"] == 1
    assert rows["ffa"]["failed"] == [{"seed": 2, "reason": "a loss of 100 % & more"}]
    assert rows["homo"]["metrics"]["loss_worst"]["values"] == {"1": 1.75, "2": 2.0}


def test_differences_are_taken_seed_by_seed_from_the_first_method(result):
    rows = {row["label"]: row for row in result["rows"]}
    assert rows["ffa"]["metrics"]["difference"]["values"] == {"1": pytest.approx(0.6875 - 1.375)}
    assert rows["none"]["metrics"]["difference"]["values"] == {"1": pytest.approx(-0.0625), "2": pytest.approx(0.0625)}
    assert "difference" not in rows["homo"]["metrics"]


def test_the_clients_that_gain_and_the_worst_one_are_named(result):
    (table,) = result["clients"]
    homo = table["methods"]["homo"]
    # client 0 has 1.5 alone: 1.0 and 2.0 with homo; client 1 has 1.125 and 2.625 alone, 1.75 and 2.0 with homo
    assert homo["gain"] == {"0": pytest.approx(0.0), "1": pytest.approx((-0.625 + 0.625) / 2)}
    assert homo["clients_that_gain"] == [1, 1]
    assert homo["worst_client"] == ["1", "0"]
    assert homo["less_than_alone"]["1"] == {"a": pytest.approx(0.0), "b": pytest.approx(0.0)}


def test_what_is_forgotten_is_the_last_loss_less_the_best():
    hops = [(1, 0, 1.0, 5.0), (1, 1, 3.0, 1.0), (2, 0, 1.5, 4.0), (2, 1, 2.5, 0.5)]
    run = run_of(1, 0, 0) | {"shares": {"0": {"a": 1.0}, "1": {"b": 1.0}}}
    run["curve"] = [
        {"round": r, "client": c, "steps": step, "losses": {"a": a, "b": b}} for step, (r, c, a, b) in enumerate(hops)
    ]
    found = forgetting(cell_of("seq", [run]))
    assert found is not None
    assert found["forgotten"] == {"0": 1.5, "1": 0.0}
    # in round 2: client 0 between 1.5 and 2.5, client 1 between 4.0 and 0.5
    assert found["swing"] == pytest.approx((1.0 + 3.5) / 2)


def test_markdown_says_means_intervals_counts_and_what_failed(result):
    text = comparison_markdown(result, figures=["losses.png"])
    assert "# Comparison: x\\_1" in text
    assert "| homo | 0.001 | 2 | 2 | 1.688 \\[-2.283, 5.658\\]" in text
    assert "ffa, seed 2 failed: a loss of 100 % &amp; more" in text
    assert "| clients that gain | 0.0 of 2 | 1.0 of 2 |" in text
    assert "Budget of every run: 10 steps" in text
    assert "Client by category: loss under homo less that of the client alone" in text
    assert "| 0 | **+0.000** | +0.000 |" in text
    assert "| 1 | **+0.000** | **+0.000** |" in text


def private_result(rates: list[float]) -> dict[str, Any]:
    """One method whose runs are private, its learning rate chosen among `rates` where there are several."""
    run = run_of(1, 1.0, 2.0)
    run |= {"config": {"dp_example_noise_multiplier": 1.0}, "spent": {**run["spent"], "epsilon": 3.0}}
    sweep = [{"learning_rate": rate, "loss": 1.0} for rate in rates]
    return gather_comparison(PLAN, [cell_of("homo", [run], sweep=sweep if len(rates) > 1 else [])])


def test_an_epsilon_without_what_the_choice_of_the_learning_rate_spent_says_so_wherever_it_is_shown():
    tuned, single = private_result([1e-4, 1e-3, 1e-2]), private_result([1e-3])
    for text in ("\n".join(comparison_parts(tuned)), comparison_markdown(tuned, figures=[])):
        assert "3.000*" in text.replace("\\*", "*")
        assert "chosen by private runs with 3 rates" in text
    assert "& 3.000* &" in latex_table(tuned)
    assert "of one run; what the private runs spent that chose the learning rate is not in it" in latex_table(tuned)
    for text in ("\n".join(comparison_parts(single)), comparison_markdown(single, figures=[]), latex_table(single)):
        assert "*" not in text.replace("**", "").replace("\\*", "*").split("## What")[0]
        assert "chosen by private" not in text


def test_plain_text_has_the_remarks_below_the_table(result):
    assert "\n".join(comparison_parts(result)).endswith("note: ffa, seed 2 failed: a loss of 100 % & more")


def test_latex_escapes_names_and_has_a_line_per_row(result):
    latex = latex_table(result)
    assert latex.startswith("% comparison x_1")
    assert latex.count(" \\\\\n") == 5
    assert "homo & 0.001 & 2 & 2 & 1.688 {\\footnotesize $[-2.283, 5.658]$}" in latex
    assert escape_latex("a_b & 50 % {x}") == "a\\_b \\& 50 \\% \\{x\\}"


def test_a_learning_rate_at_the_edge_of_the_sweep_is_remarked():
    tried = [{"learning_rate": rate, "loss": rate, "reason": ""} for rate in (0.1, 0.2, 0.3)]
    for chosen, remarked in ((0.1, True), (0.2, False)):
        cell = cell_of("homo", [run_of(1, 1.0, 1.0)], sweep=tried, learning_rate=chosen)
        remarks = gather_comparison(PLAN, [cell])["remarks"]
        assert any("at the edge" in text for text in remarks) == remarked


def test_a_run_that_left_much_of_the_budget_is_remarked():
    run = run_of(1, 1.0, 1.0)
    run["spent"] = {**run["spent"], "num_steps": 8}
    (remark,) = gather_comparison(PLAN, [cell_of("homo", [run])])["remarks"]
    assert remark == "homo spent 8 of 10 steps: a further round would not have fitted"


def test_a_method_with_a_global_and_personal_adapters_is_two_rows():
    run = run_of(1, 1.0, 2.0)
    run["test"] = {"global": {"a": 1.0, "b": 2.0}, "clients": {"0": {"a": 0.5, "b": 9.0}, "1": {"a": 1.0, "b": 1.0}}}
    rows = gather_comparison(PLAN, [cell_of("homo", [run])])["rows"]
    assert [row["label"] for row in rows] == ["base", "homo (global)", "homo (personal)"]
    assert [row["metrics"]["loss_own"]["mean"] for row in rows[1:]] == [1.375, 0.75]
