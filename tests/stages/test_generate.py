import json

import pytest

from fedlora.config.evaluate import EvaluateRougeConfig
from fedlora.config.generate import GenerateConfig
from fedlora.config.train import TrainConfig
from fedlora.engines import answering
from fedlora.errors import UsageError
from fedlora.files import sha256_of
from fedlora.llm import resident_base
from fedlora.stages import evaluate_rouge, generate, train


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """One run of homo and one of none on the tiny model, and a way to generate with them."""
    root = tmp_path_factory.mktemp("runs")
    data = root / "data" / "2"
    data.mkdir(parents=True)
    for client in range(2):
        rows = [
            {"instruction": f"q{client} {n}", "input": "", "output": "yes no"[client * 4 :], "category": f"c{client}"}
            for n in range(4)
        ]
        (data / f"local_training_{client}.json").write_text(json.dumps(rows))
    test_rows = [
        {"instruction": "x" * (5 * n % 23), "input": "i" * (n % 2), "output": "yes", "category": "c0"} for n in range(9)
    ]
    (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test_rows))
    for mode in ("homo", "none"):
        train.run(
            TrainConfig.of(
                exp_name=mode,
                federation_mode=mode,
                base_model=str(tiny_model),
                base_dtype="float32",
                device="cpu",
                data_path=root / "data",
                model_dir=root / "models",
                num_clients=2,
                client_selection_frac=0.5 if mode == "none" else 1.0,
                client_selection_strategy="round_robin",
                num_communication_rounds=2,
                local_num_epochs=8,
                local_learning_rate=3e-2,
                prompt_template="chat",
            )
        )

    def result(out: str, **options):
        defaults = {"exp_name": "homo", "communication_rounds": 2, "max_new_tokens": 6, "device": "cpu"}
        config = {
            **defaults,
            "base_dtype": "float32",
            "model_dir": root / "models",
            "prediction_dir": root / out,
            "test_file_path": root / "test.jsonl",
            **options,
        }
        return generate.run(GenerateConfig.of(**config))

    def run(out: str, **options):
        return result(out, **options).files

    run.root, run.result = root, result
    return run


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_come_in_the_order_of_the_test_file_with_exactly_four_fields(trained):
    (file,) = trained("one")
    expected = rows_of(trained.root / "test.jsonl")
    found = rows_of(file)
    assert file == trained.root / "one/homo/2/global_output.jsonl"
    assert [list(row) for row in found] == [["instruction", "input", "answer", "category"]] * 9
    assert [(row["instruction"], row["input"]) for row in found] == [
        (row["instruction"], row["input"]) for row in expected
    ]


def test_batching_changes_no_answer(trained):
    hashes = {
        sha256_of(trained(f"batch{number}", **options)[0])
        for number, options in enumerate(({}, {"batch_size": 1}, {"batch_size": 4}, {"tokens_per_pass": 80}))
    }
    assert len(hashes) == 1


def test_the_sidecar_traces_the_answers(trained):
    (file,) = trained("sidecar", preset="reference", temperature="0.7")
    meta = json.loads(file.with_name("global_output.meta.json").read_text())
    adapter = trained.root / "models/homo/2/adapter_model.safetensors"
    assert meta["adapter_sha256"] == sha256_of(adapter)
    assert meta["predictions_sha256"] == sha256_of(file)
    assert meta["test_file_sha256"] == sha256_of(trained.root / "test.jsonl")
    assert (meta["prompt_template"], meta["num_rows"]) == ("chat", 9)
    assert meta["decoding"] == {
        "preset": "reference",
        "temperature": 0.7,
        "top_p": 0.75,
        "top_k": 50,
        "repetition_penalty": 1.1,
        "max_new_tokens": 6,
        "seed": 309,
    }


def test_all_answers_with_base_global_and_every_client_as_the_single_calls_do(trained):
    files = trained("all", all=True)
    assert [file.name for file in files] == [
        "base_output.jsonl",
        "global_output.jsonl",
        "client_0_output.jsonl",
        "client_1_output.jsonl",
    ]
    singles = [{"is_base_model": True}, {}, {"is_global_model": False}, {"is_global_model": False, "client_id": 1}]
    for file, options in zip(files, singles, strict=True):
        assert sha256_of(trained("single", **options)[0]) == sha256_of(file)
    assert len({sha256_of(file) for file in files}) > 2


