"""Every way a base model can be broken, through the command line: one message with the file and the remedy, exit 2.

Each folder is made from the tiny model. A base that loads in part would be random in its missing part: another in every
process, with the same seed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora import cli
from fedlora.errors import UsageError

WEIGHTS = "model.safetensors"
LAYER = "model.layers.1.mlp.up_proj.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"
Break = Callable[[Path], Any]


class Broken(NamedTuple):
    """`parts` are in the message and `remedy` in the hint, whichever command meets the folder."""

    prepare: Break
    parts: tuple[str, ...]
    remedy: str


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Break:
    """Other tensors in the weight file."""

    def edit(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def content(name: str, change: Callable[[bytes], bytes]) -> Break:
    """Other bytes in a file."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def settings(name: str = "config.json", **fields: Any) -> Break:
    """Other values in a file of settings; `...` takes a field out."""

    def edit(folder: Path) -> None:
        value = {**json.loads((folder / name).read_text()), **fields}
        (folder / name).write_text(json.dumps({key: value[key] for key in value if value[key] is not ...}))

    return edit


def without(*names: str) -> Break:
    """The folder without some of its files."""
    return lambda folder: [(folder / name).unlink() for name in names]


def both(*changes: Break) -> Break:
    return lambda folder: [change(folder) for change in changes]


