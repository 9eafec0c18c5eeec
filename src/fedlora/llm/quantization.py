"""Frozen bases held in 8 or 4 bits a weight: loaded by transformers, quantised by bitsandbytes.

The layers that bitsandbytes puts into the model are replaced by ours, which hold the same numbers and multiply by the
dequantised weight. Its 4-bit layer repacks its weight in the first pass without gradients on CPUs with avx512_bf16, and
the product of a repacked weight passes no gradient on. Its 8-bit layer also rounds the activations, in float16, after a
search for outliers among all rows of a pass: a row's result would depend on its neighbours, and training on a CPU,
where it does not do so, would differ from validation.
"""

from __future__ import annotations

import importlib
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from fedlora.config.train_fields import Quantization
from fedlora.errors import UsageError

LIBRARY = "bitsandbytes>=0.50"
"""The oldest series the tests run with; pyproject.toml has the same bound."""
INSTALL_HINT = "run `pip install 'fedlora[quantization]'`, or leave --quantization at none"


class FrozenProduct(torch.autograd.Function):
    """`x W.T` for the W of a quantised layer, which is dequantised again on the way back instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantise(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.layer.dequantise(gradients[0].dtype), None


class FrozenLinear(nn.Linear, ABC):
    """A linear layer that takes over the numbers of a bitsandbytes layer; `weight` holds them in their few bits."""

    scale: Tensor

    def __init__(self, layer: Any) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(layer.weight.data, requires_grad=False)
        self.bias = layer.bias
        # the class before quantization: an adapter's file says whether that stores its weight transposed
        self.source_cls = layer.source_cls

    @abstractmethod
    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The weight (d_out, d_in) that the few bits stand for."""

    def forward(self, input: Tensor) -> Tensor:
        result: Any = FrozenProduct.apply(input, self)
        return result if self.bias is None else result + self.bias


