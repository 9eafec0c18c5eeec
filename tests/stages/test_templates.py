"""Templates from files, through training, records, answers and resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import CHATML

from fedlora.config.generate import GenerateConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.files import read_json, write_json
from fedlora.paths import RunPaths
from fedlora.runs.checking import seal
from fedlora.runs.run_folder import read_run, read_training
from fedlora.stages import generate, train

TEMPLATE = "{{ 'On ' + strftime_now('%Y-%m-%d') + (' briefly' if brief else '') + ':\n' }}" + CHATML
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three?"},
    {"role": "assistant", "content": "four"},
]


@pytest.fixture
def world(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A working directory with a template, two silos of conversations and a way to train on them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "own.jinja").write_text(TEMPLATE)
    for name in ("north", "south"):
        lines = [{"messages": [*TURNS[:1], {"role": "user", "content": f"{name}?"}, *TURNS[2:]]} for _ in range(4)]
        (tmp_path / "silos").mkdir(exist_ok=True)
        (tmp_path / "silos" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(**options: Any) -> RunPaths:
        given = {
            "exp_name": "run",
            "base_model": str(tiny_model),
            "base_dtype": "float32",
            "device": "cpu",
            "data_path": "silos",
            "client_selection_frac": 1,
            "num_communication_rounds": 1,
            "local_num_epochs": 1,
            "prompt_template": "own",
            **options,
        }
        train.run(TrainConfig.of(**given))
        return RunPaths(Path("models"), given["exp_name"])

    return run


def answer(**options: Any) -> dict[str, Any]:
    """The sidecar of answers to one question of two turns."""
    Path("test.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n")
    given = {"exp_name": "run", "device": "cpu", "base_dtype": "float32", "max_new_tokens": 2, **options}
    (file,) = generate.run(GenerateConfig.of(test_file_path="test.jsonl", overwrite=True, **given)).files
    return read_json(file.with_name(file.name.replace(".jsonl", ".meta.json")))


def test_a_run_keeps_its_template_and_answers_with_it_when_the_file_is_gone(world):
    paths = world(template_kwargs="brief=true", template_date="2026-01-31")
    recorded = read_run(paths).config
    assert recorded["prompt_template"] == "own.jinja"
    assert recorded["template_text"] == TEMPLATE
    assert (recorded["template_kwargs"], recorded["template_date"]) == ({"brief": True}, "2026-01-31")
    assert recorded["token_rule"] == 2
    Path("templates/own.jinja").unlink()
    assert read_training(read_run(paths)).prompting.text == TEMPLATE
    sidecar = answer()
    names = ("prompt_template", "template_text", "template_kwargs", "template_date", "token_rule")
    assert [sidecar[name] for name in names] == ["own.jinja", TEMPLATE, {"brief": True}, "2026-01-31", 2]
    asked = answer(template_kwargs="brief=false", template_date="2026-02-01")
    assert (asked["template_kwargs"], asked["template_date"]) == ({"brief": False}, "2026-02-01")
    assert answer(prompt_template="chat").get("template_text") is None


def test_a_changed_template_is_another_run(world, tiny_model):
    world()
    world()  # finished, and the same
    Path("templates/own.jinja").write_text(TEMPLATE + " ")
    with pytest.raises(UsageError, match=r"another configuration .*template_text: other text"):
        world()
    with pytest.raises(UsageError, match="template_date: '2024-07-26' -> '2025-01-01'"):
        world(prompt_template="own", template_date="2025-01-01")


def test_a_template_is_found_by_file_or_by_name_and_a_wrong_name_lists_what_there_is(world):
    Path("elsewhere.j2").write_text(CHATML)
    assert TrainConfig.of(prompt_template="elsewhere.j2").template_text == CHATML
    assert TrainConfig.of(prompt_template="own").template_text == TEMPLATE
    assert TrainConfig.of(prompt_template="chat").template_text == ""
    for name, what in (("chatt", "did you mean chat"), ("gone.jinja", "no such file"), ("ownn", "did you mean own")):
        with pytest.raises(UsageError, match=what):
            TrainConfig.of(prompt_template=name)
    Path("templates/blank.jinja").write_text(" \n")
    with pytest.raises(UsageError, match="is empty"):
        TrainConfig.of(prompt_template="blank")
    Path("templates/odd.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not a readable template"):
        TrainConfig.of(prompt_template="odd")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"template_kwargs": "brief"}, "not name=value"),
        ({"template_date": "yesterday"}, "not a date"),
        ({"template_date": ""}, "template_date"),
        ({"train_on_inputs": True, "train_on": "last"}, "leave one of them out"),
    ],
)
def test_settings_that_say_nothing_are_refused(options, what):
    with pytest.raises(UsageError, match=what):
        TrainConfig.of(**options)


def test_alpaca_refuses_conversations_before_anything_is_trained_and_names_the_template(world):
    with pytest.raises(UsageError, match="no place for a system turn") as refused:
        world(prompt_template="alpaca")
    assert "chat" in refused.value.hint
    assert not (Path("models") / "run" / "1").exists()


def test_what_is_trained_decides_the_adapter_and_the_cache_of_tokens_knows_it(world):
    adapters = []
    for name, train_on in (("a", "assistant"), ("b", "last"), ("c", "all"), ("d", "assistant")):
        paths = world(exp_name=name, train_on=train_on, seed=1)
        adapters.append((paths.root / "1" / "global_adapter_model.bin").read_bytes())
        tokens = [facts.num_response_tokens for facts in read_run(paths).clients]
        assert tokens == {"assistant": [36, 36], "last": [20, 20]}.get(train_on, tokens)
    assert len(set(adapters[:3])) == 3
    assert adapters[3] == adapters[0]


def test_an_earlier_run_answers_by_its_own_token_rule_with_a_note_and_is_not_resumed(world, capsys):
    row = {"instruction": "one?", "output": "two"}
    for name in ("north", "south"):
        (Path("silos") / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    paths = world(prompt_template="chat")
    # what a run of an earlier release recorded
    value = read_json(paths.run_file)
    del value["config"]["token_rule"]
    write_json(paths.run_file, seal({name: each for name, each in value.items() if name != "sha256"}))
    assert read_training(read_run(paths)).token_rule == 1
    with pytest.raises(UsageError, match="token_rule: 1 -> 2") as refused:
        world(prompt_template="chat", num_communication_rounds=2)
    assert "tokenised by an earlier rule" in refused.value.hint
    Path("test.jsonl").write_text(json.dumps(row) + "\n")
    given = {"exp_name": "run", "device": "cpu", "base_dtype": "float32", "max_new_tokens": 2}
    (file,) = generate.run(GenerateConfig.of(test_file_path="test.jsonl", **given)).files
    assert "tokenised in parts" in capsys.readouterr().err
    # the sidecar is that of the earlier release, so answers that lie there are found
    assert "token_rule" not in read_json(file.with_name("global_output.meta.json"))