def put(name: str, value: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(value)


def in_shards(folder: Path) -> None:
    """The weights in two files of which one is missing."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(state)
    shards = {name: f"model-0000{1 + (name > LAYER)}-of-00002.safetensors" for name in names}
    kept = {name: state[name] for name in names if name <= LAYER}
    save_file(kept, folder / shards[names[0]], metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def linked(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / "blobs" / "gone")


def as_bin(folder: Path) -> None:
    """The old file format, cut."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / "pytorch_model.bin")
    content("pytorch_model.bin", lambda b: b[:-200])(folder)


AGAIN = "download the folder again"
PICKED = "name the folder that holds config.json"
SENTENCEPIECE = both(
    without("tokenizer.json"),
    put("tokenizer.model", b"\n\x0d\x0a\x05"),
    put("tokenizer_config.json", b'{"tokenizer_class": "LlamaTokenizer"}'),
)

CASES: dict[str, Broken] = {
    "a layer that is missing": Broken(weights(lambda state: state.pop(LAYER)), ("missing", LAYER), AGAIN),
    "an embedding that is missing and tied": Broken(
        weights(lambda state: state.pop("model.embed_tokens.weight")), ("missing", "model.embed_tokens.weight"), AGAIN
    ),
    "a layer too many": Broken(
        weights(lambda state: state.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(64, 32)})),
        ("LlamaForCausalLM has no place for", "model.layers.2.mlp.up_proj.weight"),
        AGAIN,
    ),
    "a layer of another shape": Broken(
        weights(lambda state: state.update({LAYER: torch.zeros(63, 32)})),
        (LAYER, "(63, 32), expected (64, 32)"),
        AGAIN,
    ),
    "weights that are cut": Broken(content(WEIGHTS, lambda b: b[:-100]), (f"model/{WEIGHTS}: cut or damaged",), AGAIN),
    "weights that are cut in the header": Broken(
        content(WEIGHTS, lambda b: b[:50]), (f"model/{WEIGHTS}: cut or damaged",), AGAIN
    ),
    "weights of no bytes": Broken(content(WEIGHTS, lambda b: b""), (f"model/{WEIGHTS}: cut or damaged",), AGAIN),
    "old weights that are cut": Broken(as_bin, ("model/pytorch_model.bin: cut or damaged",), AGAIN),
    "a shard that is missing": Broken(
        in_shards, ("model/model-00002-of-00002.safetensors: no such file", "model.safetensors.index.json"), AGAIN
    ),
    "an index that is cut": Broken(
        both(in_shards, content("model.safetensors.index.json", lambda b: b[:30])),
        ("model/model.safetensors.index.json: cut or damaged",),
        AGAIN,
    ),
    "an index without a map": Broken(
        both(in_shards, put("model.safetensors.index.json", b"{}")),
        ("model/model.safetensors.index.json: no weight_map",),
        AGAIN,
    ),
    "shards without their index": Broken(
        both(in_shards, without("model.safetensors.index.json")), ("neither model.safetensors nor",), AGAIN
    ),
    "no weights": Broken(without(WEIGHTS), ("model: no weights",), PICKED),
    "a link to weights that are gone": Broken(linked, (f"model/{WEIGHTS}: a link to a file that is gone",), AGAIN),
    "a pointer for the weights": Broken(
        put(WEIGHTS, POINTER), (f"model/{WEIGHTS}: a Git LFS pointer",), "git lfs pull"
    ),
    "a pointer for the tokenizer": Broken(
        put("tokenizer.json", POINTER), ("model/tokenizer.json: a Git LFS pointer",), "git lfs pull"
    ),
    "a pointer for the configuration": Broken(
        put("config.json", POINTER), ("model/config.json: a Git LFS pointer",), "git lfs pull"
    ),
    "a configuration that is cut": Broken(
        content("config.json", lambda b: b[:40]), ("model/config.json: cut or damaged",), AGAIN
    ),
    "a configuration that is a list": Broken(
        put("config.json", b"[1]"), ("model/config.json: not a JSON object",), AGAIN
    ),
    "a configuration with a wrong value": Broken(settings(hidden_size="wide"), ("hidden_size", "wide"), AGAIN),
    "no configuration": Broken(without("config.json"), ("no config.json",), PICKED),
    "no kind of model": Broken(settings(model_type=...), ("names no model_type",), AGAIN),
    "a kind of model of the future": Broken(
        settings(model_type="llama9"), ("does not know the model_type 'llama9'",), "--upgrade transformers"
    ),
    "a model of another task": Broken(
        settings(model_type="t5"), ("no causal language model", "'t5'"), "from left to right"
    ),
    "code of its own": Broken(
        settings(model_type="own", auto_map={"AutoConfig": "own.Own"}), ("code of its own",), "--trust_remote_code"
    ),
    "AWQ without its package": Broken(
        settings(quantization_config={"quant_method": "awq", "bits": 4}), ("a package is missing", "AWQ"), "pip install"
    ),
    "GPTQ without its package": Broken(
        settings(quantization_config={"quant_method": "gptq", "bits": 4}), ("a package is missing",), "pip install"
    ),
    "quantised in a way of the future": Broken(
        settings(quantization_config={"quant_method": "q9"}), ("'q9', which transformers does not know",), "precision"
    ),
    "no tokenizer": Broken(
        without("tokenizer.json", "tokenizer_config.json"), ("model: no tokenizer (tokenizer.json)",), AGAIN
    ),
    "a tokenizer that is cut": Broken(
        content("tokenizer.json", lambda b: b[:500]), ("model/tokenizer.json: cut or damaged",), AGAIN
    ),
    "a tokenizer with a part missing": Broken(put("tokenizer.json", b'{"version": "1.0"}'), ("tokenizer",), AGAIN),
    "SentencePiece without its package": Broken(
        SENTENCEPIECE, ("model/tokenizer.model", "sentencepiece"), "pip install sentencepiece"
    ),
    "tiktoken without its package": Broken(
        both(SENTENCEPIECE, put("tokenizer.model", b"IQ== 0\nIg== 1\n")),
        ("model/tokenizer.model", "tiktoken"),
        "pip install tiktoken",
    ),
    "an empty folder": Broken(emptied, ("model: the folder is empty",), AGAIN),
    "an adapter for a base": Broken(
        put("adapter_config.json", b"{}"), ("holds an adapter",), "name the base model itself"
    ),
    "a GGUF folder": Broken(
        both(emptied, put("tiny-q4.gguf", b"GGUF")), ("no config.json",), "the model that the file was made from"
    ),
}

