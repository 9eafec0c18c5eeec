import json

import pytest

from fedlora.config.train import TrainConfig
from fedlora.engines import client_data
from fedlora.engines.client_data import ClientExamples
from fedlora.errors import DataError
from fedlora.llm.base_model import load_base_model
from fedlora.llm.prompts import PromptEncoder
from fedlora.llm.token_files import TokenFiles


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
        return ClientExamples(files, PromptEncoder(base.tokenizer, template), config, tokens)

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
    everything(second)
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


def test_a_client_s_file_that_changes_is_noticed(read):
    for cache in (False, True):
        examples = read(cache=cache, cutoff_len=100 + cache)
        before = examples.training(0)
        rows = json.loads(read.files[0].read_text())
        rows[0]["output"] += "more"
        read.files[0].write_text(json.dumps(rows))
        if cache:
            assert examples.training(0) == before  # the tokens of the file that was counted
        else:
            with pytest.raises(DataError, match=r"local_training_0\.json: changed or gone since the run began"):
                examples.training(0)


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
