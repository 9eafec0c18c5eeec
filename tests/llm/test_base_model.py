import socket
import time

import pytest
import torch

from fedlora.errors import UsageError
from fedlora.llm import embedded_model, hub
from fedlora.llm.base_model import choose_device, choose_dtype, load_base_model, load_outline


def test_a_hub_that_does_not_answer_is_found_out_at_once_and_the_error_names_the_embedded_model(monkeypatch):
    from huggingface_hub import constants

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        assert hub.is_offline()
        began = time.monotonic()
        with pytest.raises(UsageError, match="'some/model' cannot be loaded from the model hub") as caught:
            load_base_model("some/model", device="cpu")
    assert time.monotonic() - began < 30
    assert "--base_model smollm2-135m" in caught.value.hint
    assert "fedlora model smollm2-135m" in caught.value.hint


def test_a_hub_that_answers_is_asked(monkeypatch):
    from huggingface_hub import constants

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        assert not hub.is_offline()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert hub.is_offline()


def test_a_folder_that_is_no_model_is_an_error_that_says_folder(tmp_path):
    with pytest.raises(UsageError, match="the folder is empty"):
        load_base_model(str(tmp_path), device="cpu")


def test_the_embedded_model_without_its_package_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded_model, "package_file", lambda: None)
    with pytest.raises(UsageError, match="is not installed") as caught:
        load_base_model("smollm2-135m", device="cpu")
    assert "fedlora model smollm2-135m" in caught.value.hint


def test_a_converted_model_is_used_again_and_a_half_one_never(monkeypatch, tmp_path, tiny_model):
    """The conversion works in a folder of its own and renames it: what stands at the final place is whole."""
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    source = tmp_path / "weights.gguf"
    source.write_bytes(b"GGUF")
    monkeypatch.setattr(embedded_model, "package_file", lambda: source)
    with pytest.raises(Exception, match=r".+"):
        embedded_model.folder()
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()]

    def convert(_: object, target) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(embedded_model, "_convert", convert)
    first = embedded_model.folder()
    monkeypatch.setattr(embedded_model, "_convert", lambda *_: pytest.fail("converted twice"))
    assert embedded_model.folder() == first


@pytest.mark.parametrize("wanted", ["gpu", "cuda:0", "mps"])
def test_a_device_that_is_not_there_is_an_error(wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=wanted):
        choose_device(wanted)


def test_the_base_is_bfloat16_only_where_the_processor_multiplies_it(monkeypatch):
    cpu = torch.device("cpu")
    for features, expected in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features, raising=False)
        assert choose_dtype("auto", cpu) == expected
    assert choose_dtype("float16", cpu) == torch.float16


def test_a_model_whose_logits_are_more_than_its_output_layer_goes_through_its_own_forward(tmp_path, tiny_model):
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.05,
        sliding_window=16,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=1,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    base = load_base_model(str(tmp_path), device="cpu", dtype="float32")
    assert base.can.head == "own"
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = base.model(ids).logits[:, -1]
        found = base.last_logits(input_ids=ids)
    torch.testing.assert_close(found, expected)
    assert float(found.abs().max()) <= 0.05


@pytest.mark.parametrize("name", ["./model", "model/", "/models/llama", "~/llama", "models/llama/base", "..", "a\\b"])
def test_a_local_path_that_is_missing_is_no_matter_of_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if name == "..":
        name = "../nowhere"
    for load in (load_base_model, load_outline):
        with pytest.raises(UsageError) as caught:
            load(name)
        assert str(caught.value) == f"base_model={name!r}: no such folder"
        assert "hub" not in caught.value.hint


def test_a_base_below_the_home_folder_is_found(monkeypatch, tiny_model):
    monkeypatch.setenv("HOME", str(tiny_model.parent))
    base = load_outline(f"~/{tiny_model.name}", device="cpu")
    assert base.name == f"~/{tiny_model.name}"
    assert base.identity == load_outline(f"{tiny_model}/", device="cpu").identity


@pytest.mark.parametrize("name", ["some-model", "meta-llama/Llama-3.2-1B", "a.b/c_d"])
def test_a_name_that_a_hub_may_have_is_asked_there(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="from the model hub, which may be out of reach, and there is no such folder"):
        load_outline(name)
