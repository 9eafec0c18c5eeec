import shutil

import pytest
import torch
from lost_signals import lose_signal

from fedlora.config.generate import GenerateConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import TrainingError
from fedlora.federated.adapters import make_adapter
from fedlora.llm import generation
from fedlora.llm.base_model import load_base_model
from fedlora.llm.decoding import Decoding, choose_decoding, choose_tokens
from fedlora.llm.examples import encode_rows
from fedlora.llm.generation import Request
from fedlora.llm.generation import generate_answers as generate_requests
from fedlora.llm.layout import Layout, LayoutBook
from fedlora.llm.local_training import Trainer
from fedlora.llm.lora import LoraModel, LoraSpec
from fedlora.llm.prompts import PromptEncoder
from fedlora.rows import Row
from fedlora.stopping import stop_on_signals
from fedlora.types import Phase


@pytest.fixture(scope="module")
def base(tiny_model):
    base = load_base_model(str(tiny_model), device="cpu", dtype="float32")
    # a model that says different things for different prompts: random factors, not tiny ones
    lora = LoraModel(base.model, LoraSpec(4, 16, 4.0, 0.0, ("q_proj", "v_proj", "down_proj")))
    generator = torch.Generator().manual_seed(3)
    lora.set_adapter({key: torch.randn(shape, generator=generator) for key, shape in sorted(lora.shapes().items())})
    return base


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 259, (length,), generator=generator).tolist() for length in (40, 3, 17, 17, 1, 28, 9)]


def generate_answers(base, prompts, decoding, **options):
    return generate_requests(base, [Request(prompt, row) for row, prompt in enumerate(prompts)], decoding, **options)


def one_by_one(base, prompts, **options) -> list[list[int]]:
    """The oracle: transformers' own generate, one row at a time."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = base.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, max_new_tokens=20, **options
        )
        answer = out[0, len(prompt) :].tolist()
        answers.append(answer[: answer.index(2)] if 2 in answer else answer)
    return answers


@pytest.fixture(scope="module")
def learned_positions(tiny_model, tmp_path_factory):
    """A GPT-2 that knows 48 positions and never ends an answer by itself."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    sizes = {"n_positions": 48, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_base_model(str(folder), device="cpu", dtype="float32")


def test_the_context_is_what_the_model_was_made_for(base, learned_positions):
    assert (base.context, learned_positions.context) == (1024, 48)


def test_an_answer_ends_with_the_model_s_context_whoever_shares_its_batch(learned_positions, prompts, monkeypatch):
    monkeypatch.setattr(generation, "stop_tokens", lambda base: {300})
    together = generate_answers(learned_positions, prompts, Decoding(30), tokens_per_pass=4096)
    assert [len(answer) for answer in together] == [min(30, 48 - len(prompt)) for prompt in prompts]
    for prompt, answer in zip(prompts, together, strict=True):
        assert generate_answers(learned_positions, [prompt], Decoding(30), tokens_per_pass=64) == [answer]


@pytest.mark.usefixtures("handlers")
def test_generation_stops_at_the_next_step_when_a_signal_was_lost(base, prompts, monkeypatch):
    steps = []

    def losing(*arguments):
        steps.append(arguments)
        lose_signal()
        return choose_tokens(*arguments)

    monkeypatch.setattr(generation, "choose_tokens", losing)
    with pytest.raises(SystemExit), stop_on_signals():
        generate_answers(base, prompts, Decoding(20), tokens_per_pass=4096)
    assert len(steps) == 1


def test_greedy_answers_equal_transformers_generate_one_row_at_a_time(base, prompts):
    found = generate_answers(base, prompts, Decoding(20), tokens_per_pass=4096)
    assert found == one_by_one(base, prompts)
    assert len({tuple(answer) for answer in found}) > 3


def test_the_repetition_penalty_is_transformers_own(base, prompts):
    found = generate_answers(base, prompts, Decoding(20, repetition_penalty=1.3), tokens_per_pass=4096)
    assert found == one_by_one(base, prompts, repetition_penalty=1.3)


@pytest.mark.parametrize(
    "decoding",
    [
        pytest.param(Decoding(20), marks=pytest.mark.thorough),
        Decoding(20, temperature=1.0, top_p=0.9, top_k=40),
    ],
)
def test_an_answer_does_not_depend_on_the_batch(base, prompts, decoding):
    together = generate_answers(base, prompts, decoding, tokens_per_pass=4096)
    alone = generate_answers(base, prompts, decoding, tokens_per_pass=4096, most_rows=1)
    pairs = generate_answers(base, prompts, decoding, tokens_per_pass=4096, most_rows=2)
    assert together == alone == pairs


