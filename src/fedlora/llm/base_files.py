"""The files of a base model: whether all are there and whole, and whether the model took every weight of them.

transformers draws a weight that is in no file at random, in every process another, and says so in a log line. Here such
a base is refused, and so is one with weights that the model has no place for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedlora.errors import UsageError
from fedlora.plain_text import counted

FETCH_AGAIN = "download the folder again, or write it with save_pretrained"
_LFS_MARK = b"version https://git-lfs.github.com/spec/"
_LFS_BYTES = 1024
_SHOWN = 3
_MASKS = frozenset({"bias", "masked_bias", "causal_mask"})
"""Names under which older releases stored the masks of attention modules."""
_PICKLE_START = b"\x80"


def check_files(folder: Path, *, weights: bool = True) -> None:
    """UsageError with the file that is missing, cut, unreadable or only a pointer to what should be there.

    Without `weights` a folder may lack them.
    """
    files = sorted(folder.iterdir())
    if not files:
        raise UsageError(f"{folder}: the folder is empty", hint=FETCH_AGAIN)
    for file in files:
        if file.is_symlink() and not file.exists():
            raise UsageError(f"{file}: a link to a file that is gone", hint=FETCH_AGAIN)
        if file.is_file() and _is_lfs_pointer(file):
            raise UsageError(
                f"{file}: a Git LFS pointer, not the file itself",
                hint=f"run `git lfs pull` in {folder}, or download the folder with `hf download`",
            )
    _check_config(folder)
    for file in find_weights(folder) if weights else ():
        read_names(file)


def find_weights(folder: Path) -> list[Path]:
    """The weight files that transformers reads, in its order of preference; UsageError when one is missing."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            return _read_index(folder / index)
    if parts := sorted(folder.glob("*.safetensors")):
        raise UsageError(
            f"{folder}: {parts[0].name} is there, but neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}",
            hint=FETCH_AGAIN,
        )
    raise UsageError(f"{folder}: no weights ({SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME})", hint=_other_form(folder))


def read_names(file: Path) -> dict[str, Tensor]:
    """Name -> tensor without values, of the stored shape; UsageError for a cut or damaged file.

    Of a `.bin` file, whose names only an unpickler reads, empty: nothing but its outer form is checked.
    """
    try:
        if file.suffix != ".safetensors":
            with file.open("rb") as opened:
                is_old = opened.read(1) == _PICKLE_START
            if not is_old and not zipfile.is_zipfile(file):
                raise UsageError(f"{file}: cut or damaged (not an archive of torch)", hint=FETCH_AGAIN)
            return {}
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            return {name: torch.empty(opened.get_slice(name).get_shape(), device="meta") for name in names}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file}: cut or damaged ({error})", hint=FETCH_AGAIN) from None


def find_tokenizer_fault(folder: Path) -> UsageError | None:
    """Why no tokenizer could be read from a folder, where its files say so."""
    for file in sorted([*folder.glob("*token*.json"), *folder.glob("vocab.json")]):
        try:
            read_json_object(file)
        except UsageError as error:
            return error
    if (folder / "tokenizer.json").is_file():
        return None
    models = sorted(folder.glob("*.model"))
    for file in models:
        with file.open("rb") as opened:
            # a SentencePiece model is a protocol buffer whose first field is a list; tiktoken's is lines of base64
            needed = ("sentencepiece", "google.protobuf") if opened.read(1) == b"\n" else ("tiktoken",)
        if missing := [name.removeprefix("google.") for name in needed if not _is_installed(name)]:
            return UsageError(
                f"{file}: a tokenizer that is read with {' and '.join(missing)}, which is not installed",
                hint=f"run `pip install {' '.join(missing)}`",
            )
    if models or any(folder.glob("vocab.*")):
        return None
    return UsageError(f"{folder}: no tokenizer (tokenizer.json)", hint=FETCH_AGAIN)


