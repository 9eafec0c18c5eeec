"""What the check at load finds, on models of every kind that our faster ways do not fit."""

from __future__ import annotations

import json
from dataclasses import replace

import every_base
import pytest
import torch
from architectures import ARCHITECTURES, load_own, make_folder

from fedlora.config.data import ModelCheckConfig
from fedlora.errors import UsageError
from fedlora.llm import check_files, self_check
from fedlora.llm.abilities import ALWAYS, Abilities
from fedlora.llm.base_model import load_base_model
from fedlora.llm.change_lengths import ChangeLength, change_lengths
from fedlora.llm.decoding import Decoding, Request
from fedlora.llm.exact_numbers import ExactNumbers, find_difference
from fedlora.llm.generation import generate_answers
from fedlora.llm.gradient_check import with_right_gradients
from fedlora.llm.lora import LoraModel, LoraSpec
from fedlora.llm.loss import backward_loss, label_logits
from fedlora.llm.probes import training_batch
from fedlora.llm.targets import find_targets
from fedlora.llm.trainable_layers import find_without_rows
from fedlora.stages import model as model_stage

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = {"device": "cpu", "dtype": "float32"}


@pytest.fixture
def load(tiny_model, tmp_path):
    """Loads a small model of an architecture."""

    def load(name, **how):
        folder = tmp_path / name
        if not folder.is_dir():
            make_folder(name, tiny_model, folder)
        return load_base_model(str(folder), **{**CPU, **how})

    return load


def answers_are_its_own(base, lengths=(20, 3, 11)):
    draw = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 256, (length,), generator=draw).tolist() for length in lengths]
    requests = [Request(prompt, row) for row, prompt in enumerate(prompts)]
    found = generate_answers(base, requests, Decoding(8), tokens_per_pass=4096)
    own = load_own(base.name)
    expected = [every_base.generate_alone(own, prompt, 8) for prompt in prompts]
    return found == expected


def test_a_llama_can_do_everything_and_nothing_is_said(tiny_model, capsys):
    base = load_base_model(str(tiny_model), **CPU, again=True)
    assert base.can == Abilities()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2", "mamba", "falcon_h1", "gpt_neo", "bloom"])
def test_a_model_that_our_cache_does_not_fit_answers_through_generate_and_says_so_once(name, load, capsys):
    base = load(name)
    assert base.can.own_cache == 0
    assert capsys.readouterr().err.count("transformers' own cache and generate()") == 1
    assert answers_are_its_own(base)


@pytest.mark.parametrize("name", ["cohere", "granite", "gemma2"])
def test_logits_with_a_scale_or_a_soft_cap_are_computed_on_labels_only(name, load, monkeypatch):
    base = load(name)
    assert base.can.head == "own"
    widths = []
    head = base.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[:-1].numel()))
    rows = self_check.draw_rows(base)[:2]
    batch = training_batch(base, rows, rows[0].shared)
    logits = label_logits(base, batch)
    assert widths == [len(batch.targets)]
    expected = torch.cat([base.model(torch.tensor([row.ids])).logits[0, row.shared :] for row in rows])
    assert find_difference([logits], [expected]) is None


def test_positions_that_padding_moves_make_batches_of_one_length(load):
    base = load("mpt")
    assert base.can.shared_prompts == 0
    assert answers_are_its_own(base)
    base = load("rwkv")
    assert (base.can.equal_prompts, base.can.padded_prompts) == (False, 0)
    assert answers_are_its_own(base, (7, 7, 3))


def test_an_option_of_attention_that_ours_does_not_know_turns_ours_off(load):
    base = load("inkling_text")
    assert not base.can.own_attention
    assert "position_bias" in base.can.reasons["own_attention"]
    assert base.model.config._attn_implementation == "sdpa"


def test_rows_past_the_original_length_of_dynamic_positions_are_refused(load):
    base = load("llama, dynamic RoPE")
    assert base.can.longest == base.context == 48


def test_past_the_original_length_of_long_positions_rows_of_one_length_share_a_pass(load):
    base = load("phi3, long RoPE")
    assert (base.can.padding, base.can.padded_prompts, base.can.own_cache) == (24, 24, 0)
    assert answers_are_its_own(base)


@pytest.mark.parametrize("name", ["bert", "roberta", "xlnet"])
def test_a_model_that_is_not_causal_is_refused_with_the_reason(name, load):
    with pytest.raises(UsageError, match="is not causal: a token's logits depend on the tokens after it"):
        load(name)


