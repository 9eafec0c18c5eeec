"""The script that makes the studies' small model."""

from __future__ import annotations

import importlib.util
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fedlora.data.skills import SKILLS

SCRIPT = Path(__file__).parent.parent / "studies" / "small_model.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("small_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.TOKENIZER_ROWS = 300
    return module


@pytest.fixture(scope="module")
def tokenizer(script):
    return script.make_tokenizer(0)


@pytest.mark.thorough
def test_the_same_seed_makes_the_same_model_and_another_seed_another(script, tokenizer):
    def weights(seed: int) -> dict[str, torch.Tensor]:
        model = script.make_model(seed, len(tokenizer))
        script.pretrain(model, tokenizer, seed, 2)
        return model.state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert tokenizer.backend_tokenizer.to_str() == script.make_tokenizer(0).backend_tokenizer.to_str()


def test_it_has_about_a_million_parameters(script):
    model = script.make_model(0, script.VOCABULARY)
    assert 0.9e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.1e6


def test_every_skill_is_answered_in_other_forms_than_the_data_asks_for(script):
    assert script.REWORDINGS.keys() == {skill.category for skill in SKILLS}
    for skill in SKILLS:
        for number in range(0, skill.num_prompts, skill.num_prompts // 20):
            answer = skill.make(number)[2]
            assert answer not in script.REWORDINGS[skill.category](answer)


def test_the_lines_of_training_are_not_those_it_is_measured_on(script):
    drawn = [set(islice(script.draw_lines(0, purpose), 200)) for purpose in ("training", "held_out")]
    assert len(drawn[0] & drawn[1]) < 10


def test_only_answers_carry_labels(script, tokenizer):
    ids, labels = script.make_batch([("say", "north"), ("say it", "to the south")], tokenizer)
    assert ids.shape == labels.shape
    for row, answer in enumerate(("north", "to the south")):
        assert tokenizer.decode(labels[row][labels[row] != -100]) == f"{answer}<|im_end|>"


def test_the_folder_loads_like_any_other_base(script, tokenizer, tmp_path):
    from fedlora.llm.base_model import load_base_model
    from fedlora.llm.prompts import PromptEncoder

    tokenizer.save_pretrained(tmp_path)
    script.make_model(0, len(tokenizer)).save_pretrained(tmp_path)
    base = load_base_model(str(tmp_path), device="cpu", dtype="float32")
    assert base.can.head == "linear"
    assert PromptEncoder(base.tokenizer, "chat").decode(tokenizer("a b")["input_ids"]) == "a b"