def check_whole(name: str, model: Any, found: Mapping[str, Any], *, others: Collection[str] = ()) -> None:
    """UsageError unless every weight of the model came from the files and the model took every weight of them.

    `found` is transformers' report of a load. A tied weight, and a buffer that the model computes itself, need no file;
    weights of `others` belong to another model in the same files.
    """
    what = []
    if missing := sorted(found["missing_keys"]):
        what.append(f"{counted(len(missing), 'weight')} missing from the files ({_some(missing)})")
    foreign = (key for key in found["unexpected_keys"] if _top(key, others) is None and not _is_computed(model, key))
    if foreign := sorted(foreign):
        what.append(
            f"{counted(len(foreign), 'weight')} that {type(model).__name__} has no place for ({_some(foreign)})"
        )
    if differing := sorted(found["mismatched_keys"]):
        shown = [f"{key}: {tuple(stored)}, expected {tuple(wanted)}" for key, stored, wanted in differing]
        what.append(f"{counted(len(shown), 'weight')} of another shape than config.json says ({_some(shown, '; ')})")
    if what:
        raise UsageError(
            f"base_model={name!r}: the checkpoint does not fit its model: {'; '.join(what)}",
            hint=f"{FETCH_AGAIN}: a part of it would be random or left out",
        )


def find_others(folder: Path, foreign: Collection[str]) -> list[str]:
    """The parts of a multimodal checkpoint that hold nothing but `foreign` weights: towers beside the text model."""
    stored = {name for file in find_weights(folder) for name in read_names(file)}
    parts = {part for name in stored - set(foreign) for part in _tops(name)}
    return sorted({next((part for part in _tops(name) if part not in parts), "") for name in foreign} - {""})


def _is_computed(model: Any, name: str) -> bool:
    """Whether a stored tensor is what today's model computes itself: a buffer of this name, or an attention's mask."""
    path, _, last = name.rpartition(".")
    for root in (model, model.base_model):
        with contextlib.suppress(AttributeError):
            part = root.get_submodule(path)
            # the bias of a layer would stand beside its weight
            is_mask = last in _MASKS and next(part.parameters(recurse=False), None) is None
            return is_mask or last in part._buffers
    return False


def _tops(name: str) -> list[str]:
    """The first one and two parts of a weight's path: a tower stands there, and blocks of a model stand deeper."""
    parts = name.split(".")
    return [".".join(parts[:size]) for size in (1, 2) if size < len(parts)]


def _top(name: str, parts: Collection[str]) -> str | None:
    return next((part for part in _tops(name) if part in parts), None)


def read_json_object(file: Path) -> dict[str, Any]:
    """A file of the folder that must hold one JSON object; UsageError where it does not."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}", hint="check the file and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: cut or damaged, not valid JSON ({error})", hint=FETCH_AGAIN) from None
    if not isinstance(value, dict):
        raise UsageError(f"{file}: not a JSON object", hint=FETCH_AGAIN)
    return value


def _check_config(folder: Path) -> None:
    file = folder / "config.json"
    if not file.is_file():
        raise UsageError(f"{folder}: no config.json, so not a model of transformers", hint=_other_form(folder))
    read_json_object(file)


def _read_index(file: Path) -> list[Path]:
    shards = read_json_object(file).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise UsageError(f"{file}: no weight_map of file names", hint=FETCH_AGAIN)
    names = sorted(set(shards.values()))
    if gone := [name for name in names if not (file.parent / name).is_file()]:
        more = f" and {counted(len(gone) - 1, 'other file')}" if len(gone) > 1 else ""
        raise UsageError(f"{file.parent / gone[0]}: no such file, but {file.name} names it{more}", hint=FETCH_AGAIN)
    return [file.parent / name for name in names]


def _is_lfs_pointer(file: Path) -> bool:
    if file.stat().st_size > _LFS_BYTES:
        return False
    with file.open("rb") as opened:
        return opened.read(len(_LFS_MARK)) == _LFS_MARK


def _other_form(folder: Path) -> str:
    """What to do with a folder that holds a model in another form than transformers'."""
    if any(folder.glob("*.gguf")):
        return "it holds a GGUF file: name the folder or hub id of the model that the file was made from"
    if any(folder.glob("consolidated*")):
        return "it holds the original release: name the folder or hub id of the same model in transformers' format"
    return f"name the folder that holds config.json, weights and tokenizer; {FETCH_AGAIN}"


def _some(names: Sequence[str], between: str = ", ") -> str:
    left_out = len(names) - _SHOWN
    return between.join(names[:_SHOWN]) + (f" and {left_out} more" if left_out > 0 else "")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
