"""Dolly-15k through the embedded model's tokenizer: the ids of every prompt and of every reply, uncut."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fedlora.data.records import read_rows
from fedlora.errors import UsageError
from fedlora.llm.examples import encode_rows
from fedlora.llm.prompts import PromptEncoder
from fedlora.llm.row_text import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT
from fedlora.rows import Row

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    given = os.environ.get("FEDLORA_DOLLY")
    file = Path(given) if given else Path(__file__).parents[2] / "shared" / "data" / "dolly-15k.jsonl"
    if not file.is_file():
        pytest.skip(f"{file}: no such file; set FEDLORA_DOLLY to the databricks-dolly-15k file")
    return read_rows(file)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from fedlora.llm import embedded_model

    try:
        return AutoTokenizer.from_pretrained(embedded_model.folder())
    except UsageError as error:
        pytest.skip(f"{error}; {error.hint}")


def whole_ids(tokenizer: Any, row: Row, template: str) -> tuple[list[int], list[int]]:
    """The tokenizer's own ids of the prompt, and of prompt and reply together without what follows the reply."""
    if template == "chat":
        turns = [turn.as_dict() for turn in row.turns]
        prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
        return prompt, tokenizer.apply_chat_template(turns, return_dict=False)
    head, *middle, tail = ALPACA_WITH_INPUT if row.input else ALPACA_WITHOUT_INPUT
    text = head + row.instruction + (middle[0] + row.input if middle else "") + tail
    return tokenizer(text)["input_ids"], tokenizer(text + row.output)["input_ids"]


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_no_prompt_of_dolly_has_other_ids_than_the_tokenizers_own(rows, tokenizer, template):
    encoder = PromptEncoder(tokenizer, template)
    found = encode_rows(rows, encoder, cutoff=10**6)
    assert (len(rows), len(found.examples), found.counts.num_control) == (15_011, 15_011, 0)
    apart = 0
    for row, example in zip(rows, found.examples, strict=True):
        prompt, whole = whole_ids(tokenizer, row, template)
        ids = list(example.ids)
        assert ids[: example.labels_from] == prompt
        assert ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        if whole[: len(prompt)] == prompt:
            assert ids[:-1] == whole[: len(ids) - 1]
        else:
            apart += 1
    assert apart == found.counts.num_apart
    # SmolLM2's tokenizer joins a line break at the end of an Alpaca prompt with those that some replies begin with
    assert apart <= 15


@pytest.mark.parametrize("cutoff", [64, 128, 512])
def test_every_row_of_dolly_carries_labels_at_any_cutoff_that_has_room(rows, tokenizer, cutoff):
    found = encode_rows(rows, PromptEncoder(tokenizer, "chat"), cutoff=cutoff)
    assert len(found.examples) == 15_011
    assert all(example.num_labels > 0 and len(example.ids) <= cutoff for example in found.examples)