TRAIN = (
    "train --base_model model --base_dtype float32 --device cpu --data_path data --model_dir models --exp_name new "
    "--num_clients 1 --num_communication_rounds 1 --prompt_template chat --client_selection_frac 1"
)
PLAN = TRAIN.replace("train", "plan", 1) + " --probe false"
GENERATE = "generate --exp_name none --of base --base_model model --test_file_path test.jsonl --device cpu"


@pytest.fixture
def world(tiny_model, tmp_path, make_clients, test_file, monkeypatch):
    """The current folder: a base `model`, one client's rows and a test file."""
    monkeypatch.chdir(tmp_path)
    # sentencepiece, tiktoken and the quantisers may be installed where the tests run
    missing = {"sentencepiece", "google.protobuf", "tiktoken"}
    monkeypatch.setattr("fedlora.llm.base_files._is_installed", lambda name: name not in missing)
    make_clients([2])
    shutil.copytree(tiny_model, tmp_path / "model")
    test_file.rename("test.jsonl")
    return tmp_path


def refuse(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that must end with exit code 2."""
    code = cli.main(command.split())
    told = capsys.readouterr().err
    assert code == 2, told
    assert told.count("error: ") == 1
    assert "Traceback" not in told
    assert "[transformers]" not in told
    return told


@pytest.mark.parametrize("name", CASES)
def test_a_broken_base_is_refused_by_its_file_with_a_remedy_before_anything_is_written(world, name, capsys):
    case = CASES[name]
    case.prepare(world / "model")
    before = set(world.iterdir())
    for command in (TRAIN, PLAN, GENERATE):
        error, _, hint = refuse(command, capsys).partition("\n  hint: ")
        for part in case.parts:
            assert part in error, command
        assert case.remedy in hint, command
        left = (
            [entry for entry in Path("models").rglob("*") if entry.suffix != ".lock"] if Path("models").exists() else []
        )
        assert [entry.name for entry in left if entry.is_file()] == []
    assert set(world.iterdir()) - before <= {world / "models"}


def test_the_whole_base_of_the_table_trains_plans_and_answers(world, capsys):
    """The folders fail for what is broken in them, and for nothing else."""
    for command in (PLAN, TRAIN, GENERATE):
        assert cli.main(command.split()) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "part"),
    [("tiny.gguf", "GGUF file"), ("model/model.safetensors", "write model"), ("notes", "local folder")],
)
def test_a_file_in_the_place_of_a_base_is_named_with_what_to_give(world, name, part, capsys):
    if not (world / name).exists():
        (world / name).write_bytes(b"GGUF")
    told = refuse(TRAIN.replace("--base_model model", f"--base_model {name}"), capsys)
    assert f"base_model='{name}': is a file, not a folder" in told
    assert part in told


def test_tied_weights_and_buffers_that_a_model_computes_need_no_file(world):
    """GPT-2 ties its output to its embedding, and old checkpoints hold a mask that it makes itself today."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from fedlora.llm.base_model import load_base_model, load_outline

    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained("gpt2")
    tokenizer.save_pretrained("gpt2")
    state = load_file(f"gpt2/{WEIGHTS}")
    assert not any("lm_head" in name for name in state)
    save_file({**state, "h.0.attn.bias": torch.ones(1, 1, 32, 32)}, f"gpt2/{WEIGHTS}", metadata={"format": "pt"})
    for load in (load_base_model, load_outline):
        assert load("gpt2", device="cpu", dtype="float32").model.config.model_type == "gpt2"


@pytest.mark.parametrize("model_type", ["gptj", "gpt_neo", "codegen"])
def test_the_masks_that_old_checkpoints_hold_are_no_weights(world, model_type):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from fedlora.llm.base_model import load_outline

    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}
    if model_type != "gpt_neo":
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=259, **sizes)).save_pretrained("old")
    AutoTokenizer.from_pretrained("model").save_pretrained("old")
    state = load_file(f"old/{WEIGHTS}")
    layer = next(name for name in state if ".attn." in name and name.endswith("_proj.weight"))
    place = layer.rpartition(".")[0].rpartition(".")[0]
    masks = {"bias": torch.ones(1, 1, 64, 64), "masked_bias": torch.tensor(-1e9), "causal_mask": torch.ones(1, 1, 64)}
    stored = {**state, **{f"{place}.{name}": mask for name, mask in masks.items()}}
    save_file(stored, f"old/{WEIGHTS}", metadata={"format": "pt"})
    load_outline("old", device="cpu")
    for foreign in (f"{place}.sinks", f"{place}.bias.bias", f"{layer.rpartition('.')[0]}.masked_bias"):
        save_file({**stored, foreign: torch.zeros(4)}, f"old/{WEIGHTS}", metadata={"format": "pt"})
        with pytest.raises(UsageError, match="1 weight that"):
            load_outline("old", device="cpu")


