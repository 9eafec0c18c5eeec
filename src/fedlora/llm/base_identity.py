"""The identity of a base model: hashes of what decides its answers, wherever its folder lies.

Of the weights, the name, type and shape of every tensor count and a fixed sample of its bytes. So two fine-tunes of
one architecture differ, and of a large model some hundred small pieces are read. Weights in another cut into files are
the same weights. What does not decide the model (a README, optimizer states, the paths that libraries write into
configurations) is not looked at. Nothing here needs torch or a network.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from fedlora.errors import StorageError
from fedlora.files import sha256_of, sha256_of_json
from fedlora.home import path_at_home
from fedlora.llm import embedded_model

SAMPLE = 4096
"""Bytes of a tensor that are read."""
PIECES = 256
"""Samples of a file whose tensors are not listed at its beginning."""
BLOCK = 1 << 20
_MOST_HEADER = 100 << 20
"""The limit of the safetensors library."""

_HUB_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?")

_CONFIGURATION = ("config.json", "generation_config.json")
_TOKENIZER = (*("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),)
_VOCABULARY = ("vocab.json", "vocab.txt", "merges.txt", "tekken.json", "tiktoken.model", "*.model")
"""What a tokenizer is read from where there is no tokenizer.json."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers looks for them; the first that is there is all that it loads."""
_NOT_THE_MODEL = frozenset({"_name_or_path", "name_or_path", "_commit_hash", "transformers_version"})
"""Entries of a configuration that say who wrote it, and where."""


@dataclass(frozen=True)
class BaseIdentity:
    """SHA-256 of the parts of a base model; an empty part is not known."""

    configuration: str
    tokenizer: str
    weights: str = ""
    code: str = ""
    """Of modules beside the model; the hub's cache has them only where they were run."""
    every_byte: str = ""
    """Of the weights without sampling."""

    @classmethod
    def from_record(cls, record: Any) -> Self | None:
        """What `record` wrote; None where there is none."""
        if not isinstance(record, Mapping) or not record:
            return None
        return cls(**{name: str(record.get(name, "")) for name in cls.__dataclass_fields__})

    def record(self) -> dict[str, str]:
        """The parts that are known, as JSON values."""
        return {name: value for name, value in asdict(self).items() if value}

    def __str__(self) -> str:
        """A short form for messages; the hash of every byte is no part of it."""
        return sha256_of_json([self.configuration, self.tokenizer, self.weights, self.code])[:12]

    def completed_by(self, other: BaseIdentity | None) -> BaseIdentity:
        """This identity, with what only the other one knows."""
        mine = {name: value for name, value in asdict(self).items() if value}
        return BaseIdentity(**{**(asdict(other) if other else {"configuration": "", "tokenizer": ""}), **mine})

    def differences(self, other: BaseIdentity) -> list[str]:
        """The parts that both know and that differ."""
        mine, theirs = asdict(self), asdict(other)
        return [name.replace("_", " ") for name in mine if mine[name] and theirs[name] and mine[name] != theirs[name]]