class Int8Linear(FrozenLinear):
    """One scale per output, as in LLM.int8() (Dettmers et al., arXiv 2208.07339), with activations left as they are."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.register_buffer("scale", layer.weight.SCB.float()[:, None] / 127)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype).mul_(self.scale)


class Nf4Linear(FrozenLinear):
    """Blocks of 64 weights on the quantiles of a normal distribution (QLoRA, Dettmers et al., arXiv 2305.14314)."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        state = layer.weight.quant_state
        self.block_size = state.blocksize
        self.register_buffer("scale", state.absmax)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        functional = _bitsandbytes().functional
        count = self.out_features * self.in_features
        # as rows of one block: bitsandbytes' AVX-512 kernel reads wrong scales where a block spans two rows
        width = self.block_size if count % self.block_size == 0 else count
        state = functional.QuantState(
            absmax=self.scale, shape=(count // width, width), dtype=dtype, blocksize=self.block_size, quant_type="nf4"
        )
        return functional.dequantize_4bit(self.weight, state).view(self.out_features, self.in_features)


def check_checkpoint(name: str, config: Any, kind: Quantization) -> None:
    """UsageError for a stored model that is quantised already, where that would be wrong.

    Without `kind` only bitsandbytes' own are refused: loaded as they are they would train on false gradients on a CPU.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    facts = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(getattr(facts.get("quant_method"), "value", facts.get("quant_method", "bitsandbytes")))
    if kind != "none" or method == "bitsandbytes":
        raise UsageError(
            f"base_model={name!r} is stored quantised already ({method})",
            hint="give the model in full precision; --quantization int8 or nf4 quantises it while loading",
        )


def check_quantizer(name: str, config: Any) -> None:
    """UsageError for a model stored quantised in a way that transformers does not know; what transformers raises where
    it lacks a package for it, or a device."""
    from transformers.quantizers.auto import AutoHfQuantizer

    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    facts = stored if isinstance(stored, dict) else stored.to_dict()
    with _without_kernels():
        if not AutoHfQuantizer.supports_quant_method(facts):
            # transformers would read the packed numbers as weights
            raise UsageError(
                f"base_model={name!r} is quantised by {facts['quant_method']!r}, which transformers does not know",
                hint="give the model in full precision, or upgrade transformers",
            )
        AutoHfQuantizer.from_config(stored, pre_quantized=True).validate_environment(device_map=None, weights_only=True)


def loading_options(kind: Quantization, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments for transformers' from_pretrained; UsageError where library or device cannot quantise."""
    if kind == "none":
        return {}
    _import_library()
    _check_device(kind, device, dtype)
    from transformers import BitsAndBytesConfig

    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def replace_layers(model: Any, name: str, kind: Quantization) -> None:
    """Put our layers in the place of bitsandbytes'; UsageError when they hold less than half of the model's weights.

    Embeddings and the output layer stay as they are and do not count.
    """
    theirs = _bitsandbytes().nn
    ours = {theirs.Linear8bitLt: Int8Linear, theirs.Linear4bit: Nf4Linear}
    found = [(place, module) for place, module in model.named_modules() if type(module) in ours]
    for place, module in found:
        model.set_submodule(place, ours[type(module)](module))
    _check_share(model, name, kind, sum(module.in_features * module.out_features for _, module in found))


def check_outline(model: Any, name: str, kind: Quantization) -> None:
    """The UsageError of `replace_layers` for a model without weights: bitsandbytes takes layers of these classes."""
    from transformers.pytorch_utils import Conv1D

    if kind == "none":
        return
    head = model.get_output_embeddings()
    linear = [one.weight for one in model.modules() if type(one) in (nn.Linear, Conv1D) and one is not head]
    _check_share(model, name, kind, sum(weight.numel() for weight in linear), linear)


def _check_share(model: Any, name: str, kind: Quantization, quantised: int, left_out: Iterable[Tensor] = ()) -> None:
    """UsageError when `quantised` weights are less than half; those of `left_out` are not counted as dense."""
    kept = {id(weight) for weight in left_out}
    kept |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if (head := model.get_output_embeddings()) is not None:
        kept.add(id(head.weight))
    dense = sum(p.numel() for p in model.parameters() if p.ndim > 1 and p.is_floating_point() and id(p) not in kept)
    if quantised <= dense:
        raise UsageError(
            f"base_model={name!r}: quantization={kind} reaches {quantised:,} of {quantised + dense:,} weights, "
            "the others are in no plain linear layer",
            hint="use --quantization none, or a model made of linear layers",
        )


def _import_library() -> None:
    """Import bitsandbytes without what it does besides: fetch a kernel from a hub, or say that it could not.

    The kernel is for the repacked weights, which we do not use.
    """
    from transformers.utils.versions import require_version

    try:
        require_version(LIBRARY)
        with _without_kernels():
            _bitsandbytes()
    except ImportError as error:
        raise UsageError(f"quantization needs {LIBRARY}: {_first_line(error)}", hint=INSTALL_HINT) from error


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Inside, the package `kernels` cannot be imported, and the one message about that is not shown."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    there = "kernels" in sys.modules
    before = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment] - how Python says that a module cannot be imported
    logger.addFilter(_is_not_about_kernels)
    try:
        yield
    finally:
        logger.removeFilter(_is_not_about_kernels)
        del sys.modules["kernels"]
        if there:
            sys.modules["kernels"] = before  # type: ignore[assignment]


def _is_not_about_kernels(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.getMessage()


def _check_device(kind: Quantization, device: torch.device, dtype: torch.dtype) -> None:
    """Quantise one small matrix: what the library cannot do it says only then."""
    library = _bitsandbytes()
    weight = torch.ones(64, 64, device=device, dtype=dtype)
    try:
        if kind == "int8":
            library.functional.int8_vectorwise_quant(weight.half())
        else:
            packed, state = library.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
            library.functional.dequantize_4bit(packed, state)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise UsageError(
            f"quantization={kind}: bitsandbytes cannot quantise on {device}: {_first_line(error)}",
            hint="use --quantization none, or another --device; `python -m bitsandbytes` says what it finds",
        ) from error


def _bitsandbytes() -> Any:
    """The library, which only quantised runs import."""
    return importlib.import_module("bitsandbytes")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
