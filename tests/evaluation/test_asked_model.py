"""Our model class against lm-eval's own model of transformers and PEFT: the same numbers and texts for any request."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra `tasks` is not installed")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from fedlora.errors import DataError, UsageError
from fedlora.evaluation.tasks.asked_model import AskedModel, Conversation, Until
from fedlora.files import write_bytes, write_text
from fedlora.llm.adapter_config import make_peft_config
from fedlora.llm.adapter_files import CONFIG_NAME, SAFETENSORS_NAME, load_adapter, to_safetensors
from fedlora.llm.base_model import load_base_model
from fedlora.llm.lora import LoraModel
from fedlora.llm.lora_layer import LoraSpec
from fedlora.llm.resident_adapters import ResidentAdapters

pytestmark = pytest.mark.filterwarnings("ignore")
LONG = "north south east west " * 12
PAIRS = [
    ("Which colour is grass?", " green"),
    ("Which colour is grass? ", "green"),
    ("Which colour is grass?  ", " blue"),
    ("Which colour is grass?", " g"),
    ("Which colour is grass?", " h"),
    ("", "north"),
    ("", "<|im_start|>north"),
    ("<|im_start|>user\nGrüße 世界", " und mehr\n"),
    (LONG, "red"),
    (LONG, "redder than red"),
    (LONG * 6, " gold"),
    ("a", LONG[:90]),
    ("north so", "uth"),
]
TEXTS = ["north", "Grüße, 世界!", LONG, LONG * 5, "<|im_start|>red", "x"]


def with_start_token(folder: Path, target: Path) -> Path:
    """The tiny model with a tokenizer that puts its start token before every text and joins characters."""
    shutil.copytree(folder, target)
    file = target / "tokenizer.json"
    made = json.loads(file.read_text())
    joined = [("n", "o"), ("no", "r"), ("o", "u"), ("ou", "t"), ("Ġ", "r")]
    size = len(made["model"]["vocab"])
    names = ["".join(pair) for pair in joined]
    # the embedding has no more rows, so seldom characters give way
    taken = [token for token, number in made["model"]["vocab"].items() if number >= size - len(names)]
    for old, new in zip(taken, names, strict=True):
        made["model"]["vocab"][new] = made["model"]["vocab"].pop(old)
    made["model"]["merges"] = [list(pair) for pair in joined]
    start = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    made["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    file.write_text(json.dumps(made))
    return target


SPEC = LoraSpec(4, 8, 2.0, 0.0, ("q_proj", "v_proj", "o_proj"))


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory) -> list[Path]:
    """Folders of three adapters large enough that each answers in its own way."""
    shapes = LoraModel(load_base_model(str(tiny_model), device="cpu", dtype="float32").model, SPEC).shapes()
    folders = []
    for number in range(3):
        draw = torch.Generator().manual_seed(number)
        folder = tmp_path_factory.mktemp("adapter")
        state = {key: torch.randn(shape, generator=draw) * 0.4 for key, shape in shapes.items()}
        config = make_peft_config(SPEC, str(tiny_model), fan_in_fan_out=False, targets=SPEC.target_modules)
        write_bytes(folder / SAFETENSORS_NAME, to_safetensors(state))
        write_text(folder / CONFIG_NAME, config)
        folders.append(folder)
    return folders


@pytest.fixture(scope="module", params=["plain", "start token"])
def model_folder(request, tiny_model, tmp_path_factory) -> Path:
    if request.param == "plain":
        return tiny_model
    return with_start_token(tiny_model, tmp_path_factory.mktemp("start") / "model")


@pytest.fixture(scope="module")
def ours(model_folder, adapters) -> list[AskedModel]:
    """The base and every adapter, on one loaded base."""
    base = load_base_model(str(model_folder), device="cpu", dtype="float32")
    lora = LoraModel(base.model, SPEC)
    states = [None, *(load_adapter(folder / SAFETENSORS_NAME, lora.shapes()) for folder in adapters)]
    resident = ResidentAdapters(base, lora, states, None, 4096)
    conversation = Conversation(resident, list("b012"), contextlib.nullcontext, max_length=256)
    return [AskedModel(conversation, number) for number in range(len(states))]


@pytest.fixture(scope="module")
def theirs(model_folder, adapters) -> list[HFLM]:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "batch_size": 1, "max_length": 256}
    given = [{}, *({"peft": str(folder)} for folder in adapters)]
    return [HFLM(pretrained=str(model_folder), **one, **options) for one in given]


def ask(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, 0, ("task", number, 1)) for number, args in enumerate(arguments)]


@pytest.mark.parametrize("who", range(4))
def test_likelihoods_are_those_of_transformers_and_peft(ours, theirs, who):
    found = ours[who].loglikelihood(ask("loglikelihood", PAIRS))
    expected = theirs[who].loglikelihood(ask("loglikelihood", PAIRS), disable_tqdm=True)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-3)
    assert [one[1] for one in found] == [one[1] for one in expected]
    assert len({round(one[0], 3) for one in found}) > len(PAIRS) - 3


@pytest.mark.parametrize("who", [0, 1])
def test_whole_texts_have_the_likelihood_of_their_windows(ours, theirs, who):
    texts = [(text,) for text in TEXTS]
    found = ours[who].loglikelihood_rolling(ask("loglikelihood_rolling", texts))
    expected = theirs[who].loglikelihood_rolling(ask("loglikelihood_rolling", texts), disable_tqdm=True)
    assert found == pytest.approx(expected, abs=5e-3, rel=1e-5)


def test_answers_are_those_of_transformers_and_peft_and_end_before_their_texts(ours, theirs):
    ways = [
        {"until": ["\n"], "max_gen_toks": 24},
        {"until": ["e", "t"], "max_gen_toks": 24},
        {"until": [], "max_gen_toks": 9},
        {"until": ["<|im_end|>", "<|im_start|>"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7},
        {"until": "or", "max_new_tokens": 12},
    ]
    prompts = ["say north", "<|im_start|>user\nsay red 1<|im_end|>\n<|im_start|>assistant\n", LONG * 6, "x"]
    asked = [(prompt, way) for way in ways for prompt in prompts]
    different = set()
    for who, model in enumerate(ours):
        found = model.generate_until(ask("generate_until", asked))
        expected = theirs[who].generate_until(ask("generate_until", asked), disable_tqdm=True)
        assert found == expected, who
        assert not any("e" in text or "t" in text for text in found[4:8])
        assert any(text for text in found[4:8])
        different.add(tuple(found))
    assert len(different) == 4, "every adapter answers in its own way"


def test_an_answer_ends_at_a_control_token_and_wherever_its_text_stands(ours):
    tokenizer = ours[0].tokenizer
    begin, line = tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer.encode("\n", add_special_tokens=False)[-1:]
    assert Until((), ["<|im_start|>"], tokenizer).is_over([*line, begin])
    assert Until((), ["\n\n"], tokenizer).is_over([*line, *line])
    assert not Until((), ["\n\n"], tokenizer).is_over(line), "the start of an answer is no line break"


def test_several_adapters_answer_one_list_of_prompts_in_one_batch(ours, monkeypatch):
    calls = []
    adapters = ours[0]._of.adapters
    answer = type(adapters).answer
    monkeypatch.setattr(type(adapters), "answer", lambda *of, **how: (calls.append(1), answer(*of, **how))[1])
    asked = [("say gold", {"until": ["\n"], "max_gen_toks": 5})]
    texts = [model.generate_until(ask("generate_until", asked)) for model in ours]
    assert len(calls) == 1
    assert [len(each) for each in texts] == [1, 1, 1, 1]
    again = [("say blue", {"until": ["\n"], "max_gen_toks": 5})]
    ours[2].generate_until(ask("generate_until", again))
    assert len(calls) == 2


def test_sampling_belongs_to_the_seed_and_the_row(ours):
    way = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12}
    asked = [("say gold", way), ("say gold", way)]
    first = ours[1].generate_until(ask("generate_until", asked))
    ours[1].generate_until(ask("generate_until", [("other", way)]))
    assert ours[1].generate_until(ask("generate_until", asked)) == first
    assert first[0] != first[1], "repeats of a prompt have random streams of their own"


def test_chat_templates_are_applied_as_theirs(ours, theirs):
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say north"}]
    for generate in (True, False):
        wanted = theirs[0].apply_chat_template(turns, add_generation_prompt=generate)
        assert ours[0].apply_chat_template(turns, add_generation_prompt=generate) == wanted
    assert ours[0].chat_template(True) == theirs[0].chat_template(True)
    assert ours[0].max_length == theirs[0].max_length
    assert ours[0].tokenizer_name == theirs[0].tokenizer_name


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ({"num_beams": 4}, "generation_kwargs of the task: num_beams is not supported"),
        ({"max_gen_toks": 256}, "leaves no room for a prompt in 256 tokens"),
    ],
)
def test_what_our_decoding_has_not_is_refused(ours, way, said):
    with pytest.raises(UsageError, match=said):
        ours[0].generate_until(ask("generate_until", [("x", way)]))


def test_a_choice_that_cannot_be_scored_is_named(ours):
    with pytest.raises(DataError, match="task task, row 1: a choice is empty"):
        ours[0].loglikelihood(ask("loglikelihood", [("a", "b"), ("a", "")]))
    with pytest.raises(DataError, match=r"a continuation takes .* tokens, and 1 to 256 fit"):
        ours[0].loglikelihood(ask("loglikelihood", [("a", LONG * 9)]))
