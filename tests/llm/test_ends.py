"""What ends an answer: texts that the template would begin next, or that the user names."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_tokenizers import CHATML, make_tokenizer

from fedlora.config.generate import GenerateConfig
from fedlora.config.prompting import PromptSettings
from fedlora.errors import UsageError
from fedlora.llm.base_model import load_base_model
from fedlora.llm.decoding import Decoding, Request
from fedlora.llm.ends import Ends
from fedlora.llm.examples import make_encoder
from fedlora.llm.generation import Batch
from fedlora.llm.library_generation import LibraryBatch
from fedlora.llm.prompts import PromptEncoder

PLAIN = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("bytes")


def test_an_answer_is_cut_before_what_the_template_would_begin_next(tokenizer):
    ends = PromptEncoder(tokenizer, "alpaca").ends(None)
    assert ends.cut("Paris.\n\n### Instruction:\nAnd Rome?") == "Paris."
    assert ends.cut("### Instruction:\nmore") == ""
    assert ends.cut("see ### Instruction: below") == "see ### Instruction: below"
    for rule in (1, 2):
        assert make_encoder(tokenizer, PromptSettings("alpaca", token_rule=rule)).ends(None).texts == ends.texts


def test_a_chat_template_ends_an_answer_by_its_own_token_or_text(tokenizer):
    chatml = PromptEncoder(tokenizer, PromptSettings("own.jinja", CHATML)).ends(None)
    names = ("<|im_end|>", "<|im_start|>", "</s>")
    assert (chatml.ids, chatml.texts) == ({tokenizer.convert_tokens_to_ids(name) for name in names}, ())
    plain = PromptEncoder(tokenizer, PromptSettings("own.jinja", PLAIN)).ends(None)
    assert plain.texts == ("\nuser:",)
    assert plain.cut("yes\nuser: and") == "yes"
    own = PromptEncoder(tokenizer, PromptSettings("own.jinja", CHATML)).ends(["END"])
    assert own.texts == ("END",)
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in own.ids


def test_a_text_is_seen_as_soon_as_its_last_token_is_there(tokenizer):
    ends = Ends(texts=["\n### Instruction:"], tokenizer=tokenizer)
    for answer in ("Paris 東京.\n\n### Instruction:", "### Instruction:", "x" * 99 + "\n### Instruction:"):
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert [ends.is_over(ids[:count]) for count in range(len(ids) + 1)] == [False] * len(ids) + [True]
    assert not Ends([1], tokenizer=tokenizer).is_over([1])


@pytest.mark.parametrize("kind", [Batch, LibraryBatch])
def test_rows_stop_at_a_text_while_others_go_on(tiny_model: Path, kind: type):
    base = load_base_model(str(tiny_model), device="cpu", dtype="float32")
    requests = [Request([5, 6, 7], 0), Request([9, 10, 11, 12], 1)]
    free = kind(base, requests, Decoding(12)).answer()
    text = base.tokenizer.decode(free[0][3:5])
    first = next(n for n in range(13) if text in f"\n{base.tokenizer.decode(free[0][:n])}")
    ends = Ends(texts=[text], tokenizer=base.tokenizer)
    stopped = kind(base, requests, Decoding(12), ends=ends).answer()
    assert stopped[0] == free[0][:first]
    assert len(stopped[0]) < len(free[0])
    assert [ends.is_over(stopped[1]), len(stopped[1])] in ([True, len(stopped[1])], [False, len(free[1])])


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        (None, None),
        ("none", ()),
        ("", None),
        ("\\n### Instruction:,User:", ("\n### Instruction:", "User:")),
        (["a, b", "\n"], "empty"),
        (["a, b"], ("a, b",)),
    ],
)
def test_texts_come_as_a_list_or_with_commas(given, texts):
    if texts == "empty":
        with pytest.raises(UsageError, match="empty text"):
            GenerateConfig.of(stop=given)
    else:
        assert GenerateConfig.of(stop=given).stop_texts == texts


def test_the_reference_projects_sampling_ends_nowhere_else_unless_asked():
    assert GenerateConfig.of(preset="reference").stop_texts == ()
    assert GenerateConfig.of(preset="reference", stop="User:").stop_texts == ("User:",)
