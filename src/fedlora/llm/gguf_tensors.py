"""Names and layout of a model's tensors in GGUF, by the gguf package's own tables.

llama.cpp rotates neighbouring numbers of a head where transformers rotates halves, so its Llama weights have the rows
of q and k in another order. A LoRA update of these layers has its rows in B, which are moved alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from fedlora.errors import UsageError

CONVERT = "give --format merged, and convert the folder with llama.cpp's convert_hf_to_gguf.py"
"""What helps where a base is of a kind that is not written here."""


@dataclass(frozen=True)
class Architecture:
    """A kind of model in GGUF; `permutes` says whether its q and k have the order of llama.cpp."""

    arch: Any
    permutes: bool = False


ARCHITECTURES = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, permutes=True),
    "mistral": Architecture(gguf.MODEL_ARCH.LLAMA, permutes=True),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3),
}
"""model_type of transformers -> its kind in GGUF. Only kinds whose answers were compared with llama.cpp's."""


class TensorNames:
    """Names and layout of the tensors of one model."""

    def __init__(self, config: Any) -> None:
        """UsageError for a model whose layout in GGUF is not known here."""
        self.config = config.get_text_config()
        found = ARCHITECTURES.get(self.config.model_type)
        if found is None:
            raise UsageError(
                f"a model of the type {self.config.model_type!r} is not written as GGUF; these are: "
                f"{', '.join(ARCHITECTURES)}",
                hint=CONVERT,
            )
        self.architecture = found
        self._map = gguf.get_tensor_name_map(found.arch, self.config.num_hidden_layers)

    @property
    def arch_name(self) -> str:
        """What `general.architecture` says."""
        return gguf.MODEL_ARCH_NAMES[self.architecture.arch]

    def name(self, key: str) -> str:
        """The name in GGUF of a parameter such as `model.layers.0.mlp.up_proj.weight`; UsageError without one."""
        found = self._map.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UsageError(
                f"{key}: the gguf package has no name for it in a {self.arch_name} model",
                hint=CONVERT,
            )
        return found

    def permute(self, key: str, rows: Tensor) -> Tensor:
        """Rows of a weight, of a bias or of a LoRA factor B, in the order of llama.cpp."""
        heads = self._heads(key)
        if not heads:
            return rows
        half = len(rows) // heads // 2
        return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    def _heads(self, key: str) -> int:
        if not self.architecture.permutes:
            return 0
        if ".q_proj." in key:
            return self.config.num_attention_heads
        return self.config.num_key_value_heads if ".k_proj." in key else 0


def add_tensor(writer: Any, name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Add a tensor; vectors stay float32, as llama.cpp wants norms and biases."""
    value = value.detach().to(torch.float32 if value.dim() < 2 else dtype).contiguous()
    if value.dtype == torch.bfloat16:
        raw = value.view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, np.ascontiguousarray(value.numpy()))
