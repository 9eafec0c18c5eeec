"""Where the code of a method from outside lies, and the hashes of its files: what a run records and compares.

The files are those of the module in which the row was found and of the modules of its classes, without fedlora's own
and Python's.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, Literal

from fedlora.errors import UsageError

Kind = Literal["file", "module", "entry point", "session"]


@dataclass(frozen=True)
class Source:
    """The origin of a method from outside.

    `place` finds it again: `file.py:name`, `package.module:name` or the name of an entry point; empty for an object
    that only this process has. `files` maps the name of each source file or module to its SHA-256.
    """

    kind: Kind
    place: str
    files: Mapping[str, str] = field(default_factory=dict)
    distribution: str = ""
    version: str = ""

    @property
    def is_named_in_files(self) -> bool:
        """Whether YAML files and run.json may name it: code is run only when its user has installed or named it."""
        return self.kind == "entry point"

    def describe(self) -> str:
        """The place, and the package with its version."""
        package = f" ({self.distribution} {self.version})" if self.distribution else ""
        return f"{self.kind} {self.place}{package}" if self.place else self.kind

    def record(self) -> dict[str, Any]:
        """The origin as JSON values."""
        return {
            "from": self.kind,
            "place": self.place,
            "distribution": self.distribution,
            "version": self.version,
            "files": dict(self.files),
        }

    def find_changes(self, recorded: Mapping[str, Any]) -> list[str]:
        """`file: then -> now` for each file whose hash is not the recorded one; moving or renaming a file is none."""
        then = recorded.get("files")
        then = then if isinstance(then, Mapping) else {}
        hashes = sorted(map(str, then.values()))
        if hashes == sorted(self.files.values()) and all(hashes):
            return []
        names = [
            name for name in sorted({*then, *self.files}) if not then.get(name) or then[name] != self.files.get(name)
        ]
        return [f"{name}: {_short(then.get(name))} -> {_short(self.files.get(name))}" for name in names]


def hash_files(halves: tuple[Any, ...], module: ModuleType | None) -> dict[str, str]:
    """Name -> SHA-256 of the source of every module that a method is made of, beside fedlora's own.

    UsageError for a module without a source file, whose changes could not be seen.
    """
    found: dict[str, str] = {}
    for each in _modules_of(halves, module):
        if each.__name__ == "__main__":
            continue
        content = getattr(each.__loader__, "content", None)
        path = getattr(each, "__file__", None)
        if content is None and not (path and path.endswith(".py") and Path(path).is_file()):
            raise UsageError(
                f"{each.__name__}: has no source file whose hash a run could record",
                hint="install the package with its .py files",
            )
        name = Path(path).name if content is not None and path else each.__name__
        found[name] = hashlib.sha256(content or Path(str(path)).read_bytes()).hexdigest()
    return found


def hash_session(halves: tuple[Any, ...]) -> dict[str, str]:
    """The same for classes of a notebook cell or a prompt, by their compiled code, with the functions that they call.

    No file has it, and Python does not keep its text everywhere.
    """
    found = {}
    for kind in _classes_of(halves):
        if kind.__module__ == "__main__":
            digest = hashlib.sha256()
            for line in _describe_class(kind, set()):
                digest.update(line.encode())
            found[kind.__name__] = digest.hexdigest()
    return found


def _describe_class(kind: type, seen: set[str]) -> Iterator[str]:
    fields = getattr(kind, "__dataclass_fields__", {})
    yield f"{[(name, str(each.type), repr(each.default)) for name, each in fields.items()]}"
    for name, value in sorted(vars(kind).items()):
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        code = getattr(function, "__code__", None)
        # what @dataclass writes follows from the fields
        if code is not None and not (name.startswith("__") and code.co_filename == "<string>"):
            yield from _describe_code(name, code, seen)
        elif code is None and not name.startswith("__") and isinstance(value, int | float | str | tuple | None):
            yield f"{name}={value!r}"


def _describe_code(name: str, code: CodeType, seen: set[str]) -> Iterator[str]:
    plain = [_describe_constant(one) for one in code.co_consts if not isinstance(one, CodeType)]
    yield f"{name}:{code.co_code.hex()}:{plain}:{code.co_names}:{code.co_varnames}"
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _describe_code(inner.co_name, inner, seen)
    for called in code.co_names:
        function = vars(sys.modules["__main__"]).get(called)
        if called not in seen and isinstance(function, FunctionType) and function.__module__ == "__main__":
            seen.add(called)
            yield from _describe_code(called, function.__code__, seen)


def _describe_constant(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _classes_of(halves: tuple[Any, ...]) -> Iterator[type]:
    for half in halves:
        for kind in type(half).__mro__:
            top = kind.__module__.partition(".")[0]
            if top != "fedlora" and (top == "__main__" or top not in sys.stdlib_module_names):
                yield kind


def _modules_of(halves: tuple[Any, ...], module: ModuleType | None) -> list[ModuleType]:
    names = sorted({kind.__module__ for kind in _classes_of(halves)})
    modules = [sys.modules[name] for name in names if name in sys.modules]
    return modules if module is None or module in modules else [*modules, module]


def _short(digest: Any) -> str:
    return str(digest)[:12] if digest else "unknown"