def test_a_model_that_reads_images_too_and_has_no_causal_class_writes_text(load):
    base = load("mistral3")
    assert base.can == Abilities()
    assert find_targets(base.model, ["q_proj"]).layers[0].name == "model.language_model.layers.0.self_attn.q_proj"
    assert answers_are_its_own(base)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_model_whose_encoder_reads_first_is_refused(name, load):
    with pytest.raises(UsageError, match="is no causal language model"):
        load(name)


def test_an_encoder_that_was_made_a_decoder_is_right(load):
    base = load("bert, is_decoder")
    assert base.can.head == "own"
    assert answers_are_its_own(base)


@pytest.mark.parametrize("name", ["llama4_text", "recurrent_gemma", "llama4", "opt"])
def test_a_decoder_is_found_where_the_input_embedding_is(name, load):
    base = load(name)
    assert base.can.decoder == "model"
    assert base.hidden(torch.tensor([[5, 6, 7]])).shape == (1, 3, 32)


def test_a_change_of_length_that_takes_too_long_to_try_turns_our_cache_off_beyond_it(load, monkeypatch):
    load("mistral")
    monkeypatch.setattr(self_check, "MOST_WORK", {"cpu": 0.0})
    monkeypatch.setattr(self_check, "change_lengths", lambda config: [ChangeLength(200, False)])
    base = load("mistral", again=True)
    assert base.can.own_cache == base.can.padded_prompts == 191
    assert base.can.padding == ALWAYS
    assert "take too long" in base.can.reasons["own_cache"]


def test_the_lengths_that_a_configuration_names_are_found_at_any_depth():
    from transformers import LlamaConfig, MistralConfig, Phi3Config

    assert change_lengths(MistralConfig(sliding_window=4096)) == [ChangeLength(4096, False)]
    assert change_lengths(MistralConfig(sliding_window=None)) == []
    static = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert change_lengths(LlamaConfig(rope_parameters={**static, "original_max_position_embeddings": 64})) == []
    long = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config = Phi3Config(
        rope_parameters={**long, "original_max_position_embeddings": 4096}, original_max_position_embeddings=4096
    )
    assert ChangeLength(4096, True) in change_lengths(config)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = LlamaConfig(rope_parameters=dynamic, max_position_embeddings=2048)
    assert change_lengths(config) == [ChangeLength(2048, True)]


def test_a_check_is_done_once_for_the_same_files_versions_and_machine(load, monkeypatch):
    first = load("falcon_h1").can
    monkeypatch.setattr(self_check.SelfCheck, "run", lambda self: pytest.fail("checked twice"))
    assert load("falcon_h1").can == first
    monkeypatch.setattr(check_files, "FORMAT", -1)
    with pytest.raises(pytest.fail.Exception, match="checked twice"):
        load("falcon_h1")


def test_a_damaged_record_is_a_new_check(tiny_model):
    base = load_base_model(str(tiny_model), **CPU)
    path = check_files._path(base, ("none",))
    assert json.loads(path.read_text())["own_cache"] is None
    for damage in ("", "{}", "[]", '{"decoder": 1}'):
        path.write_text(damage)
        assert check_files.recall_check(base, "none") is None
        assert load_base_model(str(tiny_model), **CPU).can == Abilities()


@pytest.mark.parametrize("fits", [True, False])
def test_a_base_of_fewer_bits_computes_exactly_inside_and_is_itself_again_after(tiny_model, fits, monkeypatch):
    from fedlora.llm import exact_numbers

    monkeypatch.setattr(exact_numbers, "MOST_KEPT_BYTES", 1 << 30 if fits else 0)
    base = load_base_model(str(tiny_model), device="cpu", dtype="bfloat16")
    ids = torch.tensor([[5, 6, 7, 8]])
    before = base.model(ids).logits
    with torch.no_grad(), ExactNumbers(base.model):
        exact = base.model(ids).logits
    wide = load_base_model(str(tiny_model), device="cpu", dtype="bfloat16").model.float()(ids).logits
    assert exact.dtype == torch.float32
    assert find_difference([exact], [wide]) is None
    assert before.dtype == torch.bfloat16
    assert torch.equal(base.model(ids).logits, before)


def test_attention_that_is_wrong_is_found_and_turned_off(tiny_model, tmp_path, monkeypatch):
    # what is found of the fault must not be remembered for other tests
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    from fedlora.llm import attention

    right = attention._attend_once
    monkeypatch.setattr(attention, "_attend_once", lambda *given: right(*given) * 1.001)
    base = load_base_model(str(tiny_model), **CPU, again=True)
    assert not base.can.own_attention
    assert "logits differ by" in base.can.reasons["own_attention"]
    assert answers_are_its_own(base)


