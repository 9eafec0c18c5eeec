"""`Run`, `Round` and `Answers`: what they show, hand out and write."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from judge_server import prefers_a, serve

import fedlora as fl
from fedlora.api.answers import Answers
from fedlora.engines import answering
from fedlora.engines.simulation import SimulatedClients
from fedlora.errors import UsageError
from fedlora.llm import base_model
from fedlora.rows import Row, Turn

NAMES = ("library", "north", "south")
SAMPLED = {"temperature": 1.5, "max_new_tokens": 6}


def rows_of(name: str) -> list[dict[str, str]]:
    return [{"instruction": f"say {name} {n}", "output": name * (1 + n % 2), "category": name} for n in range(4)]


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two rounds over silos with names; north fails in the first."""
    folder = tmp_path_factory.mktemp("own")
    train = SimulatedClients._train_one

    def failing(self: SimulatedClients, task: Any) -> Any:
        if (task.round, task.client_id) == (1, 1):
            raise ValueError("no luck")
        return train(self, task)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(SimulatedClients, "_train_one", failing)
        data = fl.silos({name: rows_of(name) for name in NAMES})
        options = {"client_fraction": 1, "batch_size": 2, "epochs": 1, "base_dtype": "float32", "device": "cpu"}
        fl.train(data=data, model=tiny_model, name="own", rounds=2, **options, local_val_set_size=1, progress=False)
    return folder


@pytest.fixture
def run(trained: Path, monkeypatch: pytest.MonkeyPatch) -> fl.Run:
    monkeypatch.chdir(trained)
    return fl.open("models/own")


def files_of(folder: Path) -> set[str]:
    return {str(file) for file in folder.rglob("*")}


def test_the_table_has_losses_bytes_and_the_names_of_excluded_clients(run):
    first, second = repr(run).splitlines()[-2:]
    assert first.split()[:2] == ["1", "2"]
    assert first.endswith("north")
    assert second.split()[:3] == ["2", "3", f"{run[2].metrics['loss']:.3f}"]
    assert f"{run[2].metrics['val_loss']:.3f}" in second
    page = run._repr_html_()
    assert page.count("<tr>") == 3
    assert '<td style="text-align: left">north</td>' in page


def test_a_run_is_a_sequence_of_rounds_counted_from_one(run):
    assert [each.number for each in run] == [1, 2]
    assert (len(run), run[-1].number, run[2].folder) == (2, 2, run.folder / "2")
    assert [row["client_id"] for row in run[1].clients] == [0, 2]
    for number in (0, 3, -3):
        with pytest.raises(UsageError):
            run[number]


def test_everything_a_run_shows_is_json_too(run):
    for value in (run, run[1], run.generate("silos/library.jsonl", max_new_tokens=2, progress=False)):
        assert json.loads(json.dumps(value.as_dict()))
    assert run.metrics()[0]["kind"] == "round"


def test_an_adapter_is_that_of_the_files_by_number_or_name(run):
    stored = safetensors.torch.load_file(run[2].folder / "adapter_model.safetensors")
    assert run[2].adapter().keys() == stored.keys()
    assert all(torch.equal(value, stored[key]) for key, value in run[2].adapter().items())
    south, third = run[2].adapter(client="south"), run[2].adapter(client=2)
    assert all(torch.equal(value, third[key]) for key, value in south.items())
    assert any(not torch.equal(value, stored[key]) for key, value in south.items())
    with pytest.raises(UsageError, match="nort"):
        run[2].adapter(client="nort")
    with pytest.raises(UsageError):
        run[1].adapter(client="north")


def test_an_adapter_that_was_changed_is_not_handed_out(run, tmp_path):
    import shutil

    copy = shutil.copytree(run.folder, tmp_path / "own")
    file = copy / "2" / "global_adapter_model.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(UsageError):
        fl.open(copy)[2].adapter()


def test_a_question_is_answered_by_everyone_in_one_load_and_one_batch_and_nothing_is_written(run, monkeypatch):
    loads, batches = [], []
    load, generate = base_model._load, answering.generate_answers
    monkeypatch.setattr(base_model, "_load", lambda *how: loads.append(how) or load(*how))
    monkeypatch.setattr(
        answering, "generate_answers", lambda *how, **more: batches.append(how) or generate(*how, **more)
    )
    before = files_of(run.folder.parent.parent)
    said = run.answer(["say north 1", {"instruction": "say", "input": "south"}], of=["base", "global", 2], **SAMPLED)
    assert list(said) == ["base", "global", 2]
    assert all(len(texts) == 2 for texts in said.values())
    assert (len(loads), len(batches)) == (1, 1)
    assert files_of(run.folder.parent.parent) == before
    single = run.answer("say north 1", of=["base", "global", 2], **SAMPLED, progress=False)
    assert single == {who: texts[0] for who, texts in said.items()}
    assert list(run.answer("say", of="all", max_new_tokens=2, progress=False)) == ["base", "global", *NAMES]