def test_who_answers_may_be_named_with_of_and_needs_no_round(trained):
    files = trained("of", of=["global", "none/2/0", "base"], communication_rounds="last")
    assert [str(file.relative_to(trained.root)) for file in files] == [
        "of/homo/2/global_output.jsonl",
        "of/none/2/client_0_output.jsonl",
        "of/homo/2/base_output.jsonl",
    ]
    singles = [{}, {"exp_name": "none", "is_global_model": False}, {"is_base_model": True}]
    for file, options in zip(files, singles, strict=True):
        assert sha256_of(trained("single", **options)[0]) == sha256_of(file)


def test_runs_on_one_base_share_one_load_of_it(trained, monkeypatch):
    loads = []
    load = resident_base.load_base_model
    monkeypatch.setattr(resident_base, "load_base_model", lambda name, **how: loads.append(name) or load(name, **how))
    trained("shared", of="global,none/2/0-1,homo/1/global")
    assert len(loads) == 1


def test_the_result_names_who_answered_and_holds_the_answers(trained):
    found = trained.result("named", of="base,1", communication_rounds=None)
    assert [answers.name for answers in found.answers] == ["base", "client 1"]
    assert found.answers[1].texts == tuple(row["answer"] for row in rows_of(found.files[1]))
    assert found.as_dict()["answers"][1] == {
        "name": "client 1",
        "of": "homo/2/1",
        "run": "homo",
        "round": 2,
        "file": str(trained.root / "named/homo/2/client_1_output.jsonl"),
    }


def test_adapters_answer_together_while_rows_are_few_and_ranks_small(trained, monkeypatch):
    monkeypatch.setattr(answering, "TOGETHER_ROWS", 20)
    files = trained("groups", all=True)
    together = [json.loads(file.with_suffix(".meta.json").read_text())["answered_together"] for file in files]
    assert together == [["base"], ["global", "client_0"], ["global", "client_0"], ["client_1"]]
    monkeypatch.setattr(answering, "TOGETHER_ROWS", 10**6)
    for rank, size in ((4, 1), (11, 2), (10**6, 3)):
        monkeypatch.setattr(answering, "TOGETHER_RANK", rank)
        meta = trained(f"rank{rank}", all=True)[1].with_suffix(".meta.json")
        assert len(json.loads(meta.read_text())["answered_together"]) == size


def test_a_second_call_answers_nothing_and_other_settings_need_overwrite(trained, capsys):
    (file,) = trained("twice")
    stamp = file.stat().st_mtime_ns
    trained("twice")
    assert "already answered" in capsys.readouterr().err
    assert file.stat().st_mtime_ns == stamp
    with pytest.raises(UsageError, match="made with other settings lie there \\(different: decoding\\)"):
        trained("twice", max_new_tokens=5)
    assert file.stat().st_mtime_ns == stamp
    trained("twice", max_new_tokens=5, overwrite=True)
    assert file.stat().st_mtime_ns != stamp


def test_the_room_for_the_answer_is_the_context_and_not_the_run_s_cutoff(trained):
    """Prompts of 39 tokens and less fit into 40, but not beside an answer of 20."""
    (wide,), (narrow,) = trained("wide", max_new_tokens=20), trained("narrow", max_new_tokens=20, cutoff_len=40)
    metas = [json.loads(file.with_suffix(".meta.json").read_text()) for file in (wide, narrow)]
    assert [meta["num_shortened"] for meta in metas] == [0, 0]
    assert sha256_of(wide) == sha256_of(narrow)


def test_answers_of_older_versions_count_as_made_where_no_prompt_was_shortened(trained):
    (file,) = trained("older")
    sidecar = file.with_suffix(".meta.json")
    meta = json.loads(sidecar.read_text())
    del meta["answer_room"]
    sidecar.write_text(json.dumps(meta))
    assert trained("older") == (file,)
    sidecar.write_text(json.dumps({**meta, "num_shortened": 1}))
    with pytest.raises(UsageError, match="different: answer_room"):
        trained("older")


def test_a_missing_adapter_names_the_rounds_that_have_one(trained):
    with pytest.raises(UsageError, match="no global adapter; no round has one"):
        trained("x", exp_name="none")
    with pytest.raises(UsageError, match="no adapter of client 1; round 2 has one"):
        trained("x", exp_name="none", is_global_model=False, client_id=1, communication_rounds=1)
    with pytest.raises(UsageError, match="rounds 1-2 have one"):
        trained("x", communication_rounds=7)
    with pytest.raises(UsageError, match="no run of this name"):
        trained("x", exp_name="nobody")
    with pytest.raises(UsageError, match="there are rounds 1-2"):
        trained("x", communication_rounds=7, all=True)


