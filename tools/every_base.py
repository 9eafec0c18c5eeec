"""Try every architecture of architectures.py against transformers, and keep what came out for docs/models.md.

    python tools/every_base.py           # two minutes; then `make docs` writes the page

tests/test_every_base.py tries the same in `make test-thorough` and compares the results with the file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from architectures import ARCHITECTURES, load_own, make_folder

RESULTS = Path(__file__).parent / "every_base.json"
NEW_TOKENS = 16
LENGTHS = (40, 3, 17, 17, 2, 28, 9)
BEGINNING = [7, 77, 177, 27, 5, 6, 8]
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
SCALING = 2.0
HEADS = {"linear": "output layer", "own": "model's own head", "model": "model's forward pass"}


def try_base(name: str, tokenizer: Path, folder: Path) -> dict[str, str]:
    """How fedlora computes with one architecture; AssertionError where its results are not transformers'.

    A base that is refused has one entry, the reason.
    """
    from fedlora.errors import UsageError
    from fedlora.llm.base_model import load_base_model

    make_folder(name, tokenizer, folder)
    try:
        base = load_base_model(str(folder), device="cpu", dtype="float32")
    except UsageError as error:
        return {"refused": reason_of(error, folder)}
    own = load_own(folder)
    check_answers(base, own)
    can = base.can
    found = {
        "answers": "our cache" if can.own_cache else "generate()",
        "prompts of a batch": lengths_of(can.padded_prompts, can.equal_prompts),
        "rows of a pass": lengths_of(can.padding, can.equal_rows),
        "shared prefix": "yes" if can.shared_prefix else "-",
        "logits": {"linear": "output layer", "own": "the model's own head", "model": "the model's forward pass"}[
            can.head
        ],
    }
    found |= check_training(base, own)
    found["int8"] = check_quantised(folder)
    return found


def reason_of(error: Exception, folder: Path) -> str:
    """An error without the place of the model."""
    return str(error).replace(f"base_model={str(folder)!r}", "").strip(" :")


def lengths_of(padded: int, alike: bool) -> str:
    """What lies in one pass."""
    return "of any length" if padded else "of one length" if alike else "one"


def draw_prompts(limit: int | None) -> list[list[int]]:
    """Prompts of several lengths that leave room for an answer."""
    import torch

    draw = torch.Generator().manual_seed(1)
    drawn = [torch.randint(3, 256, (length,), generator=draw).tolist() for length in LENGTHS]
    return [prompt for prompt in drawn if limit is None or len(prompt) + len(BEGINNING) + NEW_TOKENS <= limit]


def check_answers(base: Any, own: Any) -> None:
    """One row, three, all, and all with one beginning: greedy answers are those of generate() for each row alone."""
    from fedlora.llm.decoding import Decoding, Request
    from fedlora.llm.generation import generate_answers

    prompts = draw_prompts(base.context)
    for rows in (prompts[:1], prompts[:3], prompts, [BEGINNING + prompt for prompt in prompts]):
        requests = [Request(prompt, number) for number, prompt in enumerate(rows)]
        found = generate_answers(base, requests, Decoding(NEW_TOKENS), tokens_per_pass=4096)
        expected = [generate_alone(own, prompt) for prompt in rows]
        assert found == expected, f"answers to {len(rows)} rows: {found} is not {expected}"


def generate_alone(model: Any, prompt: Sequence[int], new_tokens: int = NEW_TOKENS) -> list[int]:
    """What transformers answers."""
    import torch

    ids = torch.tensor([prompt])
    how = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist()
    return answer[: answer.index(2)] if 2 in answer else answer


def check_training(base: Any, own: Any) -> dict[str, str]:
    """Loss and gradients of all linear layers, with and without checkpointing, are those of dense weights."""
    import torch

    from fedlora.llm.examples import Example
    from fedlora.llm.lora import LoraModel, LoraSpec

    prompts = draw_prompts(base.context)
    examples = [Example(BEGINNING + prompt, max(8, 7 + len(prompt) // 2)) for prompt in prompts if len(prompt) > 2]
    lora = LoraModel(base.model, LoraSpec(4, 8, SCALING, 0.0, ("all-linear",)))
    draw = torch.Generator().manual_seed(3)
    state = {key: 0.05 * torch.randn(shape, generator=draw) for key, shape in sorted(lora.shapes().items())}
    loss, expected = dense_gradients(own, list(lora.layers), state, examples)
    kinds = [False, True] if base.model.supports_gradient_checkpointing else [False]
    for checkpointing in kinds:
        found_loss, found = lora_gradients(base, lora, state, examples, checkpointing=checkpointing)
        assert abs(found_loss - loss) <= TOLERANCE * loss, f"loss {found_loss} is not {loss}"
        for key, gradient in found.items():
            away = float((gradient - expected[key]).norm() / expected[key].norm().clamp(min=1e-9))
            assert away <= GRADIENT_TOLERANCE, f"{key}: gradient differs by {away:.0e}, checkpointing={checkpointing}"
    notes = [note for note in lora.notes if note.startswith("not adapted: ")]
    return {
        "checkpointing": "yes" if len(kinds) == 2 else "-",
        "all-linear": "; ".join([f"{len(lora.layers)} layers", *notes]),
    }


def dense_gradients(model: Any, layers: Sequence[str], state: Any, examples: Any) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of the factors, of a model whose weights are `W + s B A`, one row a pass."""
    import torch
    import torch.nn.functional as F  # noqa: N812
    from transformers.pytorch_utils import Conv1D

    model.requires_grad_(False)
    factors = {}
    for name in layers:
        layer = model.get_submodule(name)
        a, b = (state[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
        delta = SCALING * b @ a
        # a parameter of its own, where layers share one
        layer.weight = torch.nn.Parameter(layer.weight + (delta.t() if isinstance(layer, Conv1D) else delta))
        factors[name] = (layer, a, b)
    total = torch.zeros(())
    for example in examples:
        ids = torch.tensor([example.ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, example.labels_from - 1 : -1]
        total = total + F.cross_entropy(logits, ids[0, example.labels_from :], reduction="sum")
    total.backward()
    gradients = {}
    for name, (layer, a, b) in factors.items():
        # no token may reach an expert
        gradient = torch.zeros_like(layer.weight) if layer.weight.grad is None else layer.weight.grad
        gradient = gradient.t() if isinstance(layer, Conv1D) else gradient
        gradients[f"base_model.model.{name}.lora_A.weight"] = SCALING * b.t() @ gradient
        gradients[f"base_model.model.{name}.lora_B.weight"] = SCALING * gradient @ a.t()
    return float(total), gradients


def lora_gradients(
    base: Any, lora: Any, state: Any, examples: Any, *, checkpointing: bool
) -> tuple[float, dict[str, Any]]:
    """The same as training computes them: passes, padding, shared prefix and loss are its own."""
    import torch

    from fedlora.llm.examples import cut_alike, make_batch
    from fedlora.llm.loss import backward_loss

    lora.set_adapter(state)
    total = 0.0
    for _, factor in lora.named_factors():
        factor.grad = None
    with lora.train_mode(checkpointing=checkpointing):
        lengths, most = [len(row.ids) for row in examples], None if base.can.equal_rows else 1
        for group in cut_alike(lengths, base.can.padding, token_budget=4096, most_rows=most):
            rows = [examples[index] for index in group]
            share = not checkpointing and max(len(row.ids) for row in rows) <= base.can.shared_prefix
            lora.noise.begin_pass([0] * len(rows), base.device)
            total += float(backward_loss(base, make_batch(rows, pad_id=base.pad_id, share_prefix=share), scale=1.0))
    return total, {
        key: torch.zeros_like(factor) if factor.grad is None else factor.grad for key, factor in lora.named_factors()
    }


def check_quantised(folder: Path) -> str:
    """`yes` where the base loads in 8 bits and passes its check, else why it is refused."""
    from fedlora.errors import UsageError
    from fedlora.llm.base_model import load_base_model

    try:
        load_base_model(str(folder), device="cpu", dtype="float32", quantization="int8")
    except UsageError as error:
        return f"refused: {reason_of(error, folder)}"
    return "yes"


def main() -> None:
    import transformers
    from tiny_run import make_tiny_model

    with tempfile.TemporaryDirectory() as place:
        tokenizer = make_tiny_model(Path(place) / "tokenizer")
        results = {}
        for number, name in enumerate(ARCHITECTURES):
            results[name] = try_base(name, tokenizer, Path(place) / str(number))
            print(name, results[name])
    text = {"transformers": transformers.__version__, "results": dict(sorted(results.items()))}
    RESULTS.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