def test_what_a_run_answers_is_what_generate_writes(run):
    answers = run.generate("silos/south.jsonl", of=["base", "global", "library"], **SAMPLED, overwrite=True)
    assert list(answers.texts) == ["base", "global", "library"]
    assert any(any(texts) for texts in answers.texts.values())
    said = run.answer(rows_of("south"), of=["base", "global", "library"], **SAMPLED, progress=False)
    assert {who: tuple(texts) for who, texts in said.items()} == answers.texts


def test_answers_show_the_last_question_of_a_conversation_and_how_much_came_before(tmp_path):
    before = (Turn("system", "Be\x1b[2J short."), Turn("user", "who?"), Turn("assistant", "Ada"))
    rows = (Row("when\x1b[2J?", "", "1815", "c", before), Row("say", "", "yes", "c"))
    answers = Answers(rows, {"base": tmp_path / "a.jsonl"}, {"base": ("1816", "no")}, {})
    shown = repr(answers).splitlines()
    assert shown[2].split("  ")[0] == "(3 turns) when\\x1b[2J?"
    assert shown[3].split()[0] == "say"
    assert "(3 turns) when\\x1b[2J?</td>" in answers._repr_html_()


TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "say north 1"},
    {"role": "assistant", "content": "north"},
    {"role": "user", "content": "say south"},
]


def test_a_conversation_is_one_question_however_it_is_written(run):
    how = {"max_new_tokens": 6, "template": "chat", "progress": False}
    said = run.answer(TALK, of="base", **how)["base"]
    rest = {"messages": TALK[1:], "system": "Be short.", "category": "c"}
    together = run.answer([TALK, rest, tuple(TALK), {"prompt": "say south"}], of="base", **how)
    assert together["base"][:3] == [said] * 3
    assert isinstance(said, str)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "question 1: .*repeats"),
        (["say", [{"role": "robot", "content": "a"}]], "question 2: .*role"),
        ({"text": "all of it"}, "a text asks nothing"),
        (["say", 3], "question 2: 3 is no question"),
        ({"instruction": 3}, "question 1: .*'instruction' must be text"),
    ],
)
def test_what_cannot_be_asked_is_named_by_its_place(run, question, words):
    with pytest.raises(UsageError, match=words):
        run.answer(question, of="base")


def test_answers_are_scored_from_another_folder_too(run, tmp_path, monkeypatch):
    answers = run.generate("silos/south.jsonl", of=["base", "north"], max_new_tokens=2, overwrite=True, progress=False)
    monkeypatch.chdir(tmp_path)
    scores = answers.score(progress=False)
    assert scores.names == ["base", "north"]
    assert scores["north"].exact_match == 0
    assert (tmp_path / "evaluations_rouge" / "own" / "2" / "client_1_output_rouge.json").is_file()
    assert "say south 0" in repr(answers)
    with pytest.raises(UsageError):
        scores["south"]


def test_a_wrong_name_or_question_is_a_usage_error(run):
    for of, question in (
        ("nort", "say"),
        ([7], "say"),
        ("base", 3),
        ("base", {"input": "x"}),
        ("base", []),
        (None, "say"),
    ):
        with pytest.raises(UsageError):
            run.answer(question, of=of)


def test_a_plot_is_the_figure_of_the_report(run, tmp_path):
    report = run.report(tmp_path / "out" / "own", progress=False)
    assert report.file == tmp_path / "out" / "own" / "report.md"
    assert run.plot()._repr_png_() == report.file.with_name("rounds.png").read_bytes()
    assert run.plot().save(tmp_path / "own.png").read_bytes()[:4] == b"\x89PNG"


def test_a_frame_needs_pandas_and_says_so(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="pandas"):
        run.frame()


def test_a_run_is_verified_and_found_again(run):
    assert run.verify(progress=False).text().endswith("metrics.jsonl: ok")
    assert [line.name for line in fl.runs("models").lines] == ["own"]
    with pytest.raises(UsageError):
        fl.open("models/none")


def test_a_judge_and_everything_else_works_where_an_event_loop_runs(run, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-for-the-loopback")
    run.generate("silos/south.jsonl", of=["base", "global"], max_new_tokens=2, overwrite=True, progress=False)

    async def cell(url: str) -> Any:
        return fl.judge(name="own", of="global", against="base", judge_url=url, judge_model="some", progress=False)

    with serve(prefers_a) as server:
        verdicts = asyncio.run(cell(server.url))
    assert verdicts.judgements[0].record["num_samples"] == 4


def test_a_method_of_ones_own_trains_with_its_fields_as_keywords(run, tiny_model):
    from dataclasses import dataclass

    from fedlora.methods import FedAvg, Method, TrainAndSend

    @dataclass(frozen=True)
    class Plain(FedAvg):
        step: float = 0.5

    method = Method("plain", server=Plain(), client=TrainAndSend(), summary="FedAvg by another name")
    options = {"client_fraction": 1, "batch_size": 2, "epochs": 1, "base_dtype": "float32", "device": "cpu"}
    own = fl.train(data="silos", model=tiny_model, name="plain", rounds=1, method=method, step=0.25, **options)
    assert own.record.config["step"] == 0.25
    with pytest.raises(UsageError, match="stepp"):
        fl.train(data="silos", model=tiny_model, name="plain2", rounds=1, method=method, stepp=0.25, **options)
