"""Adapter files that are programs: each would leave a canary behind, none does."""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import io
import marshal
import operator
import os
import pickle
import runpy
import subprocess
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from fedlora.errors import UsageError
from fedlora.llm.adapter_files import load_adapter, to_bin

SHAPES = {"base_model.model.q_proj.lora_A.weight": (2, 3), "base_model.model.q_proj.lora_B.weight": (4, 2)}
STATE = {key: torch.ones(shape) for key, shape in SHAPES.items()}


class Call:
    """Pickles as a call of `function`; with `state` also as a BUILD after it."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts

    def __call__(self) -> None:
        """Never: but pickle writes calls of callables only, and what this becomes may be one."""


def touch(canary: str) -> str:
    return f"open({canary!r}, 'w').close()"


PAYLOADS: dict[str, Callable[[str], Any]] = {
    "os.system": lambda canary: Call(os.system, f"touch {canary}"),
    "eval": lambda canary: Call(eval, touch(canary)),
    "exec": lambda canary: Call(exec, touch(canary)),
    "mkdir": lambda canary: Call(os.mkdir, canary),
    "check_output": lambda canary: Call(subprocess.check_output, ["touch", canary]),
    "partial": lambda canary: Call(Call(functools.partial, os.system, f"touch {canary}")),
    "getattr chain": lambda canary: Call(
        Call(getattr, Call(importlib.import_module, "os"), "system"), f"touch {canary}"
    ),
    "methodcaller": lambda canary: Call(
        Call(operator.methodcaller, "system", f"touch {canary}"), Call(importlib.import_module, "os")
    ),
    "import": lambda canary: Call(Call(getattr, Call(builtins.__import__, "os"), "system"), f"touch {canary}"),
    "runpy": lambda canary: Call(runpy._run_code, touch(canary), {"__name__": "x"}),  # type: ignore[attr-defined]
    "pathlib": lambda canary: Call(Path.touch, Path(canary)),
    "pickle in a pickle": lambda canary: Call(pickle.loads, pickle.dumps(Call(eval, touch(canary)))),
    "marshalled code": lambda canary: Call(
        exec, Call(marshal.loads, marshal.dumps(compile(touch(canary), "<evil>", "exec")))
    ),
    "numpy reconstruct": lambda canary: Call(
        numpy.array([0]).__reduce__()[0], numpy.ndarray, Call(eval, f"({touch(canary)}, (0,))[1]"), b"b"
    ),
    "torch storage": lambda canary: Call(torch.storage._load_from_bytes, legacy(Call(eval, touch(canary)))),
    "torch.load": lambda canary: Call(
        functools.partial(torch.load, weights_only=False), Call(io.BytesIO, legacy(Call(eval, touch(canary))))
    ),
    "deep inside": lambda canary: {"a": [({"b": (1, [Call(eval, touch(canary))])},)]},
    "state of an object": lambda canary: Call(types.SimpleNamespace, state={"x": Call(eval, f"{touch(canary)} or 1")}),
    "a key": lambda canary: {Call(eval, f"{touch(canary)} or 'k'"): torch.zeros(1)},
    "beside good tensors": lambda canary: {**STATE, "evil": Call(eval, touch(canary))},
    "inside the right keys": lambda canary: dict.fromkeys(SHAPES, Call(eval, touch(canary))),
    "hooks of a tensor": lambda canary: dict.fromkeys(
        SHAPES, Call(torch._utils._rebuild_tensor_v2, *tensor_arguments(), Call(eval, f"{touch(canary)} or dict()"))
    ),
}


def tensor_arguments() -> tuple[Any, ...]:
    return (torch.zeros(6)._typed_storage(), 0, (2, 3), (3, 1), False)


def legacy(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def zipped(value: Any, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=protocol)
    return buffer.getvalue()


def tarred(value: Any) -> bytes:
    """The oldest of torch's formats."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(value, protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def deflated(value: Any) -> bytes:
    """The same archive, compressed and with the pickle under every name that a reader might look for."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("data.pkl", "constants.pkl", "version", "byteorder"):
            archive.writestr(f"archive/{name}", pickle.dumps(value, protocol=2))
    return buffer.getvalue()


FORMS: dict[str, Callable[[Any], bytes]] = {
    "zip": zipped,
    "zip, protocol 4": lambda value: zipped(value, 4),
    "deflated zip": deflated,
    "legacy": legacy,
    "tar": tarred,
    "plain, protocol 0": lambda value: pickle.dumps(value, protocol=0),
    "plain, protocol 5": lambda value: pickle.dumps(value, protocol=5),
}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_payload_runs_in_any_form_under_any_name(tmp_path, payload):
    canary = tmp_path / "canary"
    value = PAYLOADS[payload](str(canary))
    for form, write in FORMS.items():
        content = write(value)
        for name in ("adapter_model.bin", "adapter_model.safetensors"):
            path = tmp_path / name
            path.write_bytes(content)
            with pytest.raises(UsageError) as caught:
                load_adapter(path, SHAPES)
            assert caught.value.exit_code == 2
            assert str(path) in str(caught.value)
            assert not canary.exists(), form


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_payloads_are_live(tmp_path, payload):
    """Else the test above would show nothing: whoever unpickles them leaves the canary."""
    canary = tmp_path / "canary"
    file = io.BytesIO(zipped(PAYLOADS[payload](str(canary))))
    with contextlib.suppress(Exception):
        torch.load(file, weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch %s'\ntR.",
        b"(ios\nsystem\nS'touch %s'\n.",
        b"(cos\nsystem\nS'touch %s'\no.",
        b"\x80\x02cposix\nsystem\nX\x06\x00\x00\x00touch \x85R.",
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x94\x8c\x06touch \x85R.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02P1\n.",
        b"\x80\x02}(X\x01\x00\x00\x00acos\nsystem\nu.",
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        b"\x80\x02ctorch\nStorage.__init__.__globals__\n.",
        b"\x80\x02c../../evil Storage\nx\n.",
    ],
)
def test_instructions_that_no_adapter_needs_are_refused(tmp_path, program):
    canary = tmp_path / "canary"
    program = program.replace(b"%s", str(canary).encode())
    source, path = zipfile.ZipFile(io.BytesIO(to_bin(STATE))), tmp_path / "adapter_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, program if name.endswith("data.pkl") else source.read(name))
    with pytest.raises(UsageError, match=r"adapter_model\.bin: (not a readable adapter|holds no tensors)"):
        load_adapter(path, SHAPES)
    assert not canary.exists()


def test_what_is_asked_for_is_named_and_said_not_to_have_run(tmp_path):
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(zipped(Call(os.system, "true")))
    with pytest.raises(UsageError, match=r"asks for '(posix|nt)\.system'.*nothing of it was run"):
        load_adapter(path, SHAPES)
