"""The listing inside a `.bin` file, read by a machine that knows what an adapter needs and can do nothing else.

`torch.save` writes its listing as a pickle, which is a program: unpickled, it may call anything. Here its
instructions build names, numbers and tuples only. Every function it asks for is looked up in a table of
names, never imported, and a file that asks for another one is refused with that name. So no code of a file can run,
and none of its tensors exists before its shape has been checked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fedlora.llm.tensor_listing import Unfit, read_sizes

STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
}
_DICT, _TENSOR, _PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)


class Named(NamedTuple):
    """A function or a class that the file asks for, as text."""

    name: str


class Storage(NamedTuple):
    """`size` numbers of one type, in the record `data/<record>`; `kind` is None for a type that is not read."""

    kind: torch.dtype | None
    kind_name: str
    record: str
    size: int


class View(NamedTuple):
    """A tensor as it lies in its storage; offset and strides count numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    """Where a tuple or a run of items begins on the stack."""


_MARK = _Mark()


def read_listing(program: bytes) -> dict[str, View]:
    """Name -> view of every tensor; Unfit when `program` lists anything else."""
    found = _Machine(program).run()
    if not isinstance(found, dict) or not found:
        raise Unfit("holds no tensors by name")
    if not all(isinstance(key, str) and isinstance(value, View) for key, value in found.items()):
        raise Unfit("holds no tensors by name")
    return found


@dataclass
class _Machine:
    program: bytes
    position: int = 0
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self) -> Any:
        while (code := self.take(1)) != b".":
            step = _STEPS.get(code)
            if step is None:
                raise Unfit(f"not a readable adapter (instruction 0x{code.hex()} that no adapter needs)")
            step(self)
        return self.pop()

    def take(self, count: int) -> bytes:
        found = self.program[self.position : self.position + count]
        if len(found) < count:
            raise Unfit("not a readable adapter (its listing is cut off)")
        self.position += count
        return found

    def number(self, count: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(count), "little", signed=signed)

    def text(self, count: int) -> str:
        try:
            return self.take(count).decode("utf-8")
        except UnicodeDecodeError:
            raise Unfit("not a readable adapter (a name is not UTF-8)") from None

    def line(self) -> str:
        end = self.program.find(b"\n", self.position, self.position + 200)
        if end < 0:
            raise Unfit("not a readable adapter (a name without end)")
        return self.text(end + 1 - self.position)[:-1]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise Unfit("not a readable adapter (its listing does not add up)")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        for begin in range(len(self.stack) - 1, -1, -1):
            if self.stack[begin] is _MARK:
                items = self.stack[begin + 1 :]
                del self.stack[begin:]
                return items
        raise Unfit("not a readable adapter (its listing does not add up)")

    def name(self) -> None:
        wanted = f"{self.line()} {self.line()}"
        known = wanted in (_DICT, _TENSOR, _PARAMETER)
        if not known and not (wanted.startswith("torch ") and wanted.endswith("Storage")):
            what = f"asks for {wanted.replace(' ', '.')[:80]!r}, which no adapter needs; nothing of it was run"
            raise Unfit(f"not a readable adapter ({what})")
        self.push(Named(wanted))

    def pack(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def keep(self, place: int) -> None:
        value = self.pop()
        self.push(value)
        self.memo[place] = value

    def recall(self, place: int) -> None:
        if place not in self.memo:
            raise Unfit("not a readable adapter (its listing does not add up)")
        self.push(self.memo[place])

    def store(self, items: list[Any]) -> None:
        target = self.pop()
        if type(target) is not dict or len(items) % 2 or not all(type(key) is str for key in items[::2]):
            raise Unfit("holds no tensors by name")
        if target.keys() & set(items[::2]) or len(set(items[::2])) * 2 < len(items):
            raise Unfit("not a readable adapter (a name is given twice)")
        target.update(zip(items[::2], items[1::2], strict=True))
        self.push(target)

    def build(self) -> None:
        """State of an object, such as the versions that torch keeps with a module's tensors: not needed."""
        self.pop()

    def locate(self) -> None:
        match self.pop():
            case ("storage", Named(kind), str(record), str(), int(count)):
                self.push(Storage(STORAGES.get(kind), kind.removeprefix("torch "), record, count))
            case _:
                raise Unfit("not a readable adapter (a storage without type, record and size)")

    def call(self) -> None:
        arguments = self.pop()
        match self.pop(), arguments:
            case Named(name), () if name == _DICT:
                self.push({})
            case Named(name), (View() as view, bool(), dict()) if name == _PARAMETER:
                self.push(view)
            case Named(name), (Storage() as storage, int(offset), shape, strides, bool(), dict()) if name == _TENSOR:
                self.push(View(storage, offset, read_sizes(shape), read_sizes(strides)))
            case _:
                raise Unfit("not a readable adapter (asks for something that is not a plain tensor)")


_STEPS = {
    b"\x80": lambda machine: machine.take(1),
    b"}": lambda machine: machine.push({}),
    b")": lambda machine: machine.push(()),
    b"(": lambda machine: machine.push(_MARK),
    b"t": lambda machine: machine.push(tuple(machine.pop_to_mark())),
    b"\x85": lambda machine: machine.pack(1),
    b"\x86": lambda machine: machine.pack(2),
    b"\x87": lambda machine: machine.pack(3),
    b"\x88": lambda machine: machine.push(True),
    b"\x89": lambda machine: machine.push(False),
    b"N": lambda machine: machine.push(None),
    b"K": lambda machine: machine.push(machine.number(1)),
    b"M": lambda machine: machine.push(machine.number(2)),
    b"J": lambda machine: machine.push(machine.number(4, signed=True)),
    b"\x8a": lambda machine: machine.push(machine.number(machine.number(1), signed=True)),
    b"X": lambda machine: machine.push(machine.text(machine.number(4))),
    b"q": lambda machine: machine.keep(machine.number(1)),
    b"r": lambda machine: machine.keep(machine.number(4)),
    b"h": lambda machine: machine.recall(machine.number(1)),
    b"j": lambda machine: machine.recall(machine.number(4)),
    b"c": lambda machine: machine.name(),
    b"Q": lambda machine: machine.locate(),
    b"R": lambda machine: machine.call(),
    b"b": lambda machine: machine.build(),
    b"s": lambda machine: machine.store([*reversed([machine.pop(), machine.pop()])]),
    b"u": lambda machine: machine.store(machine.pop_to_mark()),
}
"""Protocol 2, which torch.save writes, as far as a dictionary of tensors takes it."""
