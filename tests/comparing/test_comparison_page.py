"""The page of a comparison: who wins setting by setting, and a file that makes it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.comparing.comparison_page import comparison_page, looks_of
from fedlora.comparing.experiment_file import experiment_yaml
from fedlora.comparing.winners import find_winners, winner_sentences
from fedlora.config.compare import CompareConfig
from fedlora.reporting.page.render import render_page

STUDIES = Path(__file__).parents[2] / "docs/studies"


def study(name: str) -> dict[str, Any]:
    result = json.loads((STUDIES / name / "comparison.json").read_text(encoding="utf-8"))
    for row in result["rows"]:
        row.setdefault("tuned_privately", False)
    return result


def row(label: str, mode: str, *values: float, setting: str = "") -> dict[str, Any]:
    from fedlora.comparing.tables import summarise

    found = {"loss_own": summarise({str(seed): value for seed, value in enumerate(values)})}
    return {"label": label, "method": label, "mode": mode, "setting": setting, "metrics": found}


def test_the_winner_is_a_federated_method_paired_by_seed_with_the_next() -> None:
    rows = [row("base", "base", 9, 9, 9), row("homo", "homo", 2.0, 2.2, 2.4), row("prox", "fedprox", 2.1, 2.3, 2.5)]
    rows += [row("pooled", "pooled", 1, 1, 1), row("none", "none", 2.5, 2.6, 3.0)]
    (winner,) = find_winners({"settings": [""], "rows": rows})
    assert (winner.row["label"], winner.next and winner.next["label"]) == ("homo", "prox")
    assert winner.lead is not None
    assert winner.lead["mean"] == pytest.approx(-0.1)
    first, second = winner_sentences([winner])
    assert first.startswith("Of 2 federated methods homo has the lowest held-out loss on local rows: 2.200 (95 %")
    assert "-0.100 (95 % interval -0.100 to -0.100) against prox" in first
    assert second.startswith("Joining pays: -0.500 (95 % interval")


def test_a_difference_that_the_seeds_cannot_show_is_no_gain() -> None:
    rows = [row("homo", "homo", 2.0, 2.2, 2.4), row("none", "none", 2.1, 2.1, 2.5)]
    winners = find_winners({"settings": [""], "rows": rows})
    assert winner_sentences(winners)[1].startswith("Joining changes nothing that these seeds can show: -0.033")
    one_seed = find_winners({"settings": [""], "rows": [row("homo", "homo", 2.0), row("none", "none", 2.5)]})
    assert "-0.500 (one seed, no interval) against none" in winner_sentences(one_seed)[0]


def test_several_settings_are_counted() -> None:
    rows = [row("homo", "homo", 2.0, 2.1, setting="a"), row("none", "none", 1.0, 1.1, setting="a")]
    rows += [row("homo", "homo", 2.0, 2.1, setting="b"), row("none", "none", 3.0, 3.1, setting="b")]
    assert winner_sentences(find_winners({"settings": ["a", "b"], "rows": rows})) == [
        "On local rows homo has the lowest held-out loss in 2 of 2 settings.",
        "Joining the best method pays in 1 of 2 settings and costs in 1, where the 95 % interval against each client "
        "alone excludes 0.",
    ]


@pytest.mark.parametrize("name", ["forgetting", "personal_skills", "privacy", "aggregation_error", "personal_dolly"])
def test_every_study_has_a_page_and_its_file_makes_the_same_experiment(name: str, tmp_path: Path) -> None:
    result = study(name)
    yaml = experiment_yaml(result)
    page = render_page(comparison_page(result, looks_of(result), yaml=yaml, texts=None))
    assert len(page) < 400_000
    for one in result["rows"]:
        assert f">{one['label']}</th>" in page
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml, encoding="utf-8")
    again = CompareConfig.make({}, file=file)
    asked = CompareConfig.make({}, file=Path(__file__).parents[2] / f"studies/{name}.yaml")
    # comparison.json sorts the fields of a setting, and with them its label
    assert [one.values for one in again.settings()] == [one.values for one in asked.settings()]
    assert [(one.name, one.mode) for one in again.contenders()] == [(one.name, one.mode) for one in asked.contenders()]
    rates = {one.name: again.rates_of(one) for one in again.contenders()}
    assert rates == {one.name: asked.rates_of(one) for one in asked.contenders()}
    for field in ("seeds", "budget", "train", "data_path", "curves", "test_per_cat", "answers_per_cat"):
        assert getattr(again, field) == getattr(asked, field), field


def test_a_comparison_s_names_never_become_markup() -> None:
    result = study("forgetting")
    hostile = "</script><script>x</script><img src=x onerror=y>"
    result["rows"][1]["label"] = result["rows"][1]["method"] = hostile
    result["curves"][0]["method"] = hostile
    result["remarks"] = [hostile]
    result["clients"][0]["names"] = {"0": hostile}
    result["curves"][0]["names"] = {"0": hostile}
    page = render_page(comparison_page(result, looks_of(result), yaml=hostile, texts=None))
    assert page.count("<script") == 1
    assert "<img" not in page
