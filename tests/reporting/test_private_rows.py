"""Who gains by joining on private rows: from hand-made lines of private metrics."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.config.evaluate import ReportConfig
from fedlora.reporting.experiments import Experiment
from fedlora.reporting.own_rows import ClientGains
from fedlora.reporting.private_rows import find_private_gains, private_notes


def mean(value: float, error: float = 0.1) -> dict[str, float]:
    return {"mean": value, "se": error}


def line(client: int, losses: dict[str, float], number: int = 2, rows: int = 12) -> dict[str, Any]:
    pairs = {f"{name}-base": loss - losses["base"] for name, loss in losses.items() if name != "base"}
    return {
        "kind": "private",
        "round": number,
        "client_id": client,
        "num_rows": rows,
        "num_prompts": rows,
        "models": {name: {"loss": mean(loss)} for name, loss in losses.items()},
        "differences": {name: {"loss": mean(apart, 0.01)} for name, apart in pairs.items()},
    }


def experiment(mode: str, *lines: dict[str, Any], **config: Any) -> Experiment:
    clients = [{"client_id": 0, "file": "north.csv", "num_examples": 4}]
    return Experiment(mode, 2, {"mode": mode, "clients": clients, "config": config}, [], [], {}, private_rows=lines)


JOINT = line(0, {"base": 3.0, "global": 2.0, "personal": 1.5})
ALONE = line(0, {"base": 3.0, "personal": 2.5})


def gains(*experiments: Experiment, **fields: Any) -> list[ClientGains]:
    return find_private_gains(ReportConfig.of(**fields), experiments)


def test_a_gain_over_the_base_is_the_paired_difference() -> None:
    (north,) = gains(experiment("homo", JOINT))
    assert (north.client, north.num_rows, north.reference) == ("north", 12, "base")
    gain = north.gains["loss"]["homo"]
    # t with 11 degrees: 2.200985
    assert (gain.estimate.mean, gain.is_clear) == (1.0, True)
    assert gain.estimate.interval == pytest.approx((1 - 0.02200985, 1 + 0.02200985), abs=1e-6)


def test_a_gain_over_the_client_alone_is_unpaired_and_wider() -> None:
    (north,) = gains(experiment("homo", JOINT), experiment("none", ALONE))
    assert north.reference == "alone (none)"
    assert set(north.scores["loss"]) == {"base", "homo", "homo, its own", "alone (none)"}
    gain = north.gains["loss"]["homo, its own"].estimate
    assert gain.mean == 1.0
    assert gain.interval[1] - gain.interval[0] > 0.5


def test_only_the_last_measured_round_counts() -> None:
    early = line(0, {"base": 3.0, "global": 9.0}, number=1)
    (north,) = gains(experiment("homo", early, JOINT))
    assert north.scores["loss"]["homo"].mean == 2.0


def test_numbers_of_other_rows_are_not_compared() -> None:
    (north,) = gains(experiment("homo", JOINT), experiment("none", line(0, {"base": 3.0, "personal": 2.5}, rows=11)))
    assert (north.reference, set(north.scores["loss"])) == ("base", {"base", "homo", "homo, its own"})


def test_numbers_of_a_private_run_stay_out_unless_they_are_asked_for() -> None:
    noisy = experiment("homo", JOINT, dp_noise_multiplier=1.0)
    assert gains(noisy) == []
    assert "left out" in private_notes(ReportConfig.of(), [noisy])[0]
    assert len(gains(noisy, noiseless_metrics=True)) == 1
    (note,) = private_notes(ReportConfig.of(noiseless_metrics=True), [noisy])
    assert "not in epsilon" in note


def test_a_client_that_gave_none_is_named_with_the_reason() -> None:
    one = experiment("homo", {"kind": "private", "round": 2, "client_id": 0, "withheld": "it has no test rows"})
    assert gains(one) == []
    assert private_notes(ReportConfig.of(), [one]) == ["homo: no private metrics of north: it has no test rows"]
