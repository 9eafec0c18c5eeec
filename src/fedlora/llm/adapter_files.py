"""Adapters as bytes: PEFT's two formats, and a reader that trusts nothing.

Reading compares names, shapes, types and sizes with what the run expects before any value is loaded, and
unpickles nothing: see `tensor_listing`, `safetensors_header` and `bin_files` for how.
"""

from __future__ import annotations

import contextlib
import errno
import io
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch

from fedlora.errors import StorageError, UsageError
from fedlora.federated.adapters import Shapes
from fedlora.federated.validation import find_fault
from fedlora.llm.bin_files import read_bin, read_bin_shapes
from fedlora.llm.safetensors_header import check_header
from fedlora.llm.tensor_listing import Unfit, most_file_bytes
from fedlora.stopping import stop_if_asked
from fedlora.types import AdapterState

SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
GLOBAL_BIN_NAME = "global_adapter_model.bin"
CONFIG_NAME = "adapter_config.json"


def to_safetensors(state: AdapterState) -> bytes:
    """safetensors bytes; equal tensors give equal bytes."""
    return safetensors.torch.save({key: state[key].contiguous() for key in sorted(state)}, metadata={"format": "pt"})


def to_bin(state: AdapterState) -> bytes:
    """`torch.save` bytes of clones in key order, so that no view drags a larger storage along."""
    buffer = io.BytesIO()
    torch.save({key: state[key].clone() for key in sorted(state)}, buffer)
    return buffer.getvalue()


def load_adapter(path: Path, expected: Shapes) -> dict[str, torch.Tensor]:
    """Read `.safetensors` or `.bin` as float32; UsageError when missing, unreadable, or not an adapter for this model.

    Half and double precision are converted.
    """
    with _refusing(path):
        state = _read(path, expected)
        if fault := find_fault(state, expected):
            raise Unfit(f"does not fit the base model: {fault}")
    return state


def read_shapes(path: Path) -> Shapes:
    """Key -> shape of a `.bin` file, where no base model says what is expected; UsageError as for `load_adapter`."""
    with _refusing(path):
        return read_bin_shapes(path)


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    if not path.is_file():
        raise UsageError(f"{path}: no such adapter", hint="train first, or check exp_name, round and client")
    try:
        yield
    except Unfit as unfit:
        raise _refusal(path, str(unfit)) from None
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise many kinds; every other one means the file is not an adapter
        stop_if_asked()
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EIO):
            raise StorageError(f"{path}: {error.strerror}", hint="fix its permissions, then run again") from error
        raise _refusal(path, f"not a readable adapter ({type(error).__name__})") from None


def _read(path: Path, expected: Shapes) -> dict[str, torch.Tensor]:
    if path.stat().st_size > most_file_bytes(expected):
        raise Unfit(f"not a readable adapter (larger than {most_file_bytes(expected)} bytes, which is all it can need)")
    if path.suffix == ".safetensors":
        check_header(path, expected)
        state = safetensors.torch.load_file(path)
    else:
        state = read_bin(path, expected)
    return {key: value.to(torch.float32).contiguous() for key, value in state.items()}


def _refusal(path: Path, what: str) -> UsageError:
    fits = "does not fit" in what
    return UsageError(f"{path}: {what}", hint="check base_model and the LoRA settings" if fits else "train again")