def find_folder(name: str) -> Path | None:
    """Where a base model lies on this machine: its folder, its snapshot in the hub's cache; None where it is not here.

    Nothing is converted and nothing downloaded.
    """
    if name == embedded_model.NAME:
        return embedded_model.find_folder()
    if (path := path_at_home(name)).is_dir():
        return path
    if not is_hub_id(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no hub has a model of this name
        return None
    return Path(found).parent if isinstance(found, str) else None


def is_hub_id(name: str) -> bool:
    """Whether a hub may have a model of this name: a name, or owner/name; anything else can only be a path."""
    return _HUB_ID.fullmatch(name) is not None


def find_identity(name: str, *, every_byte: bool = False) -> BaseIdentity | None:
    """The identity of a base model by name; None where it is not on this machine."""
    folder = find_folder(name)
    return None if folder is None else identify(folder, every_byte=every_byte)


def identify(folder: Path, *, every_byte: bool = False) -> BaseIdentity:
    """The identity of the base model in a folder. Raises StorageError where a file cannot be read."""
    try:
        files = _weight_files(folder)
        code = sorted(folder.glob("*.py"))
        return BaseIdentity(
            configuration=_hash_texts([folder / name for name in _CONFIGURATION]),
            tokenizer=_hash_texts(_tokenizer_files(folder)),
            weights=_hash_weights(files, whole=False),
            code=_hash_texts(code) if code else "",
            every_byte=_hash_weights(files, whole=True) if every_byte else "",
        )
    except OSError as error:
        raise StorageError(
            f"{error.filename or folder}: {error.strerror}", hint="check the files of the base model"
        ) from error


def _tokenizer_files(folder: Path) -> list[Path]:
    vocabulary = [folder / "tokenizer.json"]
    if not vocabulary[0].is_file():
        vocabulary = sorted(path for pattern in _VOCABULARY for path in folder.glob(pattern))
    return [*(folder / name for name in _TOKENIZER), *vocabulary]


def _hash_texts(files: list[Path]) -> str:
    """Of the files that are there, by name; of JSON objects without what their writers say of themselves."""
    return sha256_of_json([[path.name, _hash_text(path)] for path in files if path.is_file()])


def _hash_text(path: Path) -> str:
    if path.suffix == ".json" and path.name != "tokenizer.json":
        try:
            return sha256_of_json(_without_writers(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, RecursionError):  # loading the base reports what is wrong with it
            pass
    return sha256_of(path)


def _without_writers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_writers(each) for name, each in value.items() if name not in _NOT_THE_MODEL}
    return value


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads; those that an index names and that are missing are left out."""
    chosen = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if chosen is None or chosen.suffix != ".json":
        return [chosen] if chosen else sorted(folder.glob("*.gguf"))
    try:
        named = set(json.loads(chosen.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(path for name in named if (path := folder / str(name)).is_file())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [chosen]


def _hash_weights(files: list[Path], *, whole: bool) -> str:
    """Over all tensors by name; over the files where they list no tensors. Empty where there are no weights."""
    found: dict[str, Any] = {}
    for path in files:
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            listing = _read_listing(handle, size) if path.suffix == ".safetensors" else None
            if listing is None:
                found[path.name] = [size, _hash_spans(handle, [(0, size)] if whole else _spread(size))]
                continue
            for name, (kind, shape, begin, end) in listing.items():
                span = (begin, end) if whole else _sample_of(name, begin, end)
                found[f"tensor {name}"] = [kind, shape, _hash_spans(handle, [span])]
    return sha256_of_json(found) if found else ""


def _read_listing(handle: BinaryIO, size: int) -> dict[str, tuple[Any, Any, int, int]] | None:
    """Tensor -> type, shape and place in the file, from the header of a .safetensors file; None where it has none."""
    length = int.from_bytes(handle.read(8), "little")
    if not 2 <= length <= min(_MOST_HEADER, size - 8):
        return None
    try:
        entries = json.loads(handle.read(length))
        entries.pop("__metadata__", None)
        found = {}
        for name, entry in entries.items():
            begin, end = (8 + length + int(each) for each in entry["data_offsets"])
            found[name] = (entry["dtype"], entry["shape"], begin, end)
        return found if all(0 <= begin <= end for _, _, begin, end in found.values()) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _sample_of(name: str, begin: int, end: int) -> tuple[int, int]:
    """A piece of a tensor at a place that its name decides."""
    drawn = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    start = begin + drawn * max(0, end - begin - SAMPLE) // (1 << 32)
    return start, min(end, start + SAMPLE)


def _spread(size: int) -> Iterator[tuple[int, int]]:
    """Pieces at equal distances, the first and the last of the file among them."""
    for piece in range(PIECES):
        start = piece * max(0, size - SAMPLE) // (PIECES - 1)
        yield start, min(size, start + SAMPLE)


def _hash_spans(handle: BinaryIO, spans: Any) -> str:
    digest = hashlib.sha256()
    for begin, end in spans:
        handle.seek(begin)
        while begin < end and (block := handle.read(min(BLOCK, end - begin))):
            digest.update(block)
            begin += len(block)
    return digest.hexdigest()
