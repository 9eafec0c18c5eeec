"""The loss of adapters that are there: the numbers that training measured, on rows of any kind."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fedlora import cli
from fedlora.config.loss import LossConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import DataError, UsageError
from fedlora.stages import loss, train


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """Train three small clients for two rounds, once for each method; returns the run's folder."""
    from tiny_run import make_client_files

    root = tmp_path_factory.mktemp("loss")
    make_client_files(root / "data", [3, 2, 4])
    rows = [
        {"instruction": f"say {number}", "output": "red " * number, "category": "abc"[number % 3]}
        for number in range(1, 7)
    ]
    (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made: dict[str, Path] = {}

    def run(mode: str = "homo") -> Path:
        if mode not in made:
            options = {
                "exp_name": mode,
                "federation_mode": mode,
                "base_model": str(tiny_model),
                "base_dtype": "float32",
                "data_path": root / "data",
                "val_data_path": str(root / "test.jsonl"),
                "model_dir": root / "models",
                "client_selection_strategy": "all",
                "num_communication_rounds": 2,
                "num_clients": 3,
                "local_batch_size": 2,
                "local_learning_rate": 1e-2,
                "prompt_template": "chat",
                "device": "cpu",
            }
            made[mode] = train.run(TrainConfig.of(**options)).root
        return made[mode]

    return run


def measure(run: Path, **fields) -> loss.MeasuredLosses:
    options = {"test_file_path": run.parents[1] / "test.jsonl", "base_dtype": "float32", "device": "cpu", **fields}
    options = {"evaluation_dir": run.parents[1] / "results", **options}
    return loss.run(LossConfig.of(exp_name=run.name, model_dir=run.parent, **options))


def recorded(run: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_base_and_global_have_the_loss_that_training_measured(trained):
    run = trained()
    known = [row["val_loss"] for row in recorded(run, "round")]
    for number in (1, 2):
        found = {one.subject.name: one.overall for one in measure(run, communication_rounds=number).losses}
        assert found["base"].loss == pytest.approx(known[0], rel=1e-6)
        assert found["global"].loss == pytest.approx(known[number], rel=1e-6)
        assert found["base"].num_examples == 6
    assert measure(run).losses[1].overall.loss == pytest.approx(known[2], rel=1e-6), "the run's last round"


@pytest.mark.parametrize("mode", ["none", "feddpa"])
def test_a_client_has_the_loss_that_training_measured_of_it(trained, mode):
    """feddpa's own models are of twice the rank."""
    run = trained(mode)
    name = "val_loss" if mode == "none" else "val_loss_personal"
    known = {row["client_id"]: row[name] for row in recorded(run, "client") if row["round"] == 2}
    found = measure(run, of_subjects="0-2").losses
    assert {one.subject.output.client_id: one.overall.loss for one in found} == pytest.approx(known, rel=1e-5)


def test_a_client_s_adapter_stands_on_what_its_run_added_to_the_base(trained):
    """Of fedex all of a round's clients see the additions of round 1, and their mean and what it misses is round 2."""
    run = trained("fedex")
    known = recorded(run, "round")
    one, two, after = (measure(run, of_subjects=who).losses[0].overall.loss for who in ("0", "1", "global"))
    assert after == pytest.approx(known[2]["val_loss"], rel=1e-3)
    assert max(one, two) < known[0]["val_loss"]


def test_losses_are_given_by_category_and_over_all_response_tokens(trained):
    run = trained()
    one, other = measure(run).losses
    assert list(one.groups) == ["a", "b", "c"]
    tokens = sum(group.num_tokens for group in one.groups.values())
    mean = sum(group.loss * group.num_tokens for group in one.groups.values()) / tokens
    assert (one.overall.loss, one.overall.num_tokens) == (pytest.approx(mean), tokens)
    both, single = measure(run).text().splitlines(), measure(run, of_subjects="global").text().splitlines()
    assert both[0].split() == ["of", "examples", "loss", "95", "%", "perplexity", "a", "b", "c"]
    assert both[2].split()[:3] == ["base", "6", f"{one.overall.loss:.4f}"]
    assert single[0].split() == [
        "category",
        "examples",
        "response",
        "tokens",
        "loss",
        "of",
        "global",
        "95",
        "%",
        "perplexity",
    ]
    assert single[-1].split()[:4] == ["all", "6", f"{tokens:,}", f"{other.overall.loss:.4f}"]


def test_a_loss_has_an_interval_a_perplexity_and_a_difference_to_the_base_on_the_same_rows(trained):
    run = trained()
    base, other = measure(run).losses
    low, high = base.overall.interval
    assert low < base.overall.loss < high
    assert base.overall.perplexity == pytest.approx(math.exp(base.overall.loss))
    assert base.difference == {}
    found = other.difference["loss"]
    assert found.estimate.mean == pytest.approx(other.overall.loss - base.overall.loss, abs=1e-7)
    assert found.higher + found.lower == 6
    printed = measure(run).text().splitlines()
    assert printed[-3].split() == ["less", "base", "loss"]
    assert printed[-1].split()[0] == "global"
    assert measure(run, of_subjects="global").losses[0].difference == {}


def test_the_choice_of_a_row_is_the_most_probable_of_those_that_it_names(trained, tmp_path):
    run = trained()
    rows = [
        {"instruction": f"say {number}", "output": "red", "choices": ["blue", "red", "green grass"], "category": "a"}
        for number in range(4)
    ]
    rows.append({"instruction": "say", "output": "nothing", "category": "b"})
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (one,) = measure(run, test_file_path=tmp_path / "test.jsonl", of_subjects="global").losses
    # by hand: the loss of each reply on its own rows, as sums over its tokens
    sums = {}
    for text in rows[0]["choices"]:
        asked = [
            {"instruction": row["instruction"], "output": text, "category": str(n)} for n, row in enumerate(rows[:4])
        ]
        (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        (alone,) = measure(run, test_file_path=tmp_path / "one.jsonl", of_subjects="global").losses
        sums[text] = [group.loss * group.num_tokens for group in alone.groups.values()]
    right = [min(sums, key=lambda text: sums[text][n]) == "red" for n in range(4)]
    by_byte = [min(sums, key=lambda text: sums[text][n] / len(text)) == "red" for n in range(4)]
    found = one.overall.choices
    assert found["choice"].mean == sum(right) / 4
    assert found["choice_per_byte"].mean == sum(by_byte) / 4
    assert one.groups["b"].choices == {}
    table = measure(run, test_file_path=tmp_path / "test.jsonl").text().splitlines()
    assert "choice per byte" in table[0]


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (["red"], "at least two"),
        ("red", "at least two"),
        (["red", None], "at least two"),
        (["red", " "], "at least two"),
        (["blue", "green"], "not one of"),
        (["red", "red "], "twice"),
    ],
)
def test_choices_that_cannot_be_measured_are_counted_and_named(trained, tmp_path, capsys, choices, words):
    run = trained()
    rows = [
        {"instruction": "say", "output": "red", "choices": choices},
        {"instruction": "tell", "output": "red", "choices": ["red", "blue"]},
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (one,) = measure(run, test_file_path=tmp_path / "test.jsonl", of_subjects="global").losses
    err = capsys.readouterr().err
    assert 'choices of 1 of 2 rows cannot be measured: "say": ' in err
    assert words in err
    assert one.overall.num_examples == 2
    assert one.overall.choices["choice"].mean in (0, 1)


def test_the_command_prints_the_table_or_json_and_progress_apart(trained, capsys):
    run = trained()
    words = [run.name, "--model_dir", str(run.parent), "--test", str(run.parents[1] / "test.jsonl"), "--of", "global,1"]
    assert cli.main(["loss", *words, "--base_dtype", "float32"]) == 0
    table = capsys.readouterr().out
    assert "client 1" in table
    assert cli.main(["loss", *words, "--base_dtype", "float32", "--json"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert [one["of"] for one in found["losses"]] == ["homo/2/global", "homo/2/1"]
    assert all(math.isfinite(one["loss"]) and set(one["groups"]) == {"a", "b", "c"} for one in found["losses"])
    assert "loss of global, client 1: done" in told.err


def test_what_cannot_be_measured_is_refused_before_a_base_is_loaded(trained, tmp_path):
    def load(*arguments, **options):
        raise AssertionError("a base is loaded")

    def refused(**fields):
        options = {"exp_name": run.name, "model_dir": run.parent, "test_file_path": rows, **fields}
        return loss.run(LossConfig.of(**options), load=load)

    run = trained()
    rows = run.parents[1] / "test.jsonl"
    with pytest.raises(UsageError, match="no run of this name"):
        refused(exp_name="nothing")
    with pytest.raises(UsageError, match="bank"):
        refused(of_subjects="bank")
    with pytest.raises(UsageError, match=r"no global adapter|no client_|global"):
        refused(communication_rounds=7)
    with pytest.raises((DataError, UsageError), match=r"none\.jsonl"):
        refused(test_file_path=tmp_path / "none.jsonl")


def test_rows_without_a_response_measure_nothing(trained, tmp_path):
    run = trained()
    (tmp_path / "empty.jsonl").write_text('{"instruction": "say", "output": " "}\n')
    with pytest.raises(DataError, match="every response is empty"):
        measure(run, test_file_path=tmp_path / "empty.jsonl")


def test_every_row_s_loss_lies_beside_the_totals(trained, tmp_path):
    run = trained()
    source = run.parents[1] / "test.jsonl"
    empty = json.dumps({"instruction": "say nothing", "output": "", "category": "a"}) + "\n"
    (tmp_path / "rows.jsonl").write_text(empty + source.read_text())
    one = measure(run, of_subjects="global", test_file_path=tmp_path / "rows.jsonl", evaluation_dir=tmp_path).losses[0]
    assert one.rows_file == tmp_path / run.name / "2" / "global_losses.jsonl"
    rows = [json.loads(line) for line in one.rows_file.read_text().splitlines()]
    assert [row["row"] for row in rows] == [2, 3, 4, 5, 6, 7], "the first has no response"
    total = sum(row["loss"] * row["num_tokens"] for row in rows) / sum(row["num_tokens"] for row in rows)
    totals = json.loads(one.totals_file.read_text())
    assert totals["loss"] == pytest.approx(total) == one.overall.loss
    assert totals["interval"] == list(one.overall.interval)
    manifest = json.loads((run / "2" / "manifest.json").read_text())
    assert totals["adapter_sha256"] in {file["sha256"] for file in manifest["files"].values()}
