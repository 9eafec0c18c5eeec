"""Templates of the kinds that models bring: which tokens are trained, what ends a turn, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny_tokenizers import CHATML, make_tokenizer

from fedlora.config.prompting import DATE, PromptSettings
from fedlora.errors import UsageError
from fedlora.llm.chat_template import ChatTemplate
from fedlora.llm.examples import encode_rows, make_batch, make_example
from fedlora.llm.prompts import PromptEncoder
from fedlora.rows import PromptShape, Row, Turn

MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_BARE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}</s>"
    "{% endgeneration %}{% else %}[{{ message.role }}] {{ message.content }} [/]{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<s>[INST] ' + (system if loop.first else '') + message['content'] "
    "+ ' [/INST]' }}{% else %}{{ ' ' + message['content'].strip() + ' </s>' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
"""As Qwen 3 does: only the last reply has a block of thoughts."""
OPENS_THOUGHT = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
"""As DeepSeek-R1 does: a reply is asked for with an opened block that a stored reply does not have."""
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '.\n' }}" + CHATML
NO_END = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}" + CHATML
)
ENDS_TEXT = CHATML + "{% if not add_generation_prompt %}{{ '</s>' }}{% endif %}"
"""As Phi 3 does: the whole conversation ends with another token than a turn."""

THREE = Row(
    "And 3?",
    "",
    "three",
    "",
    (Turn("user", "What is 1?"), Turn("assistant", "one"), Turn("user", "And 2?"), Turn("assistant", "two")),
    "conversation",
)
WITH_SYSTEM = Row("Hi", "", "hello", "", (Turn("system", "Be brief."),), "conversation")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer("llama3")


def encoder_of(tokenizer: Any, template: str, **settings: Any) -> PromptEncoder:
    return PromptEncoder(tokenizer, PromptSettings("own.jinja", template, **settings))


def shown(tokenizer: Any, template: str, row: Row, train_on: Any = "assistant", **settings: Any) -> str:
    """The row's text with what is trained in brackets."""
    parts = encoder_of(tokenizer, template, **settings).show(row, cutoff=10**6, train_on=train_on)
    return "".join(f"[[{text}]]" if is_trained else text for text, is_trained in parts)


