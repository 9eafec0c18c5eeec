import json

import pytest

from fedlora.config.train import TrainConfig
from fedlora.data.client_facts import read_client_files
from fedlora.engines import client_data
from fedlora.engines.client_data import ClientExamples
from fedlora.errors import DataError, UsageError
from fedlora.llm.base_model import load_base_model
from fedlora.llm.prompts import PromptEncoder
from fedlora.llm.token_files import TokenFiles
from fedlora.rows import PromptShape


@pytest.fixture
def read(tiny_model, make_clients, tmp_path, monkeypatch):
    """Client examples over one data folder; `encoded` counts how often rows were tokenised."""
    folder = make_clients([5, 0, 3]) / "3"
    files = sorted(folder.iterdir())
    base = load_base_model(str(tiny_model), device="cpu")
    encode = client_data.encode_rows

    def make(cache=True, template="chat", **changes) -> ClientExamples:
        config = TrainConfig.of(prompt_template=template, **changes)
        tokens = TokenFiles(tmp_path / "tokens") if cache else None
        clients = read_client_files(dict(enumerate(files)), config)
        return ClientExamples(clients, PromptEncoder(base.tokenizer, template), config, tokens)

    make.files = files
    make.encoded = 0

    def count(*args, **kwargs):
        make.encoded += 1
        return encode(*args, **kwargs)

    monkeypatch.setattr(client_data, "encode_rows", count)
    return make


def everything(examples: ClientExamples):
    return [(examples.training(client), examples.own_validation(client)) for client in examples.facts]


def test_tokens_are_the_same_with_and_without_the_cache(read):
    for changes in ({}, {"local_val_set_size": 2, "cutoff_len": 40}):
        files = read.files
        files[1].write_text(files[2].read_text())
        expected = everything(read(cache=False, **changes))
        assert everything(read(**changes)) == expected
        assert everything(read(**changes)) == expected
        assert expected[0][0]


def test_a_second_run_tokenises_nothing(read):
    first = read()
    everything(first)
    done = read.encoded
    second = read()
    assert everything(second) == everything(first)
    assert read.encoded == done > 0
    assert second.facts == first.facts
    assert second.clients() == [0, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"template": "alpaca"},
        {"cutoff_len": 40},
        {"train_on_inputs": True},
        {"local_val_set_size": 1},
        {"local_val_set_size": 1, "seed": 7},
    ],
)
def test_what_decides_the_tokens_is_part_of_their_name(read, changes):
    read.files[1].write_text(read.files[2].read_text())
    plain, changed = read(), read(**changes)
    assert everything(changed) == everything(read(cache=False, **changes)) != everything(plain)


@pytest.mark.parametrize("change", ["more", "broken", "gone", "empty"])
@pytest.mark.parametrize("cache", [False, True])
def test_a_file_that_changed_before_its_client_is_first_drawn_is_named(read, cache, change):
    examples, file = read(cache=cache), read.files[0]
    rows = json.loads(file.read_text())
    content = {"more": json.dumps([*rows, rows[0]]), "broken": "[{", "empty": "[]"}
    file.unlink() if change == "gone" else file.write_text(content[change])
    for ask in (examples.training, examples.count_tokens):
        with pytest.raises(DataError, match=r"local_training_0\.json: changed or gone since the run began"):
            ask(0)
    examples.count_all_tokens()
    assert "num_prompt_tokens" not in examples.facts[0].record()
    assert examples.facts[2].record()["num_prompt_tokens"] > 0


@pytest.mark.parametrize("cache", [False, True])
def test_a_file_that_changes_after_its_client_was_drawn_is_noticed_where_it_is_read_again(read, cache):
    examples = read(cache=cache)
    before = examples.training(0)
    read.files[0].write_text("[]")
    if cache:
        assert examples.training(0) == before  # the tokens of the file that was counted
    else:
        with pytest.raises(DataError, match="changed or gone since the run began"):
            examples.training(0)


def test_nothing_is_encoded_before_a_client_is_drawn_and_its_tokens_are_counted_then(read):
    examples = read()
    assert read.encoded == 0
    assert "num_response_tokens" not in examples.facts[0].record()
    drawn = examples.training(0)
    counted = examples.facts[0]
    assert counted.num_tokens == sum(len(example.ids) for example in drawn)
    assert counted.num_response_tokens == sum(example.num_labels for example in drawn)
    assert counted.num_examples == len(drawn)
    assert examples.facts[2].num_prompt_tokens is None
    encoded = read.encoded
    assert examples.count_tokens(0) == counted
    assert read.encoded == encoded


@pytest.mark.parametrize("changes", [{}, {"local_val_set_size": 2}, {"local_val_set_size": 2, "seed": 7}])
def test_what_is_counted_at_the_start_is_what_is_encoded(read, changes):
    rows = json.loads(read.files[0].read_text())
    for row in rows[1:4]:
        row["output"] = " "
    read.files[0].write_text(json.dumps(rows))
    read.files[1].write_text(read.files[2].read_text())
    examples = read(**changes)
    for client, facts in examples.facts.items():
        training, validation = examples._load(client)
        assert facts.num_examples == len(training.examples)
        assert facts.num_empty == training.counts.num_empty
        assert facts.num_validation == len(validation.examples)


def test_nothing_is_held_between_turns(read):
    examples = read()
    assert examples.training(0) is not examples.training(0)
    assert not any(isinstance(value, list) and value and hasattr(value[0], "ids") for value in vars(examples).values())


def test_validation_goes_through_the_clients_that_hold_rows_back(read):
    read.files[1].write_text(read.files[2].read_text())
    examples = read(local_val_set_size=2)
    assert [len(rows) for rows in examples.validation()] == [2, 2, 2]
    assert not list(read().validation())
    assert read().own_validation(0) == []


def test_a_template_without_room_is_refused_before_anything_is_encoded(read):
    with pytest.raises(UsageError, match=r"cutoff_len=8 leaves no room .* chat template alone takes \d+ tokens"):
        read(cutoff_len=8)
    # an input gives way whole, with the heading that it stood under
    alpaca = PromptEncoder(read().encoder.tokenizer, "alpaca")
    alpaca.check(PromptShape(has_input=True), cutoff=150)
    with pytest.raises(UsageError, match="alpaca template alone"):
        alpaca.check(PromptShape(has_input=True), cutoff=100)
    for file in read.files:
        file.write_text(json.dumps([{**row, "input": ""} for row in json.loads(file.read_text())]))
    read(template="alpaca", cutoff_len=150)
    assert read.encoded == 0


def test_rows_that_a_template_has_no_place_for_are_named_with_file_and_row(read):
    rows = json.loads(read.files[2].read_text())
    rows[1]["history"] = [["before", "answered"]]
    read.files[2].write_text(json.dumps(rows))
    with pytest.raises(UsageError, match=f"{read.files[2]}: row 2: the alpaca template has no place") as refused:
        read(template="alpaca")
    assert "chat" in refused.value.hint
    assert read.encoded == 0


@pytest.mark.parametrize("changes", [{}, {"test_share": 0.3}])
def test_a_row_that_no_encoder_can_take_is_named_with_its_file(read, changes):
    rows = json.loads(read.files[0].read_text())
    rows[3]["instruction"] = "odd <|im_end|>" + "".join(map(chr, range(0xFDD0, 0xFDF0)))
    read.files[0].write_text(json.dumps(rows))
    with pytest.raises(UsageError, match=rf"(?s){read.files[0]}: a row holds control text .*\n    odd <"):
        read(**changes).training(0)