def test_a_base_model_that_is_none_is_refused_before_it_is_compared_with_the_runs(trained, tmp_path):
    with pytest.raises(UsageError, match="the folder is empty"):
        trained("x", base_model=str(tmp_path))


def test_the_base_model_answers_without_a_run(trained, tiny_model):
    (file,) = trained("base", exp_name="nobody", is_base_model=True, base_model=str(tiny_model), prompt_template="chat")
    assert file.name == "base_output.jsonl"
    assert sha256_of(file) == sha256_of(trained("base2", is_base_model=True)[0])
    named = trained(
        "base3", exp_name="nobody", of="base", communication_rounds="", model=str(tiny_model), prompt_template="chat"
    )
    assert named == (trained.root / "base3/nobody/20/base_output.jsonl",)
    assert sha256_of(file) == sha256_of(named[0])


def test_all_and_a_single_subject_together_are_refused(trained):
    with pytest.raises(UsageError, match="all answers with everyone"):
        trained("x", all=True, client_id=0)
    with pytest.raises(UsageError, match="of_subjects takes the place of all"):
        trained("x", all=True, of="base")


def test_the_runs_own_prompt_template_is_used_unless_another_is_named(trained):
    auto, chat, alpaca = (
        sha256_of(trained(f"template_{name}", prompt_template=name)[0]) for name in ("auto", "chat", "alpaca")
    )
    assert auto == chat != alpaca


TALK = [
    {"role": "system", "content": "short"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]
KINDS = {
    "messages": [{"messages": [*TALK, {"role": "assistant", "content": "yes"}], "category": "x"}],
    "completion": [{"prompt": "once", "completion": " upon", "category": "x"}],
    "instruction": [{"instruction": "a", "input": "b", "system": "short", "output": "yes", "category": "x"}],
}


def test_a_prediction_holds_what_was_asked_as_the_kind_of_row_that_it_was(trained):
    answered = {
        "messages": {"messages": TALK, "category": "x"},
        "completion": {"prompt": "once", "category": "x"},
        "instruction": {"instruction": "a", "input": "b", "system": "short", "category": "x"},
    }
    for kind, rows in KINDS.items():
        test = trained.root / f"{kind}.jsonl"
        test.write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = trained.result("kinds", test_file_path=test, overwrite=True)
        (found,) = rows_of(result.files[0])
        assert found.pop("answer") == result.answers[0].texts[0]
        assert found == answered[kind]


def test_questions_without_a_reply_are_answered_as_those_with_one(trained):
    whole, alone = trained.root / "whole.jsonl", trained.root / "alone.jsonl"
    rows = [{"instruction": "a", "output": "yes"}, {"messages": [*TALK, {"role": "assistant", "content": "so"}]}]
    whole.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone.write_text("".join(json.dumps(row) + "\n" for row in [{"instruction": "a"}, {"messages": TALK}]))
    made = [
        trained.result(f"asked {file.stem}", test_file_path=file, row_kind="any").answers[0].texts
        for file in (whole, alone)
    ]
    assert made[0] == made[1]


def test_a_folder_of_silos_of_several_kinds_is_answered_and_scored_in_one_file(trained):
    folder = trained.root / "mixed"
    folder.mkdir()
    for kind, rows in KINDS.items():
        for name in (f"{kind}.jsonl", f"{kind}.test.jsonl"):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = trained.result("mixed", test_file_path=folder)
    assert [line["client"] for line in rows_of(result.files[0])] == ["completion", "instruction", "messages"]
    assert len(result.answers[0].texts) == 3
    config = {"exp_name": "homo", "target_file": folder, "evaluation_dir": trained.root / "scores"}
    places = {"prediction_dir": trained.root / "mixed", "model_dir": trained.root / "models"}
    scores = evaluate_rouge.run(EvaluateRougeConfig.of(**config, **places))
    assert scores.scores[0].num_rows == 3


def test_plain_text_is_refused_before_a_model_is_loaded(trained, monkeypatch):
    monkeypatch.setattr(resident_base, "load_base_model", lambda *how, **more: pytest.fail("loaded"))
    test = trained.root / "texts.jsonl"
    test.write_text('{"text": "all of it"}\n{"text": "more"}\n')
    with pytest.raises(UsageError, match="2 of 2 rows are plain text, and a text asks nothing") as caught:
        trained("texts", test_file_path=test)
    assert f"fedlora loss --test {test}" in caught.value.hint
