"""The listing of a `.bin` file: which tensors it holds and where, found without running it.

`torch.save` writes its listing as a pickle, which is a program: unpickled, it may call anything. `pickletools` takes
it apart and runs nothing. Here every instruction becomes a letter, and the letters must spell a dictionary of tensors.
"""

from __future__ import annotations

import functools
import pickletools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedlora.llm.tensor_listing import Unfit

_LETTERS = {
    **{"torch._utils _rebuild_tensor_v2": "T", "torch._utils _rebuild_parameter": "P", "collections OrderedDict": "O"},
    **{"BINUNICODE": "s", "BININT": "i", "BININT1": "i", "BININT2": "i", "LONG1": "i", "NEWTRUE": "b", "NEWFALSE": "b"},
    **{"EMPTY_TUPLE": ")", "TUPLE1": "1", "TUPLE2": "2", "TUPLE3": "3", "MARK": "(", "TUPLE": "t", "PROTO": "p"},
    **{"EMPTY_DICT": "{", "SETITEM": "u", "SETITEMS": "u", "BINPERSID": "@", "REDUCE": "R", "BUILD": "B", "STOP": "."},
}
_HOOKS = r"O\)R"
_SIZES = r"(\)|i1|ii2|iii3|\(i*+t)"
# name; storage: type, record, device and size; then offset, shape, strides, requires_grad and hooks of the tensor
_TENSOR = rf"(s)P?T\(\(s(F)(s)s(i)t@(i){_SIZES}{_SIZES}b{_HOOKS}tR(?:b{_HOOKS}3R)?"
# at the end what torch keeps with the tensors of a module: names and numbers
_LISTING = rf"p(?:{{|{_HOOKS})(?:[(u]|{_TENSOR})*+(?:{{s[sib{{(uO)R]*+B)?\."


class View(NamedTuple):
    """A tensor in its storage of `size` numbers, the record `data/<record>`; offset and strides count numbers."""

    kind: str
    record: str
    size: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@functools.lru_cache(maxsize=8)
def read_listing(program: bytes) -> Mapping[str, View]:
    """Name -> view of every tensor; Unfit when `program` is anything else. The files of a run share one listing."""
    instructions = _take_apart(program)
    letters, values = "".join(letter for letter, _ in instructions), [value for _, value in instructions]
    found = list(re.finditer(_TENSOR, letters)) if re.fullmatch(_LISTING, letters) else []
    if not found:
        raise Unfit("holds no tensors by name")
    views = {}
    for match in found:
        name, kind, record, size, offset = (values[match.start(group)] for group in range(1, 6))
        # the values of marks and tuples are None
        shape, strides = (tuple(v for v in values[slice(*match.span(group))] if v is not None) for group in (6, 7))
        views[name] = View(kind.removeprefix("torch "), record, size, offset, shape, strides)
    if len(views) < len(found):
        raise Unfit("not a readable adapter (a name is given twice)")
    return views


def _take_apart(program: bytes) -> list[tuple[str, Any]]:
    """Letter and value of every instruction; a reference to an earlier value is that value once more."""
    found: list[tuple[str, Any]] = []
    memo: dict[Any, tuple[str, Any]] = {}
    try:
        for instruction, value, _ in pickletools.genops(program):
            name = instruction.name
            if name.endswith("BINPUT"):
                memo[value] = found[-1]
            elif name.endswith("BINGET"):
                found.append(memo[value])
            else:
                found.append((_find_letter(str(value)) if name == "GLOBAL" else _LETTERS[name], value))
    except (KeyError, IndexError, ValueError) as error:
        raise Unfit(f"not a readable adapter (its listing: {str(error)[:80]})") from None
    return found


def _find_letter(wanted: str) -> str:
    letter = "F" if re.fullmatch(r"torch \w+Storage", wanted) else _LETTERS.get(wanted)
    if letter is None:
        what = f"asks for {wanted.replace(' ', '.')[:80]!r}, which no adapter needs; nothing of it was run"
        raise Unfit(f"not a readable adapter ({what})")
    return letter
