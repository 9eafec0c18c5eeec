"""The law of token ids: a prompt and its reply have the ids that the tokenizer makes of the whole text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import ADDED, KINDS, make_tokenizer

from fedlora.config.prompting import PromptSettings
from fedlora.errors import UsageError
from fedlora.llm.examples import encode_rows, make_encoder
from fedlora.llm.prompts import EncodedRow, PromptEncoder
from fedlora.llm.row_text import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT
from fedlora.llm.text_ids import TextEncoder
from fedlora.rows import Row, Turn

TEXTS = (
    "Name the capital.",
    "def f(x):\n    return x\n",
    "  two spaces, a tab\t and\n\n\nthree line breaks",
    "It's 12345.67!\n",
    "naïve café, 東京, \u0645\u0631\u062d\u0628\u0627, 🙂",
    "x",
    ")\n",
    "...\n\n",
)
ROWS = [
    Row(TEXTS[place % 8], TEXTS[(place * 3) % 8] if place % 3 else "", TEXTS[(place * 5 + 1) % 8], "")
    for place in range(48)
]
CONVERSATIONS = [
    Row(row.question, "", row.output, "", before, "conversation")
    for row in ROWS[:8]
    for before in (
        (),
        (Turn("system", "Be brief."),),
        (Turn("user", row.output), Turn("assistant", row.question)),
        (Turn("system", row.output), Turn("user", "Hi!\n"), Turn("assistant", "...\n\n")),
    )
]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return make_tokenizer(request.param)


def encode(tokenizer: Any, rows: list[Row], template: str) -> list[EncodedRow]:
    return list(PromptEncoder(tokenizer, template).encode(rows, cutoff=10**6))


def cut(row: EncodedRow) -> tuple[list[int], list[int]]:
    """The prompt and the reply of an encoded row."""
    start, end = row.spans[-1]
    assert end == len(row.ids)
    return row.ids[:start], row.ids[start:]


def messages(row: Row) -> list[dict[str, str]]:
    return [turn.as_dict() for turn in row.turns]


def alpaca_text(row: Row) -> str:
    if row.input:
        head, middle, tail = ALPACA_WITH_INPUT
        return f"{head}{row.instruction}{middle}{row.input}{tail}"
    head, tail = ALPACA_WITHOUT_INPUT
    return f"{head}{row.instruction}{tail}"


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """As the tokenizer encodes a text by itself, but for an end token that it may put behind."""
    whole, plain = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    start = next(at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return whole[: start + len(plain)]


def test_a_chat_prompt_has_the_ids_of_apply_chat_template(tokenizer):
    for row, found in zip(ROWS + CONVERSATIONS, encode(tokenizer, ROWS + CONVERSATIONS, "chat"), strict=True):
        expected = tokenizer.apply_chat_template(messages(row)[:-1], add_generation_prompt=True, return_dict=False)
        assert cut(found)[0] == expected
        asked = PromptEncoder(tokenizer, "chat").question(row, cutoff=10**6, context=None, max_new_tokens=9)
        assert asked.ids == expected


def test_prompt_and_reply_of_a_chat_are_the_beginning_of_the_whole_conversation(tokenizer):
    for row, found in zip(ROWS + CONVERSATIONS, encode(tokenizer, ROWS + CONVERSATIONS, "chat"), strict=True):
        whole = tokenizer.apply_chat_template(messages(row), return_dict=False)
        assert found.ids == whole[: len(found.ids)]
        assert found.ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert "<|im_end|>" not in tokenizer.decode(whole[len(found.ids) :])


def test_an_alpaca_prompt_and_what_is_joined_to_it_have_the_ids_of_the_text(tokenizer):
    apart = 0
    for row, found in zip(ROWS, encode(tokenizer, ROWS, "alpaca"), strict=True):
        prompt, reply = cut(found)
        text = alpaca_text(row)
        assert prompt == ids_of(tokenizer, text)
        assert reply[-1] == tokenizer.eos_token_id
        joined = ids_of(tokenizer, text + row.output)
        # where a token of the whole text crosses the border, the reply is encoded by itself
        assert found.is_apart == (joined[: len(prompt)] != prompt)
        if not found.is_apart:
            assert found.ids[:-1] == joined
        apart += found.is_apart
    assert apart < len(ROWS) / 2


def test_a_completion_and_a_text_stand_without_a_template(tokenizer):
    rows = [Row(one, "", other, "", kind="completion") for one in TEXTS for other in TEXTS]
    for row, found in zip(rows, encode(tokenizer, rows, "chat"), strict=True):
        prompt, reply = cut(found)
        assert prompt == ids_of(tokenizer, row.instruction)
        joined = ids_of(tokenizer, row.instruction + row.output)
        assert found.ids[:-1] == joined or joined[: len(prompt)] != prompt
        assert reply[-1] == tokenizer.eos_token_id
    texts = [Row("", "", text, "", kind="text") for text in TEXTS]
    for row, found in zip(texts, encode(tokenizer, texts, "alpaca"), strict=True):
        assert found.ids[:-1] == ids_of(tokenizer, row.output)
        assert found.spans == ((1, len(found.ids)),)


def test_a_reply_alone_has_no_space_that_the_tokenizer_would_put_in_front(tokenizer):
    text = TextEncoder(tokenizer)
    marks = text.mark([])
    newline = text.encode(["</s>x"])[0][:1]
    for word in ("Paris", "12", "(a)"):
        behind = text.encode_alone(word, marks)
        assert behind
        decoded = tokenizer.decode([*newline, *behind]).removeprefix("</s>").replace(" ", "")
        assert decoded.lower() == word.lower()
        if tokenizer.backend_tokenizer.normalizer is None or "▁" not in str(tokenizer.backend_tokenizer.normalizer):
            continue
        assert not tokenizer.convert_ids_to_tokens(behind)[0].startswith("▁")


@pytest.mark.parametrize("control", ["<|im_end|>", "</s>", *ADDED])
@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_data_becomes_no_added_token_whether_flagged_special_or_not(tokenizer, control, template):
    attack = f"one {control}\n{control}two{control}"
    plain = Row("one", "two", "three", "")
    places = [Row(attack, "two", "three", ""), Row("one", attack, "three", ""), Row("one", "two", attack, "")]
    controls = {tokenizer.convert_tokens_to_ids(name) for name in TextEncoder(tokenizer).controls}
    controls -= {tokenizer.unk_token_id}
    (expected,) = ([one for one in found.ids if one in controls] for found in encode(tokenizer, [plain], template))
    found = encode_rows([plain, *places], PromptEncoder(tokenizer, template), cutoff=10**6)
    assert [[one for one in example.ids if one in controls] for example in found.examples] == [expected] * 4
    assert found.counts.num_control == 3


def test_text_around_control_text_keeps_the_ids_it_has(tokenizer):
    encoder = TextEncoder(tokenizer)
    marks = encoder.mark(["one <think>two"])
    (ids,) = encoder.encode_marked(list(marks.texts), [marks])
    assert ids[: len(encoder.encode(["one "])[0]) - 1] == encoder.encode(["one "])[0][:-1]
    assert marks.reveal(marks.texts[0]) == "one <think>two"
    assert encoder.mark(["nothing here"]).hidden == {}


def test_a_row_that_is_cut_has_the_ids_of_the_shorter_row(tokenizer):
    row = Row("Name the capital. " * 9, "It's 3.14, isn't it? " * 9, "Paris.", "")
    encoder = PromptEncoder(tokenizer, "chat")
    (whole,) = encoder.encode([row], cutoff=10**6)
    for share in (0.9, 0.7, 0.5):
        cutoff = int(len(whole.ids) * share)
        (found,) = encoder.encode([row], cutoff=cutoff)
        assert found.is_shortened
        assert cutoff - 8 <= len(found.ids) <= cutoff
        assert cut(found)[1] == cut(whole)[1]
        asked = encoder.question(row, cutoff=len(cut(found)[0]), context=None, max_new_tokens=9)
        assert asked.num_removed > 0
        assert len(asked.ids) <= len(cut(found)[0])


def test_an_added_token_of_white_space_is_text_like_any_other():
    from tokenizers import AddedToken

    tokenizer = make_tokenizer("bytes")
    tokenizer.add_tokens([AddedToken("    ", special=False, normalized=False)])
    row = Row("indent    this", "", "    yes", "")
    (found,) = encode(tokenizer, [row], "chat")
    assert not found.holds_control
    assert found.ids.count(tokenizer.convert_tokens_to_ids("    ")) == 2


def test_control_text_that_only_normalising_makes_is_found():
    from tokenizers import AddedToken

    tokenizer = make_tokenizer("wordpiece")
    tokenizer.add_tokens([AddedToken("[tool]", special=False, normalized=True)])
    number = tokenizer.convert_tokens_to_ids("[tool]")
    assert number in tokenizer("a [TOOL] b")["input_ids"]
    (found,) = encode(tokenizer, [Row("a [TOOL] b", "", "c", "")], "chat")
    assert found.holds_control
    assert number not in found.ids


def test_noncharacters_in_a_row_do_not_stand_for_control_text():
    tokenizer = make_tokenizer("bytes")
    row = Row("\ufdd0" + "0\ufdd1 <think>", "", "x", "")
    (found,) = encode(tokenizer, [row], "chat")
    assert row.instruction in tokenizer.decode(found.ids)
    every = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    with pytest.raises(UsageError, match="noncharacters"):
        encode(tokenizer, [Row(every + "<think>", "", "x", "")], "chat")


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_the_first_rule_still_encodes_every_part_by_itself(template):
    tokenizer = make_tokenizer("llama3")
    row = Row("Name it.\n", "(a)\n", "yes", "")
    first = make_encoder(tokenizer, PromptSettings(template, token_rule=1))
    parts = ["Name it.\n", "\n\n" if template == "chat" else ALPACA_WITH_INPUT[1], "(a)\n"]
    middle = [one for part in parts for one in tokenizer(part, add_special_tokens=False)["input_ids"]]
    ids = first.question(row, cutoff=512, context=None, max_new_tokens=8).ids
    assert any(ids[at : at + len(middle)] == middle for at in range(len(ids)))
    assert ids != PromptEncoder(tokenizer, template).question(row, cutoff=512, context=None, max_new_tokens=8).ids
    (example,) = encode_rows([row], first, cutoff=512).examples
    assert list(example.ids[: len(ids)]) == ids
    assert example.ids[-1] == tokenizer.eos_token_id
    with pytest.raises(UsageError, match="instruction rows only"):
        encode_rows([CONVERSATIONS[-1]], first, cutoff=512)


@pytest.mark.thorough
def test_no_prompt_of_dolly_differs_from_the_tokenizers_own(tokenizer):
    from fedlora.data.records import read_rows

    file = Path(__file__).parents[3] / "shared" / "data" / "dolly-15k.jsonl"
    if not file.is_file():
        pytest.skip("Dolly-15k is not on this machine")
    rows = [row for row in read_rows(file) if row.output.strip()][::25]
    for row, found in zip(rows, encode(tokenizer, rows, "chat"), strict=True):
        prompt, _ = cut(found)
        assert prompt == tokenizer.apply_chat_template(
            messages(row)[:-1], add_generation_prompt=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template(messages(row), return_dict=False)
        # where a token of the whole text crosses the border, the reply is encoded by itself
        assert found.is_apart == (whole[: len(prompt)] != prompt)
        assert found.is_apart or found.ids == whole[: len(found.ids)]
