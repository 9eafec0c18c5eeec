"""Tokenised rows kept on disk, under a name made of everything they depend on.

What is read back is checked against its own hash; a file that does not fit is made again, like one that is
missing. Tokens can be turned back into text, so the files are readable by their owner only, and the whole
cache can be switched off.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from fedlora.errors import StorageError
from fedlora.files import write_bytes
from fedlora.llm.examples import Example, ExampleSet, RowCounts

FORMAT = 2
"""Counted up when encoding changes, so that files of an older release are not used."""

MOST_BYTES = 2 << 30
"""Room of the cache: the files unused for longest are removed beyond it."""


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Hex SHA-256 over what decides how text becomes tokens: vocabulary, merges, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    facts = [type(tokenizer).__name__, rules, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(facts, default=str, sort_keys=True).encode()).hexdigest()


class TokenFiles:
    """A folder of example sets, each under the hash of its key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, key: Sequence[Any]) -> tuple[ExampleSet, ExampleSet] | None:
        """Training and validation set that were saved under `key`; None when there is no sound file."""
        path = self._path(key)
        try:
            content = path.read_bytes()
            digest, body = content[:64].decode(), content[64:]
            if hashlib.sha256(body).hexdigest() != digest:
                return None
            tensors = safetensors.torch.load(body)
            path.touch()
        except (OSError, ValueError, safetensors.SafetensorError):
            return None
        return _unpack("training", tensors), _unpack("validation", tensors)

    def save(self, key: Sequence[Any], training: ExampleSet, validation: ExampleSet) -> None:
        """Keep both sets; a full or read-only disk loses the cache, not the run."""
        body = safetensors.torch.save({**_pack("training", training), **_pack("validation", validation)})
        content = hashlib.sha256(body).hexdigest().encode() + body
        try:
            write_bytes(self._path(key), content, mode=0o600)
            self._make_room()
        except StorageError:
            return

    def _path(self, key: Sequence[Any]) -> Path:
        name = hashlib.sha256(json.dumps([FORMAT, *key]).encode()).hexdigest()
        return self.folder / f"{name}.tokens"

    def _make_room(self) -> None:
        found = []
        for path in self.folder.glob("*.tokens"):
            try:
                status = path.stat()
            except OSError:
                continue
            found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= MOST_BYTES:
                return
            path.unlink(missing_ok=True)
            total -= size


def _pack(name: str, examples: ExampleSet) -> dict[str, torch.Tensor]:
    every = examples.examples
    masked = [edge for example in every for span in example.masked for edge in span]
    return {
        f"{name}.ids": torch.from_numpy(np.fromiter(chain.from_iterable(one.ids for one in every), np.int32)),
        f"{name}.lengths": torch.tensor([len(example.ids) for example in every], dtype=torch.int32),
        f"{name}.labels_from": torch.tensor([example.labels_from for example in every], dtype=torch.int32),
        f"{name}.num_masked": torch.tensor([len(example.masked) for example in every], dtype=torch.int32),
        f"{name}.masked": torch.tensor(masked, dtype=torch.int32),
        f"{name}.counts": torch.tensor(list(vars(examples.counts).values()), dtype=torch.int64),
    }


def _unpack(name: str, tensors: dict[str, torch.Tensor]) -> ExampleSet:
    parts = ("ids", "lengths", "labels_from", "num_masked", "masked", "counts")
    found = (tensors[f"{name}.{part}"] for part in parts)
    ids = next(found).numpy()
    lengths, starts, num_masked, masked, counts = (part.tolist() for part in found)
    edges = iter(zip(masked[::2], masked[1::2], strict=True))
    examples, at = [], 0
    for length, labels_from, count in zip(lengths, starts, num_masked, strict=True):
        kept = array("i", ids[at : at + length].tobytes())
        examples.append(Example(kept, labels_from, tuple(islice(edges, count))))
        at += length
    return ExampleSet(examples, RowCounts(*counts))
