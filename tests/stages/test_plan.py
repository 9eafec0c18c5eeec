"""The plan: what it promises is what train does, what train refuses it refuses, and it writes nothing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora import cli
from fedlora.config.names import note_spelling, spelling
from fedlora.config.plan import PlanConfig
from fedlora.engines import workbench
from fedlora.errors import FedloraError, TrainingError, UsageError
from fedlora.llm.local_training import Trainer
from fedlora.paths import RunPaths
from fedlora.planning import run_plan, run_warnings
from fedlora.planning.plan_text import plan_parts
from fedlora.stages import plan, train


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def rows_of(name: str, count: int = 12) -> list[dict[str, str]]:
    return [
        {
            "instruction": f"say {name} {number}",
            "input": "",
            "output": name * (1 + number % 3),
            "category": f"c{number % 2}",
        }
        for number in range(count)
    ]


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path, monkeypatch) -> Callable[..., dict]:
    """Three sound clients and a test file; returns the fields of a small run on them."""
    monkeypatch.chdir(tmp_path)
    for client, name in enumerate(("north", "south", "west")):
        write_rows(tmp_path / "data" / "3" / f"local_training_{client}.json", rows_of(name))
    write_rows(tmp_path / "test.json", rows_of("east", 5))

    def fields(**more) -> dict:
        return {
            "exp_name": "e",
            "base_model": str(tiny_model),
            "data_path": tmp_path / "data",
            "model_dir": tmp_path / "models",
            "num_clients": 3,
            "client_selection_frac": 1,
            "num_communication_rounds": 2,
            "local_batch_size": 5,
            "local_num_epochs": 2,
            "device": "cpu",
            "token_cache": False,
            **more,
        }

    return fields


def make_plan(fields: dict, **more) -> dict:
    return dict(plan.run(PlanConfig.of(**fields, **more)).record)


def kinds(record: dict) -> list[str]:
    return [warning["kind"] for warning in record["warnings"]]


def tree(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_sound_data_give_no_warning_and_nothing_is_written(world, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    before = tree(tmp_path)
    record = make_plan(world(token_cache=True), test_file_path=tmp_path / "test.json")
    assert record["warnings"] == []
    # what the probe found out about the base is kept for the next load
    checks = str(tmp_path / "cache" / "checks")
    assert {path: content for path, content in tree(tmp_path).items() if not path.startswith(checks)} == before
    assert not (tmp_path / "models").exists()
    assert "\n".join(plan_parts(record)).endswith("no warnings")


@pytest.mark.parametrize(
    "mode", ["homo", "pooled", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("seq", "none"))]
)
def test_the_plan_is_what_train_does(world, tmp_path, mode):
    fields = world(federation_mode=mode, client_selection_frac=0.5, optimizer_state="keep")
    record = make_plan(fields, probe=False)
    from fedlora.config.train import TrainConfig

    train.run(TrainConfig.of(**fields))
    folder = RunPaths(tmp_path / "models", "e").root
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clients = [line for line in lines if line["kind"] == "client"]
    rounds = [line for line in lines if line["kind"] == "round" and line["round"] > 0]
    run = record["run"]
    assert run["num_steps"] == sum(line["num_steps"] for line in clients)
    assert run["num_tokens"] == sum(line["num_tokens"] for line in clients)
    assert run["num_updates"] == len(clients)
    assert run["bytes_up"] == max(line["bytes_up"] for line in rounds)
    assert run["bytes_down"] == max(line["bytes_down"] for line in rounds)
    steps: dict[int, int] = {}
    for line in clients:
        steps[line["client_id"]] = steps.get(line["client_id"], 0) + line["num_steps"]
    assert run["steps_of"] == steps
    facts = json.loads((folder / "run.json").read_text())
    assert facts["adapter"].items() <= record["adapter"].items()
    for planned, recorded in zip(record["clients"], facts["clients"], strict=True):
        assert recorded.items() <= planned.items()
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert 0.4 * run["disk_bytes"] <= stored <= run["disk_bytes"]


def test_the_adapter_files_have_the_sizes_that_were_planned(world, tmp_path):
    from fedlora.config.train import TrainConfig

    record = make_plan(world(), probe=False)
    train.run(TrainConfig.of(**world()))
    folder = RunPaths(tmp_path / "models", "e").round_folder(1)
    assert (folder / "global_adapter_model.bin").stat().st_size == record["adapter"]["bin_bytes"]
    assert (folder / "adapter_model.safetensors").stat().st_size == record["adapter"]["safetensors_bytes"]


def test_the_probe_trains_two_steps_of_the_largest_client_as_the_run_would(world, tmp_path, monkeypatch):
    write_rows(tmp_path / "data" / "3" / "local_training_1.json", rows_of("south", 30))
    seen = []
    update = Trainer._update
    monkeypatch.setattr(Trainer, "_update", lambda self, *rest: (seen.append(1), update(self, *rest))[1])
    record = make_plan(world(local_batch_size=8))
    assert len(seen) == 2
    assert record["probe"]["client_id"] == 1
    assert record["probe"]["num_rows"] == 16
    assert record["probe"]["tokens_per_pass"] == record["layout"]["tokens_per_pass"]
    assert record["seconds"] > record["probe"]["seconds"]


def test_a_client_smaller_than_a_step_is_probed_twice_over(world):
    record = make_plan(world(local_batch_size=128))
    assert record["probe"]["num_rows"] == 24


def test_twice_the_rounds_take_twice_the_time_of_one_probe(world, monkeypatch):
    from fedlora.planning.probe import Probe

    monkeypatch.setattr(run_plan, "run_probe", lambda *rest: Probe(0, 5, 500, 1000, 2.0, 2048))
    once, twice = (make_plan(world(num_communication_rounds=rounds))["seconds"] for rounds in (2, 4))
    assert twice == pytest.approx(2 * once)


def test_validation_takes_its_time(world, tmp_path, monkeypatch):
    from fedlora.planning.probe import Probe

    monkeypatch.setattr(run_plan, "run_probe", lambda *rest: Probe(0, 5, 500, 1000, 2.0, 2048))
    plain = make_plan(world())["seconds"]
    for more in (
        {"val_data_path": str(tmp_path / "test.json")},
        {"val_data_path": str(tmp_path / "test.json"), "federation_mode": "none"},
    ):
        assert make_plan(world(**more))["seconds"] > plain


def test_without_the_probe_no_weights_are_loaded(world, monkeypatch):
    monkeypatch.setattr(workbench, "load_base_model", lambda *rest, **more: pytest.fail("weights are loaded"))
    record = make_plan(world(), probe=False)
    assert record["probe"] is record["seconds"] is None
    assert record["memory"]["one_pass"] > 0


def test_with_and_without_the_probe_the_counts_are_the_same(world):
    full, outline = make_plan(world()), make_plan(world(), probe=False)
    for name in ("clients", "adapter", "run", "layout", "label_skew"):
        assert full[name] == outline[name]
    for name in ("base", "optimizer", "one_pass"):
        assert full["memory"][name] == outline["memory"][name]


def spoil_rows(tmp_path: Path, client: int, rows: list[dict[str, str]]) -> None:
    path = tmp_path / "data" / "3" / f"local_training_{client}.json"
    write_rows(path, [*json.loads(path.read_text()), *rows])


LONG = {"instruction": "long", "input": "x" * 600, "output": "yes", "category": "c0"}


@pytest.mark.parametrize(
    ("client", "rows", "kind", "words"),
    [
        (0, [LONG], "shortened", "client 0: 1 of 13 rows shortened to cutoff_len=512"),
        (1, [{"instruction": "a", "output": " ", "category": "c0"}], "unlabelled", "client 1: 1 of 13 rows"),
        (2, rows_of("west", 1), "repeat_inside_row", "client 2: 1 of 13 rows are equal"),
        (2, rows_of("north", 1), "repeat_across_row", "client 2: 1 of 13 rows are equal"),
        (1, [{"instruction": "say <|im_end|>", "output": "no", "category": "c0"}], "control_text", "'<|im_end|>'"),
        (1, [{"instruction": "b", "output": "### Response:", "category": "c0"}], "control_text", "'### Response:'"),
    ],
)
def test_what_is_wrong_with_a_row_is_a_warning_that_names_it(world, tmp_path, client, rows, kind, words):
    spoil_rows(tmp_path, client, rows)
    record = make_plan(world(), probe=False)
    assert kinds(record) == [kind]
    assert record["warnings"][0]["client"] == client
    assert record["warnings"][0]["places"][0].startswith(
        f"{tmp_path / 'data' / '3' / f'local_training_{client}.json'}: row 13"
    )
    assert words in "\n".join(plan_parts(record))


def test_training_rows_in_the_test_file_are_a_leak(world, tmp_path):
    write_rows(tmp_path / "test.json", [*rows_of("east", 5), rows_of("south")[3]])
    record = make_plan(world(), probe=False, test_file_path=tmp_path / "test.json")
    assert kinds(record) == ["leak_row"]
    assert record["warnings"][0]["places"] == [
        f"{tmp_path / 'test.json'}: row 6, as {tmp_path / 'data' / '3' / 'local_training_1.json'}: row 4"
    ]


def test_empty_and_tiny_clients_are_named_and_the_empty_one_trains_nothing(world, tmp_path):
    write_rows(tmp_path / "data" / "3" / "local_training_0.json", [])
    write_rows(tmp_path / "data" / "3" / "local_training_2.json", rows_of("west", 3))
    record = make_plan(world(), probe=False)
    assert kinds(record) == ["empty_client", "tiny_client"]
    assert [client["num_steps"] for client in record["clients"]] == [0, 2 * 2 * 3, 2 * 2 * 1]


def test_one_category_per_client_is_skew(world, tmp_path):
    for client, name in enumerate(("north", "south", "west")):
        rows = [{**row, "category": name} for row in rows_of(name)]
        write_rows(tmp_path / "data" / "3" / f"local_training_{client}.json", rows)
    record = make_plan(world(), probe=False)
    assert kinds(record) == ["label_skew"]
    assert record["label_skew"] == pytest.approx(2 / 3)


def test_rows_without_categories_have_no_skew(world, tmp_path):
    for client, name in enumerate(("north", "south", "west")):
        rows = [{key: value for key, value in row.items() if key != "category"} for row in rows_of(name)]
        write_rows(tmp_path / "data" / "3" / f"local_training_{client}.json", rows)
    record = make_plan(world(), probe=False)
    assert (record["label_skew"], kinds(record)) == (None, [])


def test_clients_that_are_never_drawn_are_named(world):
    record = make_plan(world(client_selection_frac=0.6, num_communication_rounds=1), probe=False)
    assert kinds(record) == ["never_drawn"]
    assert record["warnings"][0]["count"] == 1


@pytest.mark.parametrize("mode", ["homo", "fedsa", "seq", "none", "pooled"])
def test_a_cohort_of_a_single_client_is_a_warning_where_a_method_combines_clients(world, mode):
    record = make_plan(world(federation_mode=mode, client_selection_frac=0.1), probe=False)
    assert ("cohort" in kinds(record)) == (mode in ("homo", "fedsa"))
    record = make_plan(world(federation_mode=mode, client_selection_frac=0.5), probe=False)
    assert "cohort" not in kinds(record)


def test_a_warning_names_flags_as_they_were_typed(world):
    with spelling():
        note_spelling(["client_fraction"])
        warnings = make_plan(world(client_selection_frac=0.1), probe=False)["warnings"]
    (warning,) = [each for each in warnings if each["kind"] == "cohort"]
    assert "client_fraction=0.1" in warning["what"]
    assert "--client_fraction" in warning["advice"]
    assert "--method" in warning["advice"]


def test_a_disk_that_is_too_small_is_a_warning(world, monkeypatch):
    monkeypatch.setattr(run_plan, "free_bytes", lambda folder: 10_000)
    record = make_plan(world(), probe=False)
    assert kinds(record) == ["disk"]
    assert "10.0 kB are free" in record["warnings"][0]["what"]


def test_memory_that_is_too_small_is_a_warning(world, monkeypatch):
    monkeypatch.setattr(run_plan, "count_room", lambda base, outline: 1_000_000)
    record = make_plan(world(), probe=False)
    assert kinds(record) == ["memory"]


def test_free_space_is_that_of_the_folder_above_when_there_is_none_yet(tmp_path):
    assert run_warnings.free_bytes(tmp_path / "a" / "b") == pytest.approx(run_warnings.free_bytes(tmp_path), rel=0.1)


def test_a_probe_that_diverges_is_a_warning_and_no_time_is_told(world, monkeypatch):
    def diverge(*rest):
        raise TrainingError("the loss is not a number", hint="lower the rate")

    monkeypatch.setattr(run_plan, "run_probe", diverge)
    record = make_plan(world())
    assert kinds(record) == ["probe"]
    assert record["seconds"] is None
    assert "-> lower the rate" in "\n".join(plan_parts(record))


def test_the_judge_is_planned_for_the_test_file_and_priced_when_prices_are_given(world, tmp_path):
    record = make_plan(world(), probe=False, test_file_path=tmp_path / "test.json")
    plain = record["judge"]
    assert (plain["num_samples"], plain["num_calls"], plain["cost"]) == (5, 2, None)
    assert "for the cost give --judge_price_in" in "\n".join(plan_parts(record))
    more = {"judge_batch_size": 1, "judge_price_in": 2, "judge_price_out": 8, "gpt_model": "j"}
    priced = make_plan(world(), probe=False, test_file_path=tmp_path / "test.json", **more)["judge"]
    assert (priced["num_calls"], priced["model"]) == (10, "j")
    assert priced["cost"] == pytest.approx((2 * priced["tokens_in"] + 8 * priced["tokens_out"]) / 1e6)
    more |= {"gpt_model": "j, k,local:x", "judge_price_in": "2,1", "judge_repeats": 3}
    several = make_plan(world(), probe=False, test_file_path=tmp_path / "test.json", **more)["judge"]
    assert (several["num_calls"], several["model"]) == (6 * priced["num_calls"], "j,k,local:x")
    assert several["cost"] == pytest.approx(3 * (3 * priced["tokens_in"] + 16 * priced["tokens_out"]) / 1e6)
    local = {"gpt_model": "local:x", "test_file_path": tmp_path / "test.json"}
    assert "local:x compares 5 answers in both orders on this machine" in "\n".join(
        plan_parts(make_plan(world(), probe=False, **local))
    )
    assert make_plan(world(), probe=False)["judge"] is None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"test_file_path": "t", "judge_price_in": 1}, "judge_price_in and judge_price_out"),
        ({"test_file_path": "t", "judge_price_in": "nan", "judge_price_out": 1}, "judge_price_in"),
        ({"lora_r": 0}, "lora_r"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(more, words):
    with pytest.raises(UsageError, match=words):
        PlanConfig.of(**more)


def test_a_judge_without_test_rows_is_refused(world):
    with pytest.raises(UsageError, match="gpt_model: the judge is planned for test rows, and there are none"):
        plan.run(PlanConfig.of(**{**world(probe=False), "test_file_path": None, "gpt_model": "j"}))


def test_only_what_was_chosen_reaches_train():
    config = PlanConfig.of(lora_r=8, probe=False, plan_file="p.json").training()
    assert type(config).__name__ == "TrainConfig"
    assert config.model_fields_set == {"lora_r"}


def break_line(fields: dict, tmp_path: Path) -> None:
    (tmp_path / "data" / "3" / "local_training_1.json").write_text('[{"instruction": 1}]')


def remove_rows(fields: dict, tmp_path: Path) -> None:
    for client in range(3):
        write_rows(tmp_path / "data" / "3" / f"local_training_{client}.json", [])


def leave_foreign_file(fields: dict, tmp_path: Path) -> None:
    write_rows(tmp_path / "models" / "e" / "notes.json", [])


def train_otherwise(fields: dict, tmp_path: Path) -> None:
    from fedlora.config.train import TrainConfig

    train.run(TrainConfig.of(**{**fields, "num_communication_rounds": 1, "lora_r": 2}))


def change_rows_of_a_run(fields: dict, tmp_path: Path) -> None:
    from fedlora.config.train import TrainConfig

    train.run(TrainConfig.of(**fields))
    write_rows(tmp_path / "data" / "3" / "local_training_1.json", rows_of("up"))


@pytest.mark.parametrize(
    ("more", "spoil"),
    [
        ({"num_clients": 4}, None),
        ({"data_path": "nowhere"}, None),
        ({"base_model": "nowhere/at-all"}, None),
        ({"lora_target_modules": "w_proj"}, None),
        ({"cutoff_len": 8}, None),
        ({"min_clients": 4}, None),
        ({"local_val_set_size": 12}, None),
        ({"exp_name": "../x"}, None),
        ({"val_data_path": "missing.json"}, None),
        ({"device": "cuda:77"}, None),
        ({}, break_line),
        ({}, remove_rows),
        ({}, leave_foreign_file),
        ({}, train_otherwise),
        ({}, change_rows_of_a_run),
    ],
)
def test_what_train_refuses_the_plan_refuses_in_the_same_words(world, tmp_path, more, spoil):
    from fedlora.config.train import TrainConfig

    fields = world(**more)
    if spoil is not None:
        spoil(fields, tmp_path)
    with pytest.raises(FedloraError) as trained:
        train.run(TrainConfig.of(**fields))
    for probe in (True, False):
        with pytest.raises(FedloraError) as planned:
            plan.run(PlanConfig.of(**fields, probe=probe))
        assert type(planned.value) is type(trained.value)
        assert (str(planned.value), planned.value.hint) == (str(trained.value), trained.value.hint)


def test_a_run_that_is_there_is_planned_in_its_own_layout(world, tmp_path, capsys):
    from fedlora.config.train import TrainConfig

    train.run(TrainConfig.of(**world()))
    before = tree(tmp_path / "models")
    facts = json.loads((tmp_path / "models" / "e" / "run.json").read_text())
    record = make_plan(world())
    assert record["layout"] == facts["layout"]
    assert "holds this run already" in capsys.readouterr().err
    assert tree(tmp_path / "models") == before


def test_the_command_takes_its_file_with_or_without_the_flag(world, tmp_path, capsys):
    lines = [f"{name}: {value}" for name, value in world().items()]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    shown = []
    for arguments in (["c.yaml"], ["--config", "c.yaml"], ["--probe", "false", "c.yaml"]):
        assert cli.main(["plan", *arguments, "--probe", "false"]) == 0
        shown.append(capsys.readouterr().out.splitlines()[:6])
    assert shown[0] == shown[1] == shown[2]
    assert cli.main(["plan", "c.yaml", "--config", "c.yaml"]) == 2
    assert "two configuration files" in capsys.readouterr().err


def test_the_plan_file_holds_what_is_shown(world, tmp_path):
    made = plan.run(PlanConfig.of(**world(), probe=False, plan_file=tmp_path / "out" / "plan.json"))
    stored = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert "\n".join(plan_parts(stored)) == made.text()


def test_control_characters_of_the_data_do_not_reach_the_terminal(world, tmp_path):
    rows = [{**row, "category": "\x1b[2J"} for row in rows_of("north")]
    write_rows(tmp_path / "data" / "3" / "local_training_0.json", rows)
    text = "\n".join(plan_parts(make_plan(world(), probe=False)))
    assert "\x1b" not in text
    assert "\\x1b[2J" in text


def test_many_clients_and_warnings_are_cut_short_in_the_text_only(world):
    record = make_plan(world(), probe=False)
    warning = {"kind": "k", "client": 0, "count": 5, "what": "w", "places": ["a", "b", "c"], "advice": "do"}
    many = {**record, "clients": record["clients"] * 10, "warnings": [warning] * 50}
    text = "\n".join(plan_parts(many))
    assert "... and 10 clients more" in text
    assert "... and 10 warnings more" in text
    assert text.count("-> do") == 1
    assert "    at a; b; c; ..." in text


@pytest.fixture
def silos(world, tmp_path: Path) -> Callable[..., dict]:
    """Three clients with names, one of them with test rows of its own."""
    for name in ("north", "south", "west"):
        write_rows(tmp_path / "silos" / f"{name}.json", [{**row, "url": "x"} for row in rows_of(name)])
    write_rows(tmp_path / "silos" / "west.test.json", rows_of("east", 5))

    def fields(**more) -> dict:
        return {
            **{name: value for name, value in world().items() if name != "num_clients"},
            "data_path": tmp_path / "silos",
            **more,
        }

    return fields


def test_a_plan_of_silos_calls_clients_by_their_files_and_knows_their_test_rows(silos, tmp_path, capsys):
    text = (made := plan.run(PlanConfig.of(**silos(probe=False)))).text()
    assert re.search(r"^ *west +west.json +12 ", text, re.MULTILINE)
    assert made.record["test"] == {"file": str(tmp_path / "silos"), "num_rows": 5, "num_labelled": 5}
    assert "not used: url" in capsys.readouterr().err
    write_rows(tmp_path / "silos" / "west.test.json", rows_of("south", 2))
    (finding,) = [
        one for one in plan.run(PlanConfig.of(**silos(probe=False))).record["warnings"] if "leak" in one["kind"]
    ]
    assert finding["what"].startswith("the test rows of west: 2 of 2 rows are equal to a row that is trained on")
    (tmp_path / "silos" / "west.test.json").unlink()
    made = plan.run(PlanConfig.of(**silos(probe=False, test_share=0.25, test_file_path=tmp_path / "silos")))
    assert made.record["test"]["num_rows"] == 9
    assert [client["num_examples"] for client in made.record["clients"]] == [9, 9, 9]
    with pytest.raises(UsageError, match="holds no test rows"):
        plan.run(PlanConfig.of(**silos(probe=False, test_file_path=tmp_path / "silos")))
    with pytest.raises(UsageError, match="its folder takes this file for a client"):
        plan.run(PlanConfig.of(**silos(probe=False, test_file_path=tmp_path / "silos" / "north.json")))


TEMPLATE = """{% if messages[0].role != 'system' %}<s>system
Be kind. Today is {{ strftime_now('%Y-%m-%d') }}.</s>
{% endif %}{% for message in messages %}<s>{{ message.role }}
{{ message.content }}</s>
{% endfor %}{% if add_generation_prompt %}<s>assistant
{% endif %}"""


def make_talks(tmp_path: Path, count: int = 12, length: int = 1) -> None:
    rows = []
    for number in range(count):
        said = ("user", f"who {number}?"), ("assistant", "Ada\n" * length), ("user", "when?"), ("assistant", "\x1b[2J")
        rows.append({"messages": [{"role": role, "content": text} for role, text in said]})
    write_rows(tmp_path / "data" / "3" / "local_training_0.json", rows)


def test_two_rows_of_every_client_are_shown_as_training_sees_them(world, tmp_path):
    make_talks(tmp_path)
    record = make_plan(world(prompt_template="chat"), probe=False)
    talk, instruction, _ = (client["rows_shown"] for client in record["clients"])
    assert [shown["row"] for shown in talk] == [1, 2]
    assert [text.split("<")[0] for text, trained in talk[1]["parts"] if trained] == ["Ada\n", "\x1b[2J"]
    assert "who 1?" in talk[1]["parts"][0][0]
    assert [trained for _, trained in instruction[0]["parts"]] == [False, True]
    counts = [{name: client[name] for name in ("num_turns", "num_cut_turns")} for client in record["clients"]]
    assert counts == [{"num_turns": 48, "num_cut_turns": 0}, *[{"num_turns": 24, "num_cut_turns": 0}] * 2]
    text = "\n".join(plan_parts(record))
    assert "\x1b" not in text
    assert "[[Ada\\n" in text
    assert "[[\\x1b[2J" in text
    heads = next(line for line in text.splitlines() if line.startswith("client "))
    assert "turns" in heads
    assert "cut turns" not in heads
    assert "north, row" not in text
    assert plan_parts({**record, "clients": record["clients"][1:]})[1].split("\n")[0].count("turns") == 0


def test_trained_tokens_are_green_on_a_terminal_and_bracketed_elsewhere(world, tmp_path, monkeypatch, capsys):
    make_talks(tmp_path)
    made = plan.run(PlanConfig.of(**world(prompt_template="chat"), probe=False))
    coloured = made.terminal_text()
    assert "\x1b[32mAda\\n" in coloured
    assert "\x1b[2J" not in coloured
    assert (
        coloured.replace("\x1b[32m", "[[").replace("\x1b[0m", "]]").replace("[[green", "[[in brackets") == made.text()
    )
    for is_terminal, no_color, shown in ((True, "", coloured), (True, "1", made.text()), (False, "", made.text())):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        cli._print_result(made)
        assert capsys.readouterr().out == f"{shown}\n"


def test_long_texts_are_shortened_in_the_middle_in_the_text_only(world, tmp_path):
    make_talks(tmp_path, length=200)
    record = make_plan(world(prompt_template="chat", cutoff_len=2048), probe=False)
    parts = record["clients"][0]["rows_shown"][0]["parts"]
    assert any(text.startswith("Ada\n" * 200) for text, _ in parts)
    lines = [line for line in "\n".join(plan_parts(record)).splitlines() if "row 1:" in line]
    assert "Ada\\nAda\\n ... " in lines[0].replace("Ada ...", "Ada\\n ...")
    assert all(len(line) < 1000 for line in lines)
    many = {**record["clients"][0], "rows_shown": [{"row": 1, "parts": [["t", True]] * 40}]}
    assert " ... " in "\n".join(plan_parts({**record, "clients": [many]}))


def test_turns_that_are_cut_and_control_text_have_columns_where_there_are_some(world, tmp_path):
    make_talks(tmp_path, length=40)
    rows = [{"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "no"}]}]
    write_rows(tmp_path / "data" / "3" / "local_training_1.json", rows)
    record = make_plan(world(prompt_template="chat", cutoff_len=96), probe=False)
    assert record["clients"][0]["num_cut_turns"] == 24
    assert record["clients"][1]["num_control"] == 1
    heads = next(line for line in "\n".join(plan_parts(record)).splitlines() if line.startswith("client "))
    assert "cut turns  control" in heads


def test_what_the_template_writes_by_itself_is_shown(world, tmp_path):
    (tmp_path / "my.jinja").write_text(TEMPLATE)
    fields = world(prompt_template=str(tmp_path / "my.jinja"), template_date="2026-01-31")
    record = make_plan(fields, probe=False)
    system = "Be kind. Today is 2026-01-31."
    assert record["template"] == {"name": "my.jinja", "date": "2026-01-31", "default_system": system}
    (line,) = (line for line in "\n".join(plan_parts(record)).splitlines() if line.startswith("template "))
    assert "it inserts the date 2026-01-31 (--template_date)" in line
    assert line.endswith(f"where a row has no system turn it writes: {system}")
    assert make_plan(world(), probe=False)["template"] == {"name": "alpaca", "date": None, "default_system": None}
