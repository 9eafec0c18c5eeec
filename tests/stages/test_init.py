"""fedlora init: the run.yaml that it writes is taken unchanged, and fits the rows."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from fedlora import cli
from fedlora.config.init import InitRunConfig
from fedlora.config.plan import PlanConfig
from fedlora.config.train import TrainConfig
from fedlora.config.yaml_file import read_yaml
from fedlora.data.client_facts import read_client_files
from fedlora.data.client_files import client_files_of
from fedlora.data.records import iter_rows
from fedlora.errors import DataError, UsageError
from fedlora.stages import init, plan


def write_rows(path: Path, count: int, **more: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"instruction": f"{path.stem} {number}", "response": "yes", **more} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_silos(folder: Path, **sizes: int) -> Path:
    for name, size in sizes.items():
        write_rows(folder / f"{name}.jsonl", size)
    return folder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(folder: str = "silos", **more: str) -> TrainConfig:
    init.run(InitRunConfig.of(data=folder, **more))
    return TrainConfig.make({}, file=Path("run.yaml"))


def test_the_file_names_the_rows_and_is_taken_by_plan_and_train(tmp_path, tiny_model):
    make_silos(tmp_path / "silos", library=24, museum=40)
    result = init.run(InitRunConfig.of(data="silos", model=str(tiny_model)))
    assert result.text() == "run.yaml: 2 clients, 64 rows"
    assert result.next_command == "fedlora plan run.yaml"
    text = Path("run.yaml").read_text()
    assert "2 clients, 64 rows: library 24, museum 40" in text
    assert "written by `fedlora init silos`" in text
    made = plan.run(PlanConfig.make({"probe": False}, file=Path("run.yaml")))
    assert [client["num_test"] for client in made.record["clients"]] == [5, 8]
    assert made.record["rounds"] == 6
    assert cli.main(["train", "run.yaml", "--rounds", "1", "--device", "cpu", "--token_cache", "false"]) == 0
    assert (tmp_path / "models" / "silos" / "1" / "manifest.json").is_file()


def test_the_embedded_model_gets_its_template_and_learning_rate_and_every_client_takes_part(tmp_path):
    make_silos(tmp_path / "silos", a=200, b=200)
    config = written()
    assert (config.base_model, config.prompt_template, config.local_learning_rate) == ("smollm2-135m", "chat", 2e-3)
    assert (config.client_selection_frac, config.local_batch_size, config.local_num_epochs) == (1.0, 16, 1)
    config = written(base_model="other", overwrite=True)
    assert (config.base_model, config.prompt_template, config.local_learning_rate) == ("other", "alpaca", 3e-4)


@pytest.mark.parametrize("smallest", [1, 2, 4, 5, 9, 20, 63, 400])
def test_the_smallest_client_keeps_a_batch_to_train_on_whatever_is_held_out(tmp_path, smallest):
    make_silos(tmp_path / "silos", small=smallest, large=500)
    config = written()
    files = client_files_of(config)
    facts = [client.facts for client in read_client_files(dict(enumerate(files)), config).values()]
    assert config.local_batch_size <= facts[1].num_examples
    assert facts[1].num_examples + facts[1].num_validation + facts[1].num_test == smallest
    assert (config.test_share > 0) == (smallest >= 5)


def test_test_rows_beside_the_clients_take_the_place_of_a_share(tmp_path):
    make_silos(tmp_path / "silos", a=20, b=20)
    write_rows(tmp_path / "silos" / "a.test.jsonl", 3)
    assert written().test_share == 0
    assert "have files of their own: a 3." in Path("run.yaml").read_text()
    client_files_of(TrainConfig.make({}, file=Path("run.yaml")))


def test_a_client_without_a_response_is_named_and_does_not_decide_the_batch(tmp_path, capsys):
    make_silos(tmp_path / "silos", a=20, b=20)
    (tmp_path / "silos" / "c.jsonl").write_text('{"instruction": "x", "response": ""}\n')
    assert written().local_batch_size > 1
    assert "warning: c has no row to train on" in capsys.readouterr().err
    for name in "ab":
        (tmp_path / "silos" / f"{name}.jsonl").write_text('{"instruction": "x", "response": ""}\n')
    with pytest.raises(DataError, match="no row has a response"):
        written(overwrite=True)


@pytest.mark.parametrize("name", ["my silos: 1", "-x", "Größe", "con", 'a\'b "c" #d'])
def test_any_name_of_a_folder_gives_a_file_that_is_read(tmp_path, name):
    make_silos(tmp_path / name, a=8, b=8)
    init.run(InitRunConfig.of(data=tmp_path / name))
    config = TrainConfig.make({}, file=Path("run.yaml"))
    assert config.data_path == tmp_path / name
    assert len(client_files_of(config)) == 2
    assert read_yaml(Path("run.yaml"))["name"] == config.exp_name


@pytest.mark.parametrize("place", ["rows.jsonl", "one/rows.jsonl"])
def test_one_file_gets_the_commands_that_make_clients_of_it(tmp_path, place, capsys):
    write_rows(tmp_path / place, 101)
    with pytest.raises(UsageError, match=f"{place} is one file of rows") as caught:
        init.run(InitRunConfig.of(data=Path(place).parent if "/" in place else place))
    first, second = caught.value.hint.split("`")[1::2]
    assert cli.main(shlex.split(first)[1:]) == 0
    assert cli.main(shlex.split(second)[1:]) == 0
    config = TrainConfig.make({}, file=Path("run.yaml"))
    assert (config.num_clients, len(client_files_of(config))) == (4, 4)
    assert "4 clients, 81 rows" in capsys.readouterr().out


def test_rows_with_categories_are_split_by_these(tmp_path):
    rows = [{"instruction": f"say {n}", "output": "x", "category": f"c{n % 3}"} for n in range(31)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(UsageError) as caught:
        init.run(InitRunConfig.of(data="rows.json"))
    first = caught.value.hint.split("`")[1]
    assert "partition" not in first
    assert cli.main(shlex.split(first)[1:]) == 0
    assert (tmp_path / "data" / "rows" / "3" / "local_training_2.json").is_file()


def test_too_few_rows_an_existing_file_and_a_missing_folder_are_errors(tmp_path):
    write_rows(tmp_path / "rows.jsonl", 9)
    with pytest.raises(UsageError, match="9 rows with different prompts and a response are too few"):
        init.run(InitRunConfig.of(data="rows.jsonl"))
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        init.run(InitRunConfig.of(data="nowhere"))
    make_silos(tmp_path / "silos", a=8, b=8)
    (tmp_path / "run.yaml").write_text("mine: 1\n")
    with pytest.raises(UsageError, match=r"run.yaml: exists"):
        init.run(InitRunConfig.of(data="silos"))
    assert (tmp_path / "run.yaml").read_text() == "mine: 1\n"
    with pytest.raises(UsageError, match=r"not a .yaml file"):
        init.run(InitRunConfig.of(data="silos", config_file="run.txt"))


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]


def test_conversations_get_a_template_that_takes_them_and_kinds_are_counted(tmp_path):
    make_silos(tmp_path / "silos", a=6)
    rows = [{"messages": talk(f"b {number}", "yes", "more", "no")} for number in range(8)]
    (tmp_path / "silos" / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = init.run(InitRunConfig.of(data="silos", model="other"))
    assert result.text() == "run.yaml: 2 clients, 14 rows (6 instruction rows, 8 conversations)"
    assert result.as_dict()["kinds"] == {"instruction": 6, "conversation": 8}
    text = Path("run.yaml").read_text()
    assert "# The rows with a response: 6 instruction rows, 8 conversations.\n" in text
    assert "alpaca takes neither a system turn nor several turns" in text
    assert read_yaml(Path("run.yaml"))["template"] == "chat"


def test_texts_are_measured_and_not_answered(tmp_path):
    (tmp_path / "silos").mkdir()
    for name in "ab":
        rows = [{"text": f"{name} {number}"} for number in range(8)]
        (tmp_path / "silos" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    init.run(InitRunConfig.of(data="silos", model="other"))
    text = Path("run.yaml").read_text()
    assert "16 texts" in text
    assert "Then `fedlora loss silos --test silos --of base,global`" in text
    assert "fedlora generate" not in text


def test_one_file_of_conversations_is_split_like_any_other(tmp_path):
    rows = [{"conversations": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": "a"}]} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError) as caught:
        init.run(InitRunConfig.of(data="rows.jsonl"))
    first, second = caught.value.hint.split("`")[1::2]
    assert cli.main(shlex.split(first)[1:]) == 0
    assert cli.main(shlex.split(second)[1:]) == 0
    assert "(32 conversations)" not in Path("run.yaml").read_text()
    assert "The rows with a response: 32 conversations." in Path("run.yaml").read_text()


def test_rows_of_other_columns_get_a_configuration_that_names_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("silos").mkdir()
    for name in ("north", "south"):
        lines = [json.dumps({"q": {"text": f"{name} {n}?"}, "a": [f"{n}"]}) for n in range(12)]
        Path(f"silos/{name}.jsonl").write_text("\n".join(lines) + "\n")
    columns = "instruction=q.text,response=a.0"
    init.run(InitRunConfig.of(data_path="silos", columns=columns))
    text = Path("run.yaml").read_text()
    assert "columns: {instruction: q.text, response: a.0}" in text
    assert f"fedlora init silos --columns {columns}`" in text
    assert f"--test silos --columns {columns} --of base,global`" in text
    made = TrainConfig.make({}, file=Path("run.yaml"))
    assert made.columns == {"instruction": "q.text", "response": "a.0"}
    assert [len(list(iter_rows(file, rules=made.read_rules))) for file in sorted(Path("silos").iterdir())] == [12, 12]
    Path("silos/south.jsonl").unlink()
    with pytest.raises(UsageError) as refused:
        init.run(InitRunConfig.of(data_path="silos", columns=columns))
    assert f"--test_share 0.2 --columns {columns}`, then `fedlora init data/north`" in refused.value.hint
