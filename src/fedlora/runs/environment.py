"""The environment of a run: versions, device, type of the base, threads.

The same environment gives the same bytes; in another one the last bits may differ. So a run that was started in another
one resumes only if the user allows it.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

import fedlora
from fedlora.config.train_fields import Quantization
from fedlora.errors import UsageError
from fedlora.llm.base_model import BaseModel
from fedlora.llm.fast.kernels import compiled


def library_versions(quantization: Quantization) -> dict[str, str]:
    """Versions that a result depends on."""
    names = ["torch", "transformers", "safetensors"]
    if quantization != "none":
        names.append("bitsandbytes")
    libraries = {name: metadata.version(name) for name in names}
    return {"fedlora": fedlora.__version__, "python": platform.python_version(), **libraries}


def describe_environment(base: BaseModel) -> dict[str, Any]:
    """The facts of the environment that run.json keeps besides versions."""
    on_gpu = base.device.type == "cuda"
    features = getattr(torch.cpu, "get_capabilities", dict)()
    processor = sorted(name for name, there in features.items() if there is True)
    # only where it is used: runs without it keep their record
    fast = {"fast_layers": "compiled" if compiled() else "torch"} if base.can.fast_layers else {}
    return {
        "device": torch.cuda.get_device_name(base.device) if on_gpu else "cpu",
        "cpu_features": [] if on_gpu else processor,
        "threads": torch.get_num_threads(),
        "base_dtype": base.dtype_name,
        **fast,
    }


def check_environment(recorded: Mapping[str, Any], now: Mapping[str, Any], *, allow_drift: bool) -> list[str]:
    """The differences from the recorded environment; UsageError unless drift is allowed."""
    differing = [
        f"{name}: {recorded.get(name)} -> {now.get(name)}"
        for name in sorted(recorded.keys() | now.keys())
        if recorded.get(name) != now.get(name)
    ]
    if differing and not allow_drift:
        raise UsageError(
            f"this run was started in another environment ({'; '.join(differing)})",
            hint="resume it there, or give --allow_drift: the last bits of the result may then differ",
        )
    return differing
