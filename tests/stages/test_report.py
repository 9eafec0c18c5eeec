"""The report over synthetic runs: small folders with numbers that can be worked out by hand."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from fedlora.cli import load
from fedlora.command_table import COMMANDS
from fedlora.config.evaluate import ReportConfig
from fedlora.errors import UsageError
from fedlora.flags import make_parser, read_flags
from fedlora.reporting.experiments import find_round
from fedlora.reporting.main_table import main_table_parts
from fedlora.stages.report import run

CATEGORIES = ("capitals", "dates", "sums")
ROUNDS = 2
TEST_FILE = "t" * 64

CLIENT = {"file": "rows.json", "categories": {"sums": 1}}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


class World:
    """Folders of runs and results below `root`, filled by hand."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def config(self, *names: str, **fields: Any) -> ReportConfig:
        folders = {field: self.root / field for field in ("model_dir", "prediction_dir", "rouge_dir", "llm_dir")}
        return ReportConfig.of(
            **{
                "exp_names": names,
                "communication_rounds": ROUNDS,
                "report_dir": self.root / "reports",
                **folders,
                **fields,
            }
        )

    def train(self, mode: str, *, name: str = "", steps: int = 4, rounds: int = ROUNDS, **changes: Any) -> str:
        """A run in which the client of category i holds 10 rows of it; every client trains in every round."""
        name = name or mode
        folder = self.root / "model_dir" / name
        clients = [
            {"client_id": i, "file": f"{i}.json", "sha256": f"{i}" * 64, "num_examples": 10, "categories": {c: 10}}
            for i, c in enumerate(CATEGORIES)
        ]
        config = {"exp_name": name, "federation_mode": mode, "seed": 42, "lora_r": 8, "local_val_set_size": 0}
        facts = {"format": 1, "exp_name": name, "mode": mode, "base_model": "tiny", "config": config,
                 "versions": {"fedlora": "0.1.0", "torch": "2.13.0"}, "device": "cpu", "base_dtype": "float32",
                 "adapter": {"num_parameters": 100, "num_bytes": 400}, "clients": clients}  # fmt: skip
        config.update({key: changes.pop(key) for key in list(changes) if key in config})
        write(folder / "run.json", {**facts, **changes})
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in metrics(mode, steps, rounds)), encoding="utf-8"
        )
        return name

    def score(self, name: str, output: str, exact: dict[str, float], rouge_l: float = 0.5, **meta: Any) -> None:
        """Predictions, their sidecar and their scores; 10 test rows per category."""
        predictions = self.root / "prediction_dir" / name / str(ROUNDS) / f"{output}_output.jsonl"
        write(predictions, {"of": f"{name}/{output}"})
        sidecar = {
            "adapter_sha256": None if output == "base" else "a" * 64,
            "num_rows": 30,
            "prompt_template": "chat",
            "decoding": {"temperature": 0},
            "test_file_sha256": TEST_FILE,
        }
        write(predictions.with_name(f"{output}_output.meta.json"), {**sidecar, **meta})
        ours = {
            "exact_match": {"categories": exact, "macro": fmean(exact.values())},
            "num_samples": dict.fromkeys(exact, 10),
            "predictions_sha256": hashlib.sha256(predictions.read_bytes()).hexdigest(),
            "targets_sha256": meta.get("test_file_sha256", TEST_FILE),
        }
        scores = {"overall": {"avg_rougeL": rouge_l}, "fedlora": ours}
        write(self.root / "rouge_dir" / name / str(ROUNDS) / f"{output}_output_rouge.json", scores)

    def judge(self, name: str, output: str) -> None:
        result = {"num_samples": 30, "eval_failures": 1, "win": 20, "tie": 6, "loss": 4, "position_flip_rate": 0.1,
                  "overall_pred_avg": 40.0, "overall_prop_avg": 60.0, "overall_ratio": 1.5,
                  "judge": {"model_asked": "judge|1", "models_returned": ["judge|1"]},
                  "files": {"proposed": {"path": "homo/2/global_output.jsonl"}}}  # fmt: skip
        write(self.root / "llm_dir" / name / str(ROUNDS) / f"{output}_results.json", result)