def test_a_gradient_that_is_wrong_turns_our_attention_off_or_is_refused(tiny_model, tmp_path, monkeypatch, capsys):
    # what is found of the fault must not be remembered for other tests
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    from fedlora.llm import attention
    from fedlora.llm.lora_layer import LowRankLinear

    base = load_base_model(str(tiny_model), **CPU)
    lora = LoraModel(base.model, LoraSpec(4, 8, 2.0, 0.0, ("q_proj",)))
    assert with_right_gradients(base, lora, "none", again=True).can == base.can
    assert not any(factor.abs().sum() for _, factor in lora.named_factors())
    right = attention.FoldedAttention.backward
    wrong = staticmethod(lambda ctx, *given: tuple(x if x is None else x * 1.01 for x in right(ctx, *given)))
    with monkeypatch.context() as patch:
        patch.setattr(attention.FoldedAttention, "backward", wrong)
        found = with_right_gradients(base, lora, "none", again=True)
    assert not found.can.own_attention
    assert "its own attention" in capsys.readouterr().err
    right_linear = LowRankLinear.backward
    halved = staticmethod(lambda ctx, *given: tuple(x if x is None else x / 2 for x in right_linear(ctx, *given)))
    monkeypatch.setattr(LowRankLinear, "backward", halved)
    with pytest.raises(UsageError, match="the gradient of a LoRA layer at"):
        with_right_gradients(base, lora, "none", again=True)


def test_model_check_prints_what_is_used_and_why_not(load, tmp_path):
    load("mamba")
    config = ModelCheckConfig.of(base_model=str(tmp_path / "mamba"), base_dtype="float32", device="cpu")
    found = model_stage.check(config)
    assert "our cache and decoding" in found.text()
    assert found.as_dict()["abilities"]["own_cache"] == 0
    assert found.as_dict()["abilities"]["reasons"].keys() == {"shared_prefix", "own_cache"}
    json.dumps(found.as_dict())


def test_limits_say_up_to_which_length():
    can = replace(Abilities(), reasons={"own_cache": "x"}).up_to(100, ["own_cache"])
    assert can.sentence() == "transformers' own cache and generate() beyond 100 tokens"
    assert Abilities.from_record(can.record()) == can
    assert can.up_to(200, ["own_cache", "own_attention"]) == replace(can, own_attention=False)


def test_layers_adapted_in_the_head_get_their_gradient_with_dropout_too(load):
    base = load("modernbert-decoder")
    lora = LoraModel(base.model, LoraSpec(4, 8, 2.0, 0.5, ("all-linear",)))
    assert any(not name.startswith("model.") for name in lora.layers)
    state = {key: torch.ones(shape) * 0.01 for key, shape in lora.shapes().items()}
    lora.set_adapter(state)
    rows = self_check.draw_rows(base)[:2]
    with lora.train_mode():
        lora.noise.begin_pass([1, 2], base.device)
        backward_loss(base, training_batch(base, rows, rows[0].shared), scale=1.0)
    assert all(factor.grad is not None for _, factor in lora.named_factors())


@pytest.mark.thorough
def test_a_window_that_counts_the_cache_s_free_room_ends_our_cache_before_it(tiny_model, tmp_path, monkeypatch):
    """GPT-Neo counts its local window over all columns of the cache, written or not."""
    monkeypatch.setitem(
        ARCHITECTURES, "windowed", ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 128})
    )
    make_folder("windowed", tiny_model, tmp_path / "windowed")
    base = load_base_model(str(tmp_path / "windowed"), **CPU)
    assert base.can.own_cache == 127
    assert answers_are_its_own(base, (20, 100, 118, 121, 140))


@pytest.mark.parametrize(
    ("name", "place"),
    [("llama", ""), ("llama4_text", "model.layers.0.feed_forward"), ("modernbert-decoder", "lm_head.dense")],
)
def test_layers_that_get_a_list_of_tokens_are_known(name, place, load):
    """Which adapter answers a token, and whose gradient is clipped, is known by its row."""
    base = load(name)
    lora = LoraModel(base.model, LoraSpec(4, 8, 2.0, 0.0, ("all-linear",)))
    found = find_without_rows(lora.model, lora.layers, base.can.decoder)
    assert bool(found) == bool(place)
    assert all(one.startswith(place) for one in found[:1])