@pytest.mark.parametrize("template", [MARKED, MARKED_BARE])
@pytest.mark.parametrize("row", [THREE, WITH_SYSTEM, Row("a", "b", "c\n", "")])
def test_the_trained_tokens_are_those_that_a_template_marks_as_generated(tokenizer, template, row):
    (found,) = encoder_of(tokenizer, template).encode([row], cutoff=10**6)
    theirs = tokenizer.apply_chat_template(
        [turn.as_dict() for turn in row.turns],
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ours = [any(start <= place < end for start, end in found.spans) for place in range(len(found.ids))]
    assert found.ids == theirs["input_ids"][: len(found.ids)]
    assert ours == list(map(bool, theirs["assistant_masks"][: len(ours)]))
    assert not any(theirs["assistant_masks"][len(ours) :])


def test_every_reply_is_trained_with_what_ends_its_turn_and_nothing_else(tokenizer):
    user = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    for template in (GEMMA, ENDS_TEXT, CHATML):
        assert shown(tokenizer, template, THREE) == (
            user.format("What is 1?") + "[[one<|im_end|>]]\n" + user.format("And 2?") + "[[two<|im_end|>]]\n"
            "" + user.format("And 3?") + "[[three<|im_end|>]]"
        )
    assert shown(tokenizer, LLAMA2, THREE) == (
        "<s>[INST] What is 1? [/INST][[ one </s>]]<s>[INST] And 2? [/INST][[ two </s>]]<s>[INST] And 3? [/INST]"
        "[[ three </s>]]"
    )


def test_the_last_reply_or_everything_can_be_trained_on_instead(tokenizer):
    assert shown(tokenizer, CHATML, THREE, "last").endswith("<|im_start|>assistant\n[[three<|im_end|>]]")
    assert shown(tokenizer, CHATML, THREE, "last").count("[[") == 1
    assert shown(tokenizer, CHATML, THREE, "all").startswith("<|im_start|>[[user\nWhat is 1?")


def test_the_places_of_labels_skip_what_stands_between_replies(tokenizer):
    (found,) = encoder_of(tokenizer, CHATML).encode([THREE], cutoff=10**6)
    example = make_example(found.ids, found.spans)
    batch = make_batch([example], pad_id=0)
    places = [place for start, end in found.spans for place in range(start, end)]
    assert batch.targets.tolist() == [found.ids[place] for place in places]
    assert (batch.positions + 1).tolist() == places
    assert example.num_labels == len(places) == sum(end - start for start, end in example.labels())


def test_a_template_without_a_token_that_ends_a_turn_gets_the_tokenizers_end_of_text(tokenizer):
    encoder = encoder_of(tokenizer, NO_END)
    assert encoder.chat
    assert encoder.chat.end == ""
    assert shown(tokenizer, NO_END, Row("a", "", "b", "")) == "user: a\nassistant: [[b</s>]]"
    assert encoder.stop_ids == {tokenizer.eos_token_id}


def test_an_answer_ends_where_the_template_ends_a_turn_or_the_tokenizer_a_text(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoder_of(tokenizer, ENDS_TEXT).stop_ids == {end, tokenizer.eos_token_id}
    assert PromptEncoder(tokenizer, "alpaca").stop_ids == {tokenizer.eos_token_id}


def test_a_system_turn_that_a_template_refuses_joins_the_first_user_turn_and_it_is_said(tokenizer, capsys):
    encoder = encoder_of(tokenizer, GEMMA)
    assert shown(tokenizer, GEMMA, WITH_SYSTEM).startswith("<|im_start|>user\nBe brief.\n\nHi<|im_end|>")
    encoder.check(PromptShape("conversation", has_system=True), cutoff=512)
    encoder_of(tokenizer, CHATML).check(PromptShape("conversation", has_system=True), cutoff=512)
    assert capsys.readouterr().err.count("in front of the first user turn") == 1


def test_a_template_that_rewrites_history_is_refused_for_several_turns_and_trains_on_the_last(tokenizer):
    shape = PromptShape("conversation", has_history=True)
    for template in (THINKING, OPENS_THOUGHT):
        encoder = encoder_of(tokenizer, template)
        with pytest.raises(UsageError, match="earlier replies cannot be trained on"):
            encoder.check(shape, cutoff=512)
        with pytest.raises(UsageError, match="earlier replies"):
            list(encoder.encode([THREE], cutoff=512))
        encoder.check(shape, cutoff=512, train_on="last")
        encoder.check(PromptShape("conversation"), cutoff=512)
    assert shown(tokenizer, THINKING, THREE, "last").endswith("assistant\n[[<think>\n\n</think>\n\nthree<|im_end|>]]")
    # the whole text does not begin with this prompt: the reply follows it alone
    assert shown(tokenizer, OPENS_THOUGHT, THREE, "last").endswith("assistant\n<think>\n[[three<|im_end|>]]")


def test_keyword_arguments_reach_the_template(tokenizer):
    text = shown(tokenizer, THINKING, Row("a", "", "b", ""), kwargs={"enable_thinking": False})
    assert text.endswith("assistant\n<think>\n\n</think>\n\n[[b<|im_end|>]]")


def test_a_keyword_argument_that_a_template_does_not_use_is_refused_with_the_nearest_name(tokenizer):
    for name, hint in (("enable_thinkin", "enable_thinking"), ("add_generation_prompt", "variable"), ("x", "variable")):
        with pytest.raises(UsageError, match=f"template_kwargs: .*own.jinja takes no '{name}'") as refused:
            encoder_of(tokenizer, THINKING, kwargs={name: False})
        assert hint in refused.value.hint
    with pytest.raises(UsageError, match="template_kwargs: the template alpaca"):
        PromptEncoder(tokenizer, PromptSettings("alpaca", kwargs={"enable_thinking": False}))


def test_an_error_of_a_template_shows_the_row_and_the_name_of_the_template(tokenizer):
    encoder = encoder_of(
        tokenizer, "{% if messages[0].content == 'b' %}{{ raise_exception('no b') }}{% endif %}" + CHATML
    )
    rows = [Row(text, "", "reply", "") for text in "abc"]
    with pytest.raises(UsageError, match=r"(?s)own.jinja refuses a conversation: .*no b\n    b$"):
        list(encoder.encode(rows, cutoff=512))
    with pytest.raises(UsageError, match=r"(?s)no b\n    b$"):
        encoder.question(rows[1], cutoff=512, context=None, max_new_tokens=4)


def test_a_template_that_asks_for_today_gets_the_date_of_the_settings(tokenizer):
    assert shown(tokenizer, DATED, Row("a", "", "b", "")).startswith("Today is 26 Jul 2024.\n<|im_start|>")
    assert shown(tokenizer, DATED, Row("a", "", "b", ""), date="2026-01-31").startswith("Today is 31 Jan 2026.\n")
    odd = DATED.replace("'%d %b %Y'", "messages[0].content")
    with pytest.raises(UsageError, match="takes a literal format"):
        encoder_of(tokenizer, odd)


def test_what_a_template_adds_is_known(tokenizer):
    def template(text: str) -> ChatTemplate:
        found = encoder_of(tokenizer, text).chat
        assert found
        return found

    assert [template(text).inserts_date for text in (CHATML, DATED)] == [False, True]
    assert [template(text).default_system for text in (CHATML, WITH_DEFAULT, LLAMA2, GEMMA)] == ["", "Be good.", "", ""]
    assert [template(text).takes_system for text in (CHATML, LLAMA2, GEMMA)] == [True, True, False]


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ messages[0].content }}", "drops the assistant"),
        ("{% for message in messages %}{{ message.role }}{% endfor %}", "drops the user"),
        ("{% for message in %}", "refuses a conversation: TemplateSyntaxError"),
        ("{{ nothing.there }}", "refuses a conversation: UndefinedError"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_with_the_reason(tokenizer, template, what):
    with pytest.raises(UsageError, match=what):
        encoder_of(tokenizer, template)


@pytest.mark.parametrize(
    ("row", "what"), [(WITH_SYSTEM, "no place for a system turn"), (THREE, "no place for several turns")]
)
def test_alpaca_takes_one_exchange_and_names_the_template_for_more(tokenizer, row, what):
    encoder = PromptEncoder(tokenizer, "alpaca")
    for attempt in (
        lambda: encoder.check(row.shape, cutoff=512),
        lambda: encoder.question(row, cutoff=512, context=None, max_new_tokens=8),
    ):
        with pytest.raises(UsageError, match=what) as refused:
            attempt()
        assert "chat" in refused.value.hint
    single = Row("Say it.", "", "it", "", kind="conversation")
    assert list(encoder.encode([single], cutoff=512)) == list(
        encoder.encode([Row("Say it.", "", "it", "")], cutoff=512)
    )


def test_of_the_turns_before_the_last_exchange_the_latest_are_kept(tokenizer):
    row = replace(THREE, before=(Turn("system", "Be brief."), *THREE.before))
    encoder = encoder_of(tokenizer, CHATML)
    (whole,) = encoder.encode([row], cutoff=10**6)
    (found,) = encoder.encode([row], cutoff=len(whole.ids) - 1)
    assert found.num_cut_turns == 2
    text = tokenizer.decode(found.ids)
    assert [part in text for part in ("Be brief.", "What is 1?", "And 2?", "And 3?")] == [True, False, True, True]
    # the rest goes before the last question is cut, and is then cut from its left
    (found,) = encoder.encode([replace(row, instruction="far " * 200 + "near")], cutoff=60)
    text = tokenizer.decode(found.ids)
    assert ("And 2?" in text, "Be brief." in text, "near<|im_end|>" in text) == (False, True, True)
    assert len(found.ids) <= 60


def test_whole_oldest_turns_go_before_a_turn_is_cut_and_the_system_turn_stays(tokenizer):
    row = Row(THREE.question, "", THREE.output, "", (Turn("system", "Stay."), *THREE.before), "conversation")
    encoder = encoder_of(tokenizer, CHATML)
    (whole,) = encoder.encode([row], cutoff=10**6)
    seen = []
    for cutoff in range(len(whole.ids), 30, -1):
        (found,) = encoder.encode([row], cutoff=cutoff)
        text = tokenizer.decode(found.ids)
        assert len(found.ids) <= cutoff
        assert "Stay." in text
        assert text.endswith("three<|im_end|>")
        # a question goes with its reply
        assert ("What is 1?" in text) == ("one" in text)
        assert ("And 3?" in text) or "And 2?" not in text
        seen.append((found.num_cut_turns, "And 3?" in text))
    assert list(dict.fromkeys(seen)) == [(0, True), (2, True), (4, True), (4, False)]
    found = encode_rows([row], encoder, cutoff=len(whole.ids) - 1)
    assert (found.counts.num_shortened, found.counts.num_turns, found.counts.num_cut_turns) == (1, 7, 2)


def test_a_system_turn_longer_than_the_cutoff_gives_way_last(tokenizer):
    row = Row("Hi", "", "hello", "", (Turn("system", "Be brief. " * 50),), "conversation")
    (found,) = encoder_of(tokenizer, CHATML).encode([row], cutoff=60)
    text = tokenizer.decode(found.ids)
    assert len(found.ids) <= 60
    assert text.endswith("hello<|im_end|>")
    assert "Be brief. Be brief." in text


def test_the_date_of_the_settings_is_what_llamas_templates_fall_back_to():
    assert DATE == "2024-07-26"
