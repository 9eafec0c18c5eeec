import pytest
import torch

from fedlora.llm.attention import BLOCK, NAME, batched_attention
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


def drawn(*shape: int, seed: int) -> torch.Tensor:
    values = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.requires_grad_()


@pytest.mark.parametrize("kind", ["causal", "seen", "added"])
@pytest.mark.parametrize("length", [5, BLOCK, BLOCK + 1, 2 * BLOCK + 37])
def test_gradients_are_those_of_the_plain_formula(kind, length):
    query, key, value = drawn(2, 6, length, 8, seed=1), drawn(2, 2, length, 8, seed=2), drawn(2, 2, length, 4, seed=3)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = causal.expand(2, 1, length, length).clone()
    seen[0, :, :, 1:3] = False
    seen[:, :, range(length), range(length)] = True
    mask = {"causal": None, "seen": seen, "added": torch.where(seen, 0.0, -1e9).double()}[kind]
    scores = 0.3 * query @ key.repeat_interleave(3, 1).transpose(2, 3)
    scores = scores.masked_fill(~(causal if kind == "causal" else seen), float("-inf"))
    expected = (torch.softmax(scores, -1) @ value.repeat_interleave(3, 1)).transpose(1, 2)
    found, _ = batched_attention(None, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected)
    outer = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (query, key, value), outer)
    for mine, theirs in zip(torch.autograd.grad(found, (query, key, value), outer), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_block_keeps_no_weight_for_keys_behind_its_end():
    length = 4 * BLOCK
    query, key, value = drawn(1, 2, length, 4, seed=1), drawn(1, 1, length, 4, seed=2), drawn(1, 1, length, 4, seed=3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda tensor: tensor):
        batched_attention(None, query, key, value, None)
    assert sum(kept) < 2 * length * length * 0.65