def test_one_expert_of_a_mixture_that_is_missing_is_no_mixture_of_fewer(world):
    """transformers puts the experts of a file into one tensor."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    from fedlora.llm.base_model import load_base_model, load_outline

    config = MixtralConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained("mixtral")
    AutoTokenizer.from_pretrained("model").save_pretrained("mixtral")
    load_base_model("mixtral", device="cpu")
    weights(lambda state: state.pop(next(name for name in sorted(state) if "experts.2" in name)))(Path("mixtral"))
    for load in (load_base_model, load_outline):
        with pytest.raises(UsageError, match=r"parts of model\.layers\.0\.mlp\.experts\.\w+ are missing"):
            load("mixtral", device="cpu")


def test_the_towers_of_a_multimodal_checkpoint_may_be_left_but_no_layer_of_its_text_model(world):
    """transformers takes the text model alone out of some multimodal checkpoints, such as Llama 4's."""
    from transformers import AutoTokenizer, Llama4Config, Llama4ForConditionalGeneration

    from fedlora.llm.base_model import load_base_model, load_outline

    text = {
        "vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "intermediate_size_mlp": 24, "head_dim": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2,
        "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
    }  # fmt: skip
    Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision)).save_pretrained("llama4")
    AutoTokenizer.from_pretrained("model").save_pretrained("llama4")
    stored = load_file(f"llama4/{WEIGHTS}")
    assert any(name.startswith("vision_model.") for name in stored)
    assert type(load_outline("llama4", device="cpu").model).__name__ == "Llama4ForCausalLM"
    more = "language_model.model.layers.1.self_attn.q_proj.weight"
    weights(lambda state: state.update({more: torch.zeros(16, 16)}))(Path("llama4"))
    for load in (load_base_model, load_outline):
        with pytest.raises(UsageError, match=r"1 weight that Llama4ForCausalLM has no place for \(.*layers\.1"):
            load("llama4", device="cpu")


def test_code_of_a_repository_that_needs_a_package_names_it(world, capsys, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(world / "modules"))
    settings(model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"})(
        world / "model"
    )
    (world / "model" / "own.py").write_text("import nowhere_to_be_found\n\nclass Own: ...\n\nclass OwnModel: ...\n")
    for command in (TRAIN, PLAN):
        told = refuse(f"{command} --trust_remote_code true", capsys)
        assert "a package is missing" in told
        assert "pip install 'nowhere_to_be_found'" in told


def test_a_socks_proxy_without_its_package_is_one_message(world, monkeypatch, capsys):
    import builtins

    real = builtins.__import__

    def no_socks(name: str, *more: Any, **how: Any) -> Any:
        if name.partition(".")[0] in ("socksio", "socks"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *more, **how)

    monkeypatch.setattr(builtins, "__import__", no_socks)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    from huggingface_hub.utils import close_session

    close_session()
    try:
        told = refuse(TRAIN.replace("--base_model model", "--base_model some/model"), capsys)
    finally:
        close_session()
    assert "pip install 'httpx" in told, told
