"""Damages adapter files at random and checks what the readers make of them.

For every damaged file there are two good ends: it is refused with a UsageError, or it gives finite float32 tensors of
exactly the expected names and shapes. From a `.bin`, whose checksums are compared, they must be the very values that
were written; in a `.safetensors` a flipped bit of a value is another value, which only a hash can tell. The
same seed damages the same bytes, so a finding can be repeated; its file is kept.

    python tools/fuzz_adapters.py --mutations 20000 --seed 7
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fedlora.errors import UsageError
from fedlora.llm.adapter_config import load_spec, make_peft_config
from fedlora.llm.adapter_files import load_adapter, to_bin, to_safetensors
from fedlora.llm.lora import LoraSpec

SHAPES = {
    f"base_model.model.layers.{layer}.{name}.lora_{half}.weight": (4, 6) if half == "A" else (10, 4)
    for layer in range(2)
    for name in ("q_proj", "v_proj")
    for half in "AB"
}
SPEC = LoraSpec(4, 16.0, 4.0, 0.05, ("q_proj", "v_proj"))
MOST_GROWTH = 200 << 20
"""Bytes by which the process may grow over a whole run."""

NUMBERS = (0, 1, 2, 7, 255, 256, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = (
    b"torch._utils\n_rebuild_tensor_v2\n",
    b"builtins\neval\n",
    b"torch\nLongStorage\n",
    b"PK\x03\x04",
    b"PK\x05\x06",
    b'"F64"',
    b'"I8"',
    b"null",
    b"1e999",
    b"NaN",
    b'{"r":1}',
    b"[[[[",
    b"-1",
    b"99999999999999999999",
    b"\xff\xfe",
    b"\0\0\0\0\0\0\0\0",
)


class Finding(Exception):  # noqa: N818
    """What a reader did that it must never do, and the file that made it."""


@dataclass(frozen=True)
class Target:
    """Files of one kind: their name, sound ones to start from, and the reader with its checks."""

    name: str
    sound: tuple[bytes, ...]
    read: Callable[[Path], object]


def make_targets() -> tuple[Target, ...]:
    """A `.bin`, a `.safetensors` and an `adapter_config.json`."""
    generator = torch.Generator().manual_seed(1)
    state = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
    half, backwards = {key: value.half() for key, value in state.items()}, dict(reversed(list(state.items())))
    buffer = io.BytesIO()
    torch.save(backwards, buffer)
    peft_like = json.dumps({**json.loads(_config()), "alpha_pattern": {}, "megatron_core": "megatron.core"}).encode()
    return (
        Target(
            "adapter_model.bin",
            (to_bin(state), to_bin(half), buffer.getvalue()),
            lambda path: _check_values(path, (state, half)),
        ),
        Target("adapter_model.safetensors", (to_safetensors(state), to_safetensors(half)), _check),
        Target("adapter_config.json", (_config(), peft_like), _check_config),
    )


def _config() -> bytes:
    return make_peft_config(SPEC, "base", fan_in_fan_out=False, targets=SPEC.target_modules).encode()


def _check_values(path: Path, known: tuple[dict[str, torch.Tensor], ...]) -> None:
    state = _check(path)
    if not any(all(torch.equal(state[key], each[key].float()) for key in SHAPES) for each in known):
        raise Finding(f"{path}: other values than were written")


def _check(path: Path) -> dict[str, torch.Tensor]:
    state = load_adapter(path, SHAPES)
    if state.keys() != SHAPES.keys():
        raise Finding(f"{path}: other keys")
    for key, value in state.items():
        if tuple(value.shape) != SHAPES[key] or value.dtype != torch.float32 or not bool(torch.isfinite(value).all()):
            raise Finding(f"{path}: {key} is {tuple(value.shape)} {value.dtype}, or not finite")
    return state


def _check_config(path: Path) -> None:
    spec = load_spec(path)
    plain = all(name.replace("_", "").replace(".", "").replace("-", "").isalnum() for name in spec.target_modules)
    if not (1 <= spec.r <= 4096 and 0 < spec.alpha < float("inf") and 0 <= spec.dropout < 1 and plain):
        raise Finding(f"{path}: {spec}")


def mutate(content: bytes, dice: random.Random) -> bytes:
    """`content` with one to four pieces of damage."""
    found = bytearray(content)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        dice.choice(DAMAGE)(found, dice)
    return bytes(found)


def _flip(content: bytearray, dice: random.Random) -> None:
    if content:
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)


def _flip_early(content: bytearray, dice: random.Random) -> None:
    """In the header or the listing, which are most of what a reader decides by."""
    if content:
        content[dice.randrange(min(len(content), 1200))] = dice.randrange(256)


def _cut(content: bytearray, dice: random.Random) -> None:
    del content[dice.randrange(len(content) + 1) :]


def _drop(content: bytearray, dice: random.Random) -> None:
    begin = dice.randrange(len(content) + 1)
    del content[begin : begin + dice.randrange(1, 64)]


def _splice(content: bytearray, dice: random.Random) -> None:
    begin, length, place = (dice.randrange(len(content) + 1) for _ in range(3))
    content[place:place] = content[begin : begin + length % 200]


def _insert_word(content: bytearray, dice: random.Random) -> None:
    place = dice.randrange(len(content) + 1)
    word = dice.choice(WORDS)
    content[place : place + dice.choice((0, len(word)))] = word


def _lie_of_length(content: bytearray, dice: random.Random) -> None:
    """A number of one, two, four or eight bytes, most often the first eight, which are a header's length."""
    size = dice.choice((1, 2, 4, 8))
    place = 0 if dice.random() < 0.3 else dice.randrange(len(content) + 1)
    content[place : place + size] = (dice.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")


def _edit_number(content: bytearray, dice: random.Random) -> None:
    """A digit of the text becomes another number."""
    digits = [place for place in range(min(len(content), 2000)) if chr(content[place]).isdigit()]
    if digits:
        place = dice.choice(digits)
        content[place : place + 1] = str(dice.choice(NUMBERS)).encode()


def _grow(content: bytearray, dice: random.Random) -> None:
    content.extend(dice.randbytes(dice.randrange(1, 5000)))


DAMAGE = (_flip, _flip_early, _flip_early, _cut, _drop, _splice, _insert_word, _lie_of_length, _edit_number, _grow)


def fuzz(target: Target, mutations: int, seed: int, folder: Path) -> Counter[str]:
    """How many damaged files were `refused` and how many `loaded`; raises Finding on any other end."""
    outcomes: Counter[str] = Counter()
    path = folder / target.name
    for content in target.sound:
        path.write_bytes(content)
        target.read(path)
    grown_from = _peak_bytes()
    for number in range(mutations):
        dice = random.Random(f"{seed} {target.name} {number}")
        path.write_bytes(mutate(dice.choice(target.sound), dice))
        try:
            target.read(path)
            outcomes["loaded"] += 1
        except UsageError:
            outcomes["refused"] += 1
        except Exception as error:
            raise Finding(f"mutation {number}: {type(error).__name__}: {error}; the file is kept: {path}") from error
    if (grown := _peak_bytes() - grown_from) > MOST_GROWTH:
        raise Finding(f"{target.name}: memory grew by {grown >> 20} MiB")
    return outcomes


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> int:
    """Fuzz every target and print one line for each; 1 when something was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mutations", type=int, default=5000, help="damaged files per kind (default: 5000)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-adapters-"))
    failed = False
    for target in make_targets():
        try:
            outcomes = fuzz(target, arguments.mutations, arguments.seed, folder)
            print(f"{target.name}: {outcomes['refused']} refused, {outcomes['loaded']} loaded, none else", flush=True)
            (folder / target.name).unlink()
        except Finding as finding:
            failed = True
            print(f"{target.name}: FOUND {finding}", flush=True)
    if not failed:
        folder.rmdir()
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
