"""Which linear layers a LoRA layer can stand for: those whose output text passes through, and passes a gradient back.

Two things rule a layer out. A vision tower, a head for another task, a layer that answers with more than its product
get no gradient from text. And where code of the model takes the weight of a layer and multiplies by it itself (the
fused kernels of state-space layers do, in training on a GPU), it goes past what stands in the layer's place. PEFT
refuses such layers of some models too.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.errors import UsageError, refusal_of

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_TOKENS = 6
_FACTS = frozenset({"dtype", "device", "shape", "data", "size", "ndim"})
"""What code may ask of a weight without computing with it."""


@dataclass(frozen=True)
class Linear:
    """A linear layer by its path in the model; the weight maps d_in numbers to d_out."""

    name: str
    layer: nn.Module
    d_in: int
    d_out: int


def find_linear(model: Any) -> dict[str, Linear]:
    """Every linear layer but the output layer, GPT-2's Conv1D among them, by its path."""
    head = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        size = linear_size(module) if module is not head else None
        if size is not None:
            found[name] = Linear(name, module, *size)
    return found


def is_conv1d(module: nn.Module) -> bool:
    """Whether a layer stores its weight as (d_in, d_out)."""
    from transformers.pytorch_utils import Conv1D

    # a quantised layer is no Conv1D any more, the layer that its adapter will be loaded onto may be one
    return isinstance(module, Conv1D) or getattr(module, "source_cls", None) is Conv1D


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer, None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_conv1d(module):
        return module.weight.shape[0], module.weight.shape[1]  # type: ignore[union-attr]
    return None


def starred(name: str) -> str:
    """A path without the numbers of blocks and experts."""
    return _NUMBER.sub("*", name)


def text_part(model: Any) -> Any:
    """The model, or of a wrapper around several the one that reads text: a wrapper may ask for more than tokens."""
    decoder, embedding = model.get_decoder(), model.get_input_embeddings()
    # what some models call their decoder is their output layer
    reads = any(part is embedding for part in decoder.modules())
    return decoder if reads and decoder is not model.base_model else model


def find_bypassed(model: Any, names: Collection[str]) -> set[str]:
    """The layers whose weight the code of the module above them multiplies by itself."""
    found = set()
    for name in names:
        parent, _, child = name.rpartition(".")
        if child in _weights_read_by(type(model.get_submodule(parent))):
            found.add(name)
    return found


def find_reached(model: Any, layers: Mapping[str, Linear]) -> set[str]:
    """The layers that pass a gradient of text on, and those at the same place of other blocks.

    A few tokens go forwards and backwards, and do not reach every expert of a mixture.
    """
    places = {starred(name) for name in _probe(model, layers)}
    return {name for name in layers if starred(name) in places}


def find_without_rows(model: Any, layers: Mapping[str, nn.Module], decoder: str) -> list[str]:
    """The layers that do not get (rows, length, d) of a batch: of a mixture of experts some get a list of tokens, and
    those after the `decoder`, if it has a name, the positions with a label."""
    found = {name for name in layers if decoder and not name.startswith(f"{decoder}.")}

    def look(name: str, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[:-1] != (2, _TOKENS):
            found.add(name)

    handles = [
        layer.register_forward_pre_hook(functools.partial(lambda name, _, inputs: look(name, inputs), name))
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            _pass_tokens(model, rows=2)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in layers if name in found]


def _probe(model: Any, layers: Mapping[str, Linear]) -> set[str]:
    probes: dict[str, Tensor] = {}

    def probe_of(name: str, layer: Linear) -> Callable[..., Tensor | None]:
        def add(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
            # a layer that answers anything but (..., d_out) to (..., d_in) is no linear layer, whatever its class
            given = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], Tensor) else None
            if given is None or not isinstance(output, Tensor) or output.shape != (*given.shape[:-1], layer.d_out):
                return None
            probes.setdefault(name, torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True))
            return output + probes[name]

        return add

    handles = [layer.layer.register_forward_hook(probe_of(name, layer)) for name, layer in layers.items()]
    try:
        with _as_in_training(model), _without_products(model):
            total = _pass_tokens(model).float().sum()
            names = list(probes)
            found = torch.autograd.grad(total, [probes[name] for name in names], allow_unused=True) if names else []
    except Exception as error:
        if refusal_of(error) is not None:
            raise
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"this base model cannot be trained: a pass in training mode fails ({reason})",
            hint="leave --quantization out if it is given, or choose another base model",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return {name for name, gradient in zip(names, found, strict=True) if gradient is not None}


def _pass_tokens(model: Any, rows: int = 1) -> Tensor:
    """Logits, or hidden states, after a few tokens of text."""
    vocabulary, device = model.get_input_embeddings().weight.shape[0], next(model.parameters()).device
    ids = torch.arange(_TOKENS, device=device).remainder(vocabulary).expand(rows, -1)
    return text_part(model)(input_ids=ids, use_cache=False)[0]


@contextmanager
def _as_in_training(model: Any) -> Iterator[None]:
    """With gradients and in training mode, where code of a model may take another way; no generator moves on."""
    device, mode = next(model.parameters()).device, model.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        model.train()
        try:
            yield
        finally:
            model.train(mode)


@contextmanager
def _without_products(model: Any) -> Iterator[None]:
    """Linear layers answer with the sum of what they are given: which way a gradient takes does not depend on values,
    and the products of a model without weights, whose zeros are views of one number, are slow."""
    from transformers.pytorch_utils import Conv1D

    patched = []
    for module in model.modules():
        size = linear_size(module)
        is_plain = type(module).forward in (nn.Linear.forward, Conv1D.forward) and "forward" not in vars(module)
        if size is not None and is_plain:
            module.forward = functools.partial(_sum, module, size[1])
            patched.append(module)
    try:
        yield
    finally:
        for module in patched:
            del module.forward


def _sum(module: Any, d_out: int, given: Tensor) -> Tensor:
    """(..., d_in) -> (..., d_out), in the type of the layer's product."""
    return given.sum(-1, keepdim=True).to(module.weight.dtype).expand(*given.shape[:-1], d_out).clone()


@functools.cache
def _weights_read_by(kind: type) -> frozenset[str]:
    """Names of the layers whose weight the methods of a class compute with, by its source; none where there is none."""
    found: set[str] = set()
    for part in kind.__mro__:
        if part.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
        except (OSError, TypeError, SyntaxError):
            continue
        found |= _weights_in(tree)
    return frozenset(found)


def _weights_in(tree: ast.AST) -> set[str]:
    """`out_proj` where `self.out_proj.weight` is computed with.

    Asking for its type or size is no computing, and neither is a slice of it: so the ranks of tensor parallelism are
    imitated, only where a configuration asks for that.
    """
    made = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    left = {id(inner) for node in made for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr in _FACTS):
            left.add(id(node.value))
    return {
        node.value.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "weight"
        and id(node) not in left
        and isinstance(node.value, ast.Attribute)
        and ast.unparse(node.value.value) == "self"
    }
