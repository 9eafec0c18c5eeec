import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from fedlora import cli
from fedlora.config.prompting import PromptSettings
from fedlora.errors import UsageError
from fedlora.llm.base_model import load_base_model, load_outline
from fedlora.llm.examples import make_encoder
from fedlora.llm.limits import check_tokens, has_position_table

TRAIN = (
    "train --base_dtype float32 --device cpu --exp_name r --num_clients 1 --num_communication_rounds 1 "
    "--client_selection_frac 1 --prompt_template chat --token_cache false"
)


def save(model, folder: Path, tokenizer) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tiny_model):
    return transformers.AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def gpt2(tmp_path, tokenizer) -> Path:
    """A base with 96 learned positions."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=259, n_positions=96, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    return save(transformers.GPT2LMHeadModel(config), tmp_path / "gpt2", tokenizer)


@pytest.fixture
def world(tmp_path, make_clients, test_file, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_clients([3])
    test_file.rename(tmp_path / "test.jsonl")
    return tmp_path


def run(command: str, capsys) -> tuple[int, str]:
    code = cli.main(command.split())
    return code, capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "plan", "plan --probe false"])
def test_examples_longer_than_the_learned_positions_are_refused_before_the_first_step(world, gpt2, command, capsys):
    arguments = f"{TRAIN} --base_model gpt2 --target_modules c_attn --cutoff_len 97".replace("train", command, 1)
    code, told = run(arguments, capsys)
    assert code == 2
    assert "cutoff_len=97 is more than the 96 positions of base_model='gpt2'" in told
    assert "use --cutoff_len 96 or less" in told
    assert not list(Path("models").rglob("*.json"))


def test_a_base_with_learned_positions_trains_answers_and_is_measured_up_to_its_last_one(world, gpt2, capsys):
    rows = json.loads(Path("data/1/local_training_0.json").read_text())
    rows[0]["output"] = "long " * 60
    Path("data/1/local_training_0.json").write_text(json.dumps(rows))
    code, told = run(f"{TRAIN} --base_model gpt2 --target_modules c_attn --cutoff_len 96", capsys)
    assert code == 0, told
    code, told = run("generate r --test test.jsonl --device cpu --max_new_tokens 90", capsys)
    assert code == 0, told
    assert "gpt2 has 96 positions: 6 answers of 6 may end before max_new_tokens=90" in told
    assert told.count("positions") == 1
    code, told = run("loss r --of base,global --test test.jsonl --device cpu", capsys)
    assert code == 0, told


def test_rotary_positions_go_on_beyond_what_a_base_was_made_for_and_that_is_said_once(world, tiny_model, capsys):
    shutil.copytree(tiny_model, "short")
    config = json.loads(Path("short/config.json").read_text())
    Path("short/config.json").write_text(json.dumps({**config, "max_position_embeddings": 96}))
    code, told = run(f"{TRAIN} --base_model short --cutoff_len 128", capsys)
    assert code == 0, told
    assert told.count("warning: cutoff_len=128, but short was made for 96 tokens") == 1


@pytest.mark.parametrize(
    ("config", "context", "expected"),
    [
        (transformers.OPTConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8,
                                word_embed_proj_dim=8, max_position_embeddings=40), 40, True),
        (transformers.GPTJConfig(vocab_size=9, n_embd=8, n_layer=1, n_head=1, n_positions=40, rotary_dim=4), 40, True),
        (transformers.LlamaConfig(vocab_size=40, hidden_size=40, intermediate_size=40, num_hidden_layers=1,
                                  num_attention_heads=1, max_position_embeddings=40), 40, False),
        (transformers.BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=1), 40, False),
    ],
    ids=["opt", "gptj", "llama", "bloom"],
)  # fmt: skip
def test_a_table_of_positions_is_told_from_layers_of_the_same_size(config, context, expected):
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert has_position_table(model, context) is expected


def narrow(tiny_model: Path, folder: Path, rows: int) -> Path:
    """The tiny model with an embedding of fewer rows than its tokenizer has tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(rows)
    return save(model, folder, transformers.AutoTokenizer.from_pretrained(tiny_model))


@pytest.mark.parametrize("command", ["train", "plan", "generate --of base --test test.jsonl"])
def test_a_token_without_a_row_of_the_embedding_is_named(world, tiny_model, tokenizer, command, capsys):
    narrow(tiny_model, world / "narrow", 250)
    token = tokenizer.convert_ids_to_tokens(250)
    arguments = f"{TRAIN} --base_model narrow".replace("train", command, 1)
    if command.startswith("generate"):
        arguments = f"{command} --base_model narrow --device cpu --exp_name none"
    code, told = run(arguments, capsys)
    assert code == 2
    assert f"its embedding has 250 rows, but 9 tokens of its tokenizer are beyond: '{token}' (250)" in told
    assert "resize_token_embeddings" in told


def test_added_tokens_beyond_the_embedding_matter_where_a_template_uses_them(world, tiny_model, tokenizer):
    """Gemma 3's tokenizer has a token for images that its text models have no row for."""
    for name in ("unused", "used"):
        shutil.copytree(tiny_model, name)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        if name == "used":
            tokenizer.chat_template = "<image>" + str(tokenizer.chat_template)
        tokenizer.save_pretrained(name)
    for load in (load_base_model, load_outline):
        base = load("unused", device="cpu")
        assert len(base.tokenizer) == 260
        check_tokens(base, make_encoder(base.tokenizer, PromptSettings("chat")))
        base = load("used", device="cpu")
        with pytest.raises(UsageError, match=r"1 token of its tokenizer is beyond: '<image>' \(259\)"):
            check_tokens(base, make_encoder(base.tokenizer, PromptSettings("chat")))
        check_tokens(base, make_encoder(base.tokenizer, PromptSettings("alpaca")))


def test_an_added_token_for_padding_needs_no_row(world, tiny_model, tokenizer, capsys):
    shutil.copytree(tiny_model, "padded")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained("padded")
    assert load_base_model("padded", device="cpu").pad_id == 2
    for command in (f"{TRAIN} --base_model padded", "generate r --test test.jsonl --device cpu --max_new_tokens 2"):
        code, told = run(command, capsys)
        assert code == 0, told
