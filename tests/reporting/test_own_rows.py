"""Who gains by joining: hand-made row files of a base, a run alone and a joint run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.config.evaluate import ReportConfig
from fedlora.errors import UsageError
from fedlora.methods.table import METHODS
from fedlora.reporting.experiments import Experiment
from fedlora.reporting.own_rows import count_gains, find_gains

CLIENTS = ("north", "south")


def write_scores(root: Path, run: str, output: str, right: dict[str, str], tests: str = "t") -> None:
    """`right` has a 1 or a 0 for each test row of a client."""
    folder = root / run / "2"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"row": 1, "category": "", "client": client, "exact": int(mark), "rougeL": int(mark), "chrf": int(mark) / 2}
        for client, marks in right.items()
        for mark in marks
    ]
    (folder / f"{output}_scores.json").write_text(json.dumps({"targets_sha256": tests}))
    (folder / f"{output}_scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_losses(root: Path, run: str, output: str, losses: dict[str, float], adapter: str = "a") -> None:
    """The same loss on each of a client's ten rows, of one to ten tokens."""
    folder = root / run / "2"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"row": 1, "category": "", "client": client, "loss": loss, "num_tokens": tokens}
        for client, loss in losses.items()
        for tokens in range(1, 11)
    ]
    (folder / f"{output}_losses.json").write_text(
        json.dumps({"targets_sha256": "l", "adapter_sha256": None if output == "base" else adapter})
    )
    (folder / f"{output}_losses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def experiment(name: str, mode: str) -> Experiment:
    clients = [{"client_id": n, "file": f"{one}.csv", "num_examples": 4} for n, one in enumerate(CLIENTS)]
    return Experiment(name, 2, {"mode": mode, "clients": clients}, [], [], {})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_scores(tmp_path, "homo", "base", {"north": "0" * 20, "south": "0" * 20})
    write_scores(tmp_path, "homo", "global", {"north": "1" * 20, "south": "1" * 5 + "0" * 15})
    write_scores(tmp_path, "none", "client_0", {"north": "1" * 5 + "0" * 15, "south": "0" * 20})
    write_scores(tmp_path, "none", "client_1", {"north": "0" * 20, "south": "0" * 5 + "1" * 15})
    return tmp_path


def gains(root: Path, *experiments: Experiment) -> dict[str, Any]:
    return {one.client: one for one in find_gains(ReportConfig.of(rouge_dir=root), experiments)}


def test_a_gain_is_over_the_adapter_that_the_client_trained_alone(root: Path) -> None:
    found = gains(root, experiment("homo", "homo"), experiment("none", "none"))
    north, south = found["north"], found["south"]
    assert (north.num_rows, north.reference) == (20, "alone (none)")
    assert {label: one.mean for label, one in north.scores["exact"].items()} == {
        **{"base": 0, "homo": 1, "alone (none)": 0.25}
    }
    gain = north.gains["exact"]["homo"]
    assert (gain.estimate.mean, gain.higher, gain.lower, gain.is_clear) == (0.75, 15, 0, True)
    assert north.gains["chrf"]["homo"].estimate.mean == 0.375
    # of the south's rows 5 are gained and 15 lost
    assert south.gains["exact"]["homo"].estimate.mean == -0.5
    assert count_gains("exact", list(found.values())) == {"homo": (1, 1, 2)}


def test_without_a_run_alone_the_base_is_the_reference(root: Path) -> None:
    found = gains(root, experiment("homo", "homo"))
    assert found["south"].reference == "base"
    assert found["south"].gains["exact"]["homo"].estimate.mean == 0.25
    assert gains(root, experiment("none", "none")) == {}


def test_a_client_s_own_adapter_in_a_joint_run_is_a_model_of_its_own(root: Path) -> None:
    write_scores(root, "homo", "client_1", {"north": "0" * 20, "south": "1" * 20})
    found = gains(root, experiment("homo", "homo"), experiment("none", "none"))
    assert list(found["south"].gains["exact"]) == ["homo", "homo, its own"]
    assert list(found["north"].gains["exact"]) == ["homo"]


def test_a_gain_in_loss_is_how_much_lower_it_is(root: Path) -> None:
    write_losses(root, "homo", "global", {"north": 1.0, "south": 2.0})
    write_losses(root, "none", "client_0", {"north": 1.5})
    write_losses(root, "none", "client_1", {"south": 1.5})
    found = gains(root, experiment("homo", "homo"), experiment("none", "none"))
    assert found["north"].gains["loss"]["homo"].estimate.mean == 0.5
    assert found["south"].gains["loss"]["homo"].estimate.mean == -0.5
    assert count_gains("loss", list(found.values())) == {"homo": (1, 1, 2)}
    # the adapter alone stays the reference where its loss is not known
    (root / "none" / "2" / "client_0_losses.json").unlink()
    write_losses(root, "homo", "base", {"north": 3.0})
    north = gains(root, experiment("homo", "homo"), experiment("none", "none"))["north"]
    assert (north.reference, north.gains["loss"], set(north.scores["loss"])) == ("alone (none)", {}, {"base", "homo"})


def test_a_loss_of_another_adapter_than_the_run_has_is_no_gain(root: Path) -> None:
    write_losses(root, "homo", "base", {"north": 3.0})
    write_losses(root, "homo", "global", {"north": 1.0}, adapter="old")
    (root / "models" / "homo" / "2").mkdir(parents=True)
    (root / "models" / "homo" / "2" / "manifest.json").write_text('{"files": {"x": {"sha256": "new"}}}')
    config = ReportConfig.of(rouge_dir=root, model_dir=root / "models")
    north, _ = find_gains(config, [experiment("homo", "homo")])
    assert list(north.scores["loss"]) == ["base"]
    assert north.gains["loss"] == {}
    assert north.gains["exact"]


def test_scores_on_other_test_rows_are_left_out(root: Path) -> None:
    write_scores(root, "none", "client_0", {"north": "1" * 3}, tests="other")
    found = gains(root, experiment("homo", "homo"), experiment("none", "none"))
    assert (found["north"].num_rows, found["north"].reference) == (20, "base")
    assert found["south"].reference == "alone (none)"


def test_rows_that_belong_to_no_client_have_no_matrix(tmp_path: Path) -> None:
    for output in ("base", "global"):
        write_scores(tmp_path, "homo", output, {"": "10"})
    assert gains(tmp_path, experiment("homo", "homo")) == {}


def test_a_damaged_file_is_named(root: Path) -> None:
    (root / "homo" / "2" / "global_scores.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match=r"global_scores\.jsonl: not written by fedlora"):
        gains(root, experiment("homo", "homo"))


def test_every_method_but_none_is_joint() -> None:
    assert [name for name, method in METHODS.items() if not method.combines] == ["none"]
