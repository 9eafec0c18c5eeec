import pytest
import torch

from fedlora.llm.attention import NAME, batched_attention
from fedlora.llm.base_model import load_base_model


def heads(rows: int, count: int, length: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, count, length, 8, generator=torch.Generator().manual_seed(seed))


def fused(query, key, value, mask, causal):
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=True
    ).transpose(1, 2)


@pytest.mark.parametrize(("length", "keys"), [(7, 7), (1, 7)])
def test_without_a_mask_it_equals_the_fused_kernel(length, keys):
    query, key, value = heads(3, 6, length, 1), heads(3, 2, keys, 2), heads(3, 2, keys, 3)
    found, _ = batched_attention(None, query, key, value, None, scaling=8**-0.5)
    torch.testing.assert_close(found, fused(query, key, value, None, length > 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [7, 1])
def test_with_a_mask_it_equals_the_fused_kernel(length):
    query, key, value = heads(3, 6, length, 1), heads(3, 2, 7, 2), heads(3, 2, 7, 3)
    mask = torch.ones(3, 1, length, 7, dtype=torch.bool)
    mask[0, :, :, :3] = False
    found, _ = batched_attention(None, query, key, value, mask, scaling=8**-0.5)
    torch.testing.assert_close(found, fused(query, key, value, mask, False), rtol=1e-5, atol=1e-6)


def test_the_base_model_uses_it_on_a_cpu_and_gives_the_fused_kernels_logits(tiny_model):
    from transformers import AutoModelForCausalLM

    base = load_base_model(str(tiny_model), device="cpu", dtype="float32")
    assert base.model.config._attn_implementation == NAME
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa")
    ids = torch.arange(3, 60).view(3, 19)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        for given in (None, mask):
            ours = base.model(ids, attention_mask=given).logits
            expected = theirs(ids, attention_mask=given).logits
            seen = torch.ones_like(ids, dtype=torch.bool) if given is None else given.bool()
            torch.testing.assert_close(ours[seen], expected[seen], rtol=1e-5, atol=1e-5)