def test_finished_rows_leave_the_batch_and_the_others_go_on(base, prompts):
    """Some rows stop early here, so the batch shrinks while others are still writing."""
    penalised = Decoding(60, temperature=3.0)
    answers = generate_answers(base, prompts, penalised, tokens_per_pass=4096)
    lengths = [len(answer) for answer in answers]
    assert min(lengths) < 60
    assert all(2 not in answer for answer in answers)
    assert answers == generate_answers(base, prompts, penalised, tokens_per_pass=4096, most_rows=1)


def test_sampling_follows_the_seed_and_the_filters(base, prompts):
    sampled = [
        generate_answers(base, prompts, Decoding(20, temperature=1.0, seed=seed), tokens_per_pass=4096)
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    greedy = generate_answers(base, prompts, Decoding(20), tokens_per_pass=4096)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        assert generate_answers(base, prompts, Decoding(20, temperature=1.0, **narrow), tokens_per_pass=4096) == greedy


def test_sampled_frequencies_are_the_filtered_probabilities():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(4000, 4)
    uniforms = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = torch.zeros(4000, 4, dtype=torch.bool)
    tokens = choose_tokens(logits, seen, uniforms, Decoding(1, temperature=1.0, top_p=0.75))
    shares = torch.bincount(tokens, minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.03, rtol=0)


def test_the_reference_preset_is_the_earlier_codes_sampling_and_flags_go_on_top():
    found = choose_decoding(GenerateConfig.of(preset="reference", top_k="7"))
    assert found == Decoding(128, temperature=0.1, top_p=0.75, top_k=7, repetition_penalty=1.1, seed=309)
    assert choose_decoding(GenerateConfig.of()) == Decoding(128)


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_logits_of_generation_equal_those_of_training(tiny_model, prompts, monkeypatch, dtype, noise):
    """Every decode step, behind a shared prefix, padding, a growing cache and two stacked adapters."""
    base = load_base_model(str(tiny_model), device="cpu", dtype=dtype)
    lora = LoraModel(base.model, LoraSpec(4, 8, 2.0, 0.05, ("q_proj", "v_proj", "down_proj")))
    generator = torch.Generator().manual_seed(3)
    states = [
        {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in lora.shapes().items()} for _ in range(2)
    ]
    seen = []

    def record(logits, *rest):
        seen.append(logits.float().clone())
        return choose_tokens(logits, *rest)

    monkeypatch.setattr(generation, "choose_tokens", record)
    monkeypatch.setattr(generation, "stop_tokens", lambda base: {-1})
    requests = [Request([7, 77, 177, *prompt], row, row % 2) for row, prompt in enumerate(prompts)]
    lora.stack_adapters(states, base.dtype)
    batch = generation.Batch(base, requests, Decoding(70), lora)
    answers = batch.answer()
    steps = torch.stack(seen, dim=1)  # (rows, steps, vocabulary): nobody leaves
    for row, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        lora.set_adapter(states[request.adapter])
        ids = torch.tensor([[*request.prompt, *answer[:-1]]])
        with torch.no_grad():
            expected = base.head(base.hidden(ids))[0, len(request.prompt) - 1 :].float()
        difference = (steps[row] - expected).norm() / expected.norm()
        assert float(difference) < noise


def test_a_memorised_row_is_reproduced(tiny_model):
    config = TrainConfig.of(local_batch_size=2, local_num_epochs=200, local_learning_rate=5e-3, lora_dropout=0.0)
    base = load_base_model(str(tiny_model), device="cpu", dtype="float32")
    lora = LoraModel(base.model, LoraSpec(8, 16, 2.0, 0.0, ("all-linear",)))
    encoder = PromptEncoder(base.tokenizer, "chat")
    rows = [Row("ping", "", "pong", ""), Row("up", "", "down", "")]
    trainer = Trainer(base, lora, config, LayoutBook(Layout(4096)))
    trained = trainer.train(
        Phase(make_adapter(lora.shapes(), 0)),
        encode_rows(rows, encoder, cutoff=64).examples,
        round_number=1,
        client_id=0,
    )
    lora.set_adapter(trained.adapter)
    prompts = [encoder.question(row, cutoff=64, context=None, max_new_tokens=8).ids for row in rows]
    answers = generate_answers(base, prompts, Decoding(8), tokens_per_pass=512)
    assert [encoder.decode(answer) for answer in answers] == ["pong", "down"]


def test_what_all_prompts_begin_with_passes_through_the_model_once(base, prompts, monkeypatch):
    prefix = [7, 77, 177, 27]
    longer = [prefix + prompt for prompt in prompts]
    expected = generate_answers(base, longer, Decoding(8), tokens_per_pass=4096, most_rows=1)
    seen = []
    forward = base.model.base_model.forward

    def count(*args, **kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(base.model.base_model, "forward", count)
    assert generate_answers(base, longer, Decoding(8), tokens_per_pass=4096) == expected
    assert seen[:2] == [(1, len(prefix)), (len(prompts), max(map(len, prompts)))]


def test_a_model_with_a_sliding_window_answers_alike_alone_and_in_a_batch(tmp_path, tiny_model, prompts):
    """Its layers see a window of the cache, so no gap may stand between a shared prefix and the rest."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        eos_token_id=2,
        bos_token_id=1,
    )
    folder = tmp_path / "mistral"
    shutil.copytree(tiny_model, folder)
    MistralForCausalLM(config).save_pretrained(folder)
    base = load_base_model(str(folder), device="cpu", dtype="float32")
    longer = [[7, 77, 177, 27, *prompt] for prompt in prompts]
    together = generate_answers(base, longer, Decoding(20), tokens_per_pass=4096)
    assert together == one_by_one(base, longer)


def test_out_of_memory_splits_the_batch_and_loses_no_answer(base, prompts, monkeypatch):
    expected = generate_answers(base, prompts, Decoding(20), tokens_per_pass=4096)
    answer, sizes = generation.Batch.answer, []

    def exhausted(self):
        sizes.append(len(self.ids))
        if len(self.ids) > 2:
            raise torch.OutOfMemoryError("no")
        return answer(self)

    monkeypatch.setattr(generation.Batch, "answer", exhausted)
    seen = []
    found = generate_answers(base, prompts, Decoding(20), tokens_per_pass=4096, on_rows=seen.append)
    assert found == expected
    assert sum(seen) == len(prompts)
    assert max(sizes) == len(prompts)


def test_a_prompt_that_does_not_fit_alone_is_one_clear_error(base, prompts, monkeypatch):
    monkeypatch.setattr(generation.Batch, "answer", lambda self: torch.empty(2**60))
    with pytest.raises(TrainingError, match=r"row 1: out of memory with one prompt of 40 tokens"):
        generate_answers(base, prompts, Decoding(20), tokens_per_pass=4096)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("prefix", [pytest.param([], marks=pytest.mark.thorough), [7, 77, 177, 27]])
def test_adapters_that_answer_together_say_what_each_says_alone(tiny_model, prompts, prefix, dtype):
    base = load_base_model(str(tiny_model), device="cpu", dtype=dtype)
    lora = LoraModel(base.model, LoraSpec(4, 16, 4.0, 0.05, ("q_proj", "v_proj", "down_proj")))
    generator = torch.Generator().manual_seed(3)
    states = [
        None if index == 1 else {key: torch.randn(shape, generator=generator) for key, shape in lora.shapes().items()}
        for index in range(4)
    ]
    longer = [prefix + prompt for prompt in prompts]
    decoding = Decoding(12, temperature=0.7)
    apart = []
    for state in states:
        lora.set_adapter(state)
        apart += generate_answers(base, longer, decoding, tokens_per_pass=4096, most_rows=1)
    lora.stack_adapters(states, base.dtype)
    requests = [Request(prompt, row, adapter) for adapter in range(4) for row, prompt in enumerate(longer)]
    together = generate_requests(base, requests, decoding, tokens_per_pass=4096, lora=lora)
    alike = sum(mine == theirs for mine, theirs in zip(together, apart, strict=True))
    assert alike == len(apart) if dtype == "float32" else alike > len(apart) / 2
    assert len({tuple(answer) for answer in apart}) > 20
    lora.set_adapter(states[2])
    alone = generate_answers(base, longer, decoding, tokens_per_pass=4096, most_rows=1)
    assert alone == apart[2 * len(prompts) : 3 * len(prompts)]
