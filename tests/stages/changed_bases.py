"""Base models with other weights of the same shapes, and in the cache of the hub."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlora.llm.base_identity import _sample_of


def change_weights(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Put another tensor in the place of one of the model's."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_one(tensor: Tensor) -> Tensor:
    """Another tensor of the same shape."""
    return tensor + 1


def change_outside_the_sample(folder: Path) -> None:
    """Change one number of the embedding that its identity does not read."""
    name = "model.embed_tokens.weight"

    def change(tensor: Tensor) -> Tensor:
        begin, _ = _sample_of(name, 0, tensor.numel() * tensor.element_size())
        changed = tensor.clone()
        changed.view(-1)[0 if begin > tensor.element_size() else -1] += 1
        return changed

    change_weights(folder, name, change)


def put_into_hub_cache(folder: Path, name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make `folder` the cached snapshot of the hub's model `name`; the snapshot's folder."""
    repository, commit = cache / f"models--{name.replace('/', '--')}", "a" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return snapshot