def metrics(mode: str, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Held-out loss 3.0 untrained, then 2.0 + client / 10 - round / 10 in none, and 2.0 - round / 10 elsewhere."""
    rows: list[dict[str, Any]] = [{"kind": "round", "round": 0, "val_loss": 3.0}]
    clients = [-1] if mode == "pooled" else list(range(len(CATEGORIES)))
    sent = 0 if mode in ("none", "pooled") else 400
    for number in range(1, rounds + 1):
        for client in clients:
            row = {"kind": "client", "round": number, "client_id": client, "num_steps": steps, "num_tokens": 100,
                   "bytes_down": sent, "bytes_up": sent, "seconds": 1.5}  # fmt: skip
            if mode == "none":
                row["val_loss"] = 2.0 + client / 10 - number / 10
            rows.append(row)
        rows.append({"kind": "round", "round": number, "quarantined": [], "loss": 1.0 / number,
                     "val_loss": 2.0 - number / 10})  # fmt: skip
    return rows


@pytest.fixture
def real_pictures() -> None:
    """For the tests that look at the pictures; the others do without, as drawing takes most of the time."""


@pytest.fixture(autouse=True)
def _quick_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real_pictures" not in request.fixturenames:
        monkeypatch.setattr("fedlora.stages.report.draw_rounds", lambda findings: b"rounds")
        monkeypatch.setattr("fedlora.stages.report.draw_categories", lambda findings: b"clients")


@pytest.fixture
def world(tmp_path: Path) -> World:
    """base, none, seq, homo and pooled, everything scored."""
    world = World(tmp_path)
    for mode in ("homo", "none", "seq"):
        world.train(mode)
    world.train("pooled", steps=12)
    world.score("homo", "base", dict.fromkeys(CATEGORIES, 0.1), rouge_l=0.2)
    for client, own in enumerate(CATEGORIES):
        world.score("none", f"client_{client}", {category: 0.9 if category == own else 0.0 for category in CATEGORIES})
    world.score("seq", "global", {"capitals": 0.2, "dates": 0.5, "sums": 0.8})
    world.score("homo", "global", {"capitals": 0.6, "dates": 0.7, "sums": 0.8}, rouge_l=0.7)
    world.score("pooled", "global", dict.fromkeys(CATEGORIES, 0.9))
    return world


ALL = ("homo", "none", "seq", "pooled")


def report_of(world: World, *names: str) -> tuple[Any, str, dict[str, Any]]:
    findings = run(world.config(*names)).findings
    folder = world.root / "reports" / "report"
    return findings, (folder / "report.md").read_text("utf-8"), json.loads((folder / "report.json").read_text("utf-8"))


def row_of(findings: Any, label: str) -> Any:
    return next(row for row in findings.rows if row.label.startswith(label))


def test_rows_come_in_the_order_base_none_seq_homo_pooled_whatever_the_order_of_the_names(world: World) -> None:
    findings, _, stored = report_of(world, "pooled", "homo", "seq", "none")
    labels = [row.label for row in findings.rows]
    assert labels == [
        "base",
        "none client 0 (capitals)",
        "none client 1 (dates)",
        "none client 2 (sums)",
        "none mean of 3 (costs: total)",
        "seq",
        "homo",
        "pooled",
    ]
    assert [row["label"] for row in stored["rows"]] == labels


def test_own_all_rouge_and_loss_are_the_numbers_worked_out_by_hand(world: World) -> None:
    findings, _, _ = report_of(world, *ALL)
    base, client, mean, homo = (row_of(findings, label) for label in ("base", "none client 1", "none mean", "homo"))
    assert (base.own, base.all, base.rouge_l, base.held_out_loss) == pytest.approx((0.1, 0.1, 0.2, 3.0))
    assert (client.own, client.all, client.held_out_loss) == pytest.approx((0.9, 0.3, 1.9))
    assert (mean.own, mean.all, mean.rouge_l, mean.held_out_loss) == pytest.approx((0.9, 0.3, 0.5, 1.9))
    assert (homo.own, homo.all, homo.rouge_l, homo.held_out_loss) == pytest.approx((0.7, 0.7, 0.7, 1.8))
    assert mean.categories == pytest.approx({"capitals": 0.3, "dates": 0.3, "sums": 0.3})


def test_own_weighs_a_mixed_client_by_its_training_rows(world: World) -> None:
    path = world.root / "model_dir" / "homo" / "run.json"
    facts = json.loads(path.read_text("utf-8"))
    facts["clients"] = facts["clients"][:1]
    facts["clients"][0]["categories"] = {"capitals": 30, "sums": 10}
    write(path, facts)
    findings, _, _ = report_of(world, "homo")
    assert row_of(findings, "homo").own == pytest.approx(0.75 * 0.6 + 0.25 * 0.8)


def test_costs_are_sums_over_rounds_and_clients_and_the_mean_row_holds_totals(world: World) -> None:
    findings, _, _ = report_of(world, *ALL)
    costs = {label: row_of(findings, label).costs for label in ("base", "none client 0", "none mean", "homo", "pooled")}
    shown = {label: (one.steps, one.tokens, one.bytes_sent, one.seconds) for label, one in costs.items()}
    assert shown == {
        "base": (0, 0, 0, 0.0),
        "none client 0": (8, 200, 0, 3.0),
        "none mean": (24, 600, 0, 9.0),
        "homo": (24, 600, 4800, 9.0),
        "pooled": (24, 200, 0, 3.0),
    }


def test_metrics_after_the_compared_round_are_ignored(world: World) -> None:
    world.train("homo", rounds=ROUNDS + 3)
    findings, _, stored = report_of(world, "homo")
    assert row_of(findings, "homo").costs.steps == 24
    assert row_of(findings, "homo").held_out_loss == pytest.approx(1.8)
    assert [point[0] for point in stored["curves"]["homo"]["held_out"]] == [0, 1, 2]


def test_a_client_that_missed_the_last_round_keeps_its_latest_held_out_loss(world: World) -> None:
    path = world.root / "model_dir" / "none" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    kept = [row for row in rows if (row["round"], row.get("client_id")) != (ROUNDS, 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    findings, _, _ = report_of(world, "none", "homo")
    assert row_of(findings, "none client 2").held_out_loss == pytest.approx(2.1)
    assert row_of(findings, "none mean").held_out_loss == pytest.approx((1.8 + 1.9 + 2.1) / 3)


def test_a_complete_and_equal_comparison_has_no_warning_and_no_gap(world: World) -> None:
    findings, markdown, _ = report_of(world, *ALL)
    assert findings.warnings == []
    assert findings.gaps == []
    assert "Warning" not in markdown
    assert any("raw rows" in note for note in findings.notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 7}, "differ in steps: 42 (seq); 24 (homo)"),
        ({"seed": 43}, "differ in seed: 42 (homo); 43 (seq)"),
        ({"device": "cuda:0"}, "differ in device and dtype: cpu float32 (homo); cuda:0 float32 (seq)"),
        ({"base_model": "other"}, "differ in base model: tiny (homo); other (seq)"),
        ({"clients": [{**CLIENT, "client_id": 0, "sha256": "x" * 64, "num_examples": 1}]}, "data"),
    ],
)
def test_experiments_that_differ_in_what_makes_them_comparable_get_a_warning(
    world: World, changes: dict[str, Any], words: str
) -> None:
    world.train("seq", **changes)
    findings, markdown, _ = report_of(world, "homo", "seq")
    assert len(findings.warnings) == 1
    assert words in findings.warnings[0]
    assert "> **Warning:**" in markdown
    assert f"warning: {findings.warnings[0]}" in "\n".join(main_table_parts(findings))


IDENTITY = {"configuration": "a", "tokenizer": "b", "weights": "c"}


@pytest.mark.parametrize(
    ("seq", "words"),
    [
        ({"base_model": "elsewhere/tiny", "base_identity": IDENTITY}, None),
        ({"base_identity": {**IDENTITY, "weights": "d"}}, "differ in base model: tiny "),
        # an older run has none: names are compared
        ({"base_model": "other"}, "differ in base model: tiny (homo); other (seq)"),
        ({}, None),
    ],
)
def test_base_models_are_compared_by_identity_where_every_run_has_one(
    world: World, seq: dict[str, Any], words: str | None
) -> None:
    world.train("homo", base_identity=IDENTITY)
    world.train("seq", **seq)
    warnings = report_of(world, "homo", "seq")[0].warnings
    assert [words in warning for warning in warnings if words] == ([True] if words else [])
    assert len(warnings) == bool(words)


def test_the_steps_of_all_none_clients_together_are_compared_with_the_other_modes(world: World) -> None:
    world.train("none", steps=5)
    findings, _, _ = report_of(world, *ALL)
    assert findings.warnings == ["the experiments differ in steps: 30 (none); 24 (seq, homo, pooled)"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("test_file_sha256", "u" * 64, "different test files"),
        ("decoding", {"temperature": 0.1}, "decoded differently"),
        ("prompt_template", "alpaca", "different prompts"),
    ],
)
def test_answers_to_other_questions_or_other_rules_get_a_warning(
    world: World, field: str, value: Any, words: str
) -> None:
    world.score("seq", "global", dict.fromkeys(CATEGORIES, 0.5), **{field: value})
    findings, _, _ = report_of(world, *ALL)
    assert [words in warning for warning in findings.warnings] == [True]


def test_other_held_out_rows_get_a_warning(world: World) -> None:
    path = world.root / "model_dir" / "seq" / "metrics.jsonl"
    path.write_text(path.read_text("utf-8").replace('"val_loss": 3.0', '"val_loss": 2.5'), encoding="utf-8")
    findings, _, _ = report_of(world, *ALL)
    assert len(findings.warnings) == 1
    assert "held-out rows differ" in findings.warnings[0]


def test_scores_of_predictions_that_were_replaced_get_a_warning(world: World) -> None:
    (world.root / "prediction_dir" / "homo" / str(ROUNDS) / "global_output.jsonl").write_text("{}\n")
    findings, _, _ = report_of(world, *ALL)
    assert findings.warnings == ["homo: predictions changed after they were scored: global"]


def test_answers_of_an_adapter_that_was_trained_anew_since_get_a_warning(world: World) -> None:
    for name, stored in {"seq": "a" * 64, "none": "b" * 64}.items():
        manifest = {"files": {"adapter_model.bin": {"sha256": stored, "bytes": 1}}}
        write(world.root / "model_dir" / name / str(ROUNDS) / "manifest.json", manifest)
    findings, _, _ = report_of(world, *ALL)
    assert findings.warnings == [
        "none: predictions were made with another adapter than the run has now: client_0, client_1, client_2"
    ]


def test_every_measure_of_score_and_loss_has_a_column_with_its_interval(world: World) -> None:
    folder = world.root / "rouge_dir" / "homo" / str(ROUNDS)
    known = json.loads((folder / "global_output_rouge.json").read_text())["fedlora"]["predictions_sha256"]
    estimates = {name: {"mean": 0.5, "interval": [0.4, 0.6]} for name in ("rougeL", "f1", "chrf")}
    write(folder / "global_scores.json", {"predictions_sha256": known, "overall": estimates})
    write(folder / "global_losses.json", {"adapter_sha256": "a" * 64, "loss": 1.25, "interval": [1.0, 1.5]})
    _, markdown, record = report_of(world, *ALL)
    row = next(row for row in record["rows"] if row["label"] == "homo")
    assert (row["f1"], row["chrf"], row["test_loss"]) == (0.5, 0.5, 1.25)
    line = next(line for line in markdown.splitlines() if line.startswith("| homo"))
    assert "| 0.700 (0.400-0.600) | 0.500 (0.400-0.600) | 0.500 (0.400-0.600) | 1.250 (1.000-1.500) |" in line
    # answers that were scored again since are not those that `score` measured
    write(folder / "global_scores.json", {"predictions_sha256": "other", "overall": estimates})
    row = next(row for row in report_of(world, *ALL)[2]["rows"] if row["label"] == "homo")
    assert (row["f1"], row["rouge_l"]) == (None, 0.7)


def test_a_loss_of_another_adapter_than_is_there_is_left_out_and_said(world: World) -> None:
    write(world.root / "model_dir" / "homo" / str(ROUNDS) / "manifest.json", {"files": {"x": {"sha256": "b" * 64}}})
    folder = world.root / "rouge_dir" / "homo" / str(ROUNDS)
    write(folder / "global_losses.json", {"adapter_sha256": "a" * 64, "loss": 1.25, "interval": [1.0, 1.5]})
    _, _, record = report_of(world, *ALL)
    assert next(row for row in record["rows"] if row["label"] == "homo")["test_loss"] is None
    assert any("its loss was measured with another adapter" in text and "homo" in text for text in record["warnings"])


def test_missing_scores_leave_dashes_and_name_the_commands_that_make_them(world: World) -> None:
    for client in (0, 2):
        (world.root / "rouge_dir" / "none" / str(ROUNDS) / f"client_{client}_output_rouge.json").unlink()
        (world.root / "prediction_dir" / "none" / str(ROUNDS) / f"client_{client}_output.jsonl").unlink()
    (world.root / "rouge_dir" / "seq" / str(ROUNDS) / "global_output_rouge.json").unlink()
    findings, markdown, _ = report_of(world, *ALL)
    text = "\n".join(main_table_parts(findings))
    line = next(line for line in text.splitlines() if line.startswith("none client 0"))
    assert line.split()[4:12] == ["-"] * 7 + ["1.800"]
    assert row_of(findings, "none mean").all is None
    assert row_of(findings, "none mean").costs.steps == 24
    gaps = {gap.text: gap.commands for gap in findings.gaps}
    assert list(gaps) == [
        "none client 0 (capitals), none client 2 (sums): no predictions",
        "seq: not scored",
    ]
    generate, score = gaps[next(iter(gaps))]
    folders = f"--prediction_dir {world.root}/prediction_dir --model_dir {world.root}/model_dir"
    assert generate == f"fedlora generate none --of 0,2 --round 2 {folders}"
    assert score == f"fedlora score none --of 0,2 --round 2 {folders} --evaluation_dir {world.root}/rouge_dir"
    assert len(gaps["seq: not scored"]) == 1
    assert f"`{generate}`" in markdown
    assert generate in text


def test_a_run_that_has_not_reached_the_round_shows_no_costs_and_says_so(world: World) -> None:
    world.train("seq", rounds=1)
    findings, _, _ = report_of(world, *ALL)
    seq = row_of(findings, "seq")
    assert (seq.costs, seq.held_out_loss) == (None, None)
    (gap,) = findings.gaps
    assert gap.text.startswith("seq: trained 1 of 2 rounds; its train command with --rounds 2")


def test_a_name_without_a_run_gets_a_row_of_dashes_and_a_command(world: World) -> None:
    findings, _, _ = report_of(world, "homo", "absent")
    line = next(line for line in "\n".join(main_table_parts(findings)).splitlines() if line.startswith("absent"))
    assert set(line.split()[1:]) == {"-"}
    assert findings.gaps[0].commands == (f"fedlora runs --model_dir {world.root}/model_dir",)


def test_nothing_at_all_is_a_usage_error_and_leaves_no_file(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(UsageError, match="homo or none") as caught:
        run(world.config("homo", "none"))
    assert f"`fedlora runs --model_dir {tmp_path}/model_dir`" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_runs_without_validation_or_scores_still_make_a_report(tmp_path: Path, real_pictures: None) -> None:
    world = World(tmp_path)
    world.train("homo")
    path = tmp_path / "model_dir" / "homo" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()[1:]]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "val_loss"}) + "\n" for row in rows))
    findings, markdown, _ = report_of(world, "homo")
    assert row_of(findings, "homo").held_out_loss is None
    assert any("no held-out loss" in gap.text for gap in findings.gaps)
    assert "rounds.png" in markdown
    assert "clients.png" not in markdown
    assert not (tmp_path / "reports" / "report" / "clients.png").exists()


def test_a_broken_line_of_metrics_is_named_with_its_number(world: World) -> None:
    path = world.root / "model_dir" / "seq" / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines()
    path.write_text("\n".join([*lines[:2], '{"kind": "cl', *lines[3:]]), encoding="utf-8")
    with pytest.raises(UsageError, match=r"seq/metrics\.jsonl:3"):
        run(world.config(*ALL))


def test_scores_that_another_program_wrote_are_refused_by_name(world: World) -> None:
    write(world.root / "rouge_dir" / "seq" / str(ROUNDS) / "global_output_rouge.json", {"overall": {"avg_rougeL": 0.2}})
    with pytest.raises(UsageError, match=r"global_output_rouge\.json: not written by fedlora"):
        run(world.config(*ALL))


def test_two_experiments_of_one_mode_are_told_apart_by_name(world: World) -> None:
    world.train("homo", name="homo-r4", lora_r=4)
    world.score("homo-r4", "global", dict.fromkeys(CATEGORIES, 0.4))
    findings, markdown, stored = report_of(world, "homo", "homo-r4", "seq")
    assert [row.label for row in findings.rows] == ["base", "seq", "homo", "homo-r4"]
    assert stored["config_differences"] == {"lora_r": {"homo": 8, "homo-r4": 4, "seq": 8}}
    assert r"| lora\_r | 8 | 4 | 8 |" in markdown


def test_commands_in_a_report_can_be_pasted_and_replace_nothing(world: World) -> None:
    for stage in ("prediction_dir", "rouge_dir"):
        shutil.rmtree(world.root / stage / "none")
    world.train("seq", rounds=1)
    findings, markdown, _ = report_of(world, *ALL, "absent")
    commands = [command for gap in findings.gaps for command in gap.commands]
    assert {shlex.split(command)[1] for command in commands} == {"generate", "score", "runs"}
    assert len(commands) == 3
    for command in commands:
        words = shlex.split(command)
        row = COMMANDS[words[1]]
        config = load(row.config)
        given = read_flags(make_parser(words[1], config), words[2:], config, row.positional)
        config.make(given.values, file=given.file)
        assert command in markdown
    assert "--overwrite" not in markdown


def test_a_round_that_is_not_named_is_the_last_with_scores(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rounds in (("homo", (1, 3, 7)), ("seq", (3, 5))):
        for number in rounds:
            file = world.root / "rouge_dir" / name / str(number) / "global_output_rouge.json"
            write(file, {"overall": {}, "fedlora": {}})
    asked = [(("homo", "seq"), 3), (("homo",), 7), (("seq", "absent"), 5)]
    for names, expected in asked:
        for which in (None, "last", ""):
            config = world.config(*names, communication_rounds=which)
            assert find_round(config) == expected
    assert find_round(world.config("homo", communication_rounds=2)) == 2
    shutil.rmtree(world.root / "rouge_dir")
    for name, rounds in (("homo", (1, 2)), ("seq", (1, 2, 3))):
        for number in rounds:
            (world.root / "model_dir" / name / str(number)).mkdir(exist_ok=True)
    assert find_round(world.config("homo", "seq", communication_rounds=None)) == 2
    run(world.config("homo", "seq", communication_rounds=None))
    assert "comparing round 2" in capsys.readouterr().err
    with pytest.raises(UsageError, match="takes a number from 1 or last"):
        world.config("homo", communication_rounds="best")


def test_every_pair_of_a_judge_is_in_the_report(world: World) -> None:
    world.judge("none", "client_1")
    folder = world.root / "llm_dir" / "none" / str(ROUNDS)
    result = json.loads((folder / "client_1_results.json").read_text())
    write(folder / "pairs" / "homo.2.global--client_1.json", result)
    result["files"]["proposed"]["path"] = "seq/2/global_output.jsonl"
    result["judge"] = {"model_asked": "a, b", "models_returned": ["a-2026", "b"]}
    result["judges"] = [{"model_asked": "a"}, {"model_asked": "b"}]
    write(folder / "pairs" / "seq.2.global--client_1.json", result)
    findings, _, _ = report_of(world, *ALL)
    assert [(one.baseline, one.proposed) for one in findings.judgements] == [
        ("none client_1", "homo/2/global_output.jsonl"),
        ("none client_1", "seq/2/global_output.jsonl"),
    ]
    assert [one.judge for one in findings.judgements] == ["judge|1", "majority of a, b"]


def test_the_judge_gets_a_table_of_its_own_where_it_was_asked(world: World) -> None:
    assert "## Judge" not in report_of(world, *ALL)[1]
    world.judge("none", "client_1")
    findings, markdown, stored = report_of(world, *ALL)
    assert (
        "| none client\\_1 | homo/2/global\\_output.jsonl | judge\\|1 | 20 / 6 / 4 | 0.767 | - | 10.0% | 40.0 | 60.0 "
        "| 1 |" in markdown
    )
    assert stored["judgements"][0]["win"] == 20
    assert findings.judgements[0].position_flip_rate == 0.1


def test_quarantined_clients_are_listed_with_the_reason(world: World) -> None:
    path = world.root / "model_dir" / "homo" / "metrics.jsonl"
    fault = '"quarantined": [{"client_id": 1, "reason": "non-finite tensor q_proj"}]'
    path.write_text(path.read_text("utf-8").replace('"quarantined": []', fault, 1), encoding="utf-8")
    findings, markdown, _ = report_of(world, *ALL)
    assert findings.quarantined == ["homo, round 1, client 1: non-finite tensor q_proj"]
    assert "- homo, round 1, client 1: non-finite tensor q\\_proj" in markdown


def test_a_client_without_rows_has_no_row_and_does_not_spoil_the_mean(world: World) -> None:
    path = world.root / "model_dir" / "none" / "run.json"
    facts = json.loads(path.read_text("utf-8"))
    facts["clients"].append(
        {
            **CLIENT,
            "file": "local_training_3.json",
            "client_id": 3,
            "sha256": "3" * 64,
            "num_examples": 0,
            "categories": {},
        }
    )
    write(path, facts)
    findings, _, _ = report_of(world, "none")
    assert row_of(findings, "none mean of 3").all == pytest.approx(0.3)
    assert "none: clients without training rows are left out: client 3" in findings.notes


def test_names_from_data_cannot_break_the_tables_or_put_markup_into_the_report(
    world: World, real_pictures: None
) -> None:
    hostile = "a|b\n<script>alert(1)</script> ![x](http://x) $\\frac$ \x1b[31m"
    for name in ("homo", "seq"):
        world.score(name, "global", {hostile: 0.5, "capitals": 0.5, "dates": 0.5, "sums": 0.5})
    findings, markdown, _ = report_of(world, "homo", "seq")
    assert hostile in findings.categories
    assert "<script>" not in markdown
    assert "![x]" not in markdown
    assert "\x1b" not in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = {line.replace("\\|", "").count("|") for line in tables if "a\\|b" in line}
    assert cells == {6}


def test_a_test_file_that_lacks_a_trained_category_leaves_own_empty(world: World) -> None:
    world.score("homo", "global", {"capitals": 0.6, "dates": 0.7})
    findings, _, _ = report_of(world, "homo")
    assert row_of(findings, "homo").own is None
    assert row_of(findings, "homo").all == pytest.approx(0.65)
    assert any("own is empty" in note for note in findings.notes)


def test_nothing_right_in_a_category_is_shown_with_how_much_might_have_been(world: World) -> None:
    world.score("homo", "global", {"capitals": 0.0, "dates": 0.7, "sums": 1.0})
    findings, text, _ = report_of(world, "homo")
    assert row_of(findings, "homo").category_intervals["capitals"] == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert "| homo | 0.00 (0.00-0.28) | 0.70 (0.40-0.89) | 1.00 (0.72-1.00) |" in text


def test_the_pictures_are_png_files_with_the_same_bytes_every_time(world: World, real_pictures: None) -> None:
    world.train("homo", name="homo-2")
    run(world.config(*ALL, "homo-2"))
    folder = world.root / "reports" / "report"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    run(world.config(*ALL, "homo-2"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    assert set(first) == {"report.md", "report.html", "report.json", "rounds.png", "clients.png"}
    assert first["rounds.png"].startswith(b"\x89PNG")
    assert first["rounds.png"] != first["clients.png"]
    assert b"Software" not in first["rounds.png"]


def test_the_main_table_is_aligned_and_ends_with_the_paths_of_the_report(world: World) -> None:
    report = run(world.config(*ALL))
    lines = report.text().splitlines()
    assert "\n".join(main_table_parts(report.findings)) in report.text()
    assert lines[-2:] == [str(world.root / "reports" / "report" / name) for name in ("report.md", "report.html")]
    assert len({len(line) for line in lines[:10]}) == 1
    assert lines[0].split("  ")[0] == "model"
    homo = next(line for line in lines if line.startswith("homo"))
    assert homo.split()[1:9] == ["0.700", "0.700", "0.527-0.811", "0.700", *"---", "1.800"]
    assert homo.split()[9:] == ["24", "600", "4.8", "kB", "9.0"]


def test_aggregation_error_and_drift_have_a_table_and_a_picture_where_they_were_measured(
    world: World, real_pictures: None
) -> None:
    assert "Aggregation error" not in (markdown_of(world, "homo", "pooled"))
    assert not (world.root / "reports/report/drift.png").exists()
    path = world.root / "model_dir" / "homo" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["kind"] == "round" and row["round"]:
            row |= {"aggregation_error": 0.5 ** row["round"], "drift_cosine_mean": 0.75, "drift_norm_mean": 0.125}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    markdown = markdown_of(world, "homo", "pooled")
    assert "| homo | 0.5 | 0.25 | 0.75 | 0.75 | 0.125 | 0.125 |" in markdown
    assert "| pooled | -" not in markdown, "a run without such numbers has no row"
    assert "(drift.png)" in markdown
    folder = world.root / "reports/report"
    assert (folder / "drift.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "report.json").read_text())["drift"]["homo"]["aggregation_error"] == [
        [1, 0.5],
        [2, 0.25],
    ]


def markdown_of(world: World, *names: str) -> str:
    run(world.config(*names))
    return (world.root / "reports/report/report.md").read_text(encoding="utf-8")
