"""Methods from outside the table: in a file, a module, an installed package, or an object of this process.

A name without a colon is an entry point of the group `fedlora.methods`, `package/name` where several packages have it;
`file.py:name` and `package.module:name` name code, so they are taken from flags and from Python only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from importlib import import_module, metadata
from importlib.abc import InspectLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from fedlora.errors import UsageError
from fedlora.home import path_at_home
from fedlora.methods.own_options import make_half
from fedlora.methods.row import Method
from fedlora.methods.source import Kind, Source, hash_files, hash_session

GROUP = "fedlora.methods"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
_PLACE_HINT = "name a method as file.py:name or package.module:name, or install a package that registers it"
_RECORDED = frozenset(field.name for field in fields(Method)) - {
    *("name", "summary", "paper", "server", "client", "options", "source", "is_baseline")
}
"""Facts of a row that run.json keeps, so that the run can be read without the method's code."""


def load_outside(name: str) -> Method | None:
    """The method that a place or an entry point names, None where nothing is installed under this name.

    Runs the code that is named. UsageError where it cannot be loaded or is no method.
    """
    if ":" not in name:
        return _load_installed(name)
    where, _, attribute = name.rpartition(":")
    if not (where and attribute):
        raise UsageError(f"federation_mode={name!r} names no object", hint=_PLACE_HINT)
    if where.endswith(".py"):
        path = path_at_home(where).resolve()
        return _finish(_pick(load_file(path), attribute, name), "file", f"{path}:{attribute}")
    return _from_module(where, attribute, name)


def locate(row: Method) -> Method:
    """A row that was made in this process, with where it can be found again: in a file or module, or only here."""
    if row.source is not None:
        return row
    for module, attribute in _holders(row):
        if isinstance(module.__loader__, _FileLoader):
            return _finish(row, "file", f"{module.__file__}:{attribute}", module)
        return _from_module(module.__name__, attribute, row.name)
    checked = _finish(row, "session", "")
    halves = (checked.server, checked.client)
    files = {**hash_files(halves, None), **hash_session(halves)}
    return replace(checked, source=Source("session", "", files))


def installed_names() -> list[str]:
    """The methods of installed packages, as `package/name` where several packages have the name."""
    found = _entry_points()
    names = [point.name for point in found]
    return sorted(p.name if names.count(p.name) == 1 else f"{_package_of(p)}/{p.name}" for p in found)


def record_method(row: Method) -> dict[str, Any] | None:
    """What run.json keeps of a method from outside: its name, its origin and its facts."""
    if row.source is None:
        return None
    return {"name": row.name, **row.source.record(), "facts": {name: getattr(row, name) for name in sorted(_RECORDED)}}


def find_other_facts(row: Method, record: Any) -> list[str]:
    """`fact: then -> now` for each fact that a run recorded and that the row states otherwise now."""
    told = record.get("facts") if isinstance(record, Mapping) else None
    then = told if isinstance(told, Mapping) else {}
    now = {name: list(value) if isinstance(value := getattr(row, name), tuple) else value for name in _RECORDED}
    stated = [name for name in sorted(_RECORDED) if then.get(name) is not None and then[name] != now[name]]
    return [f"{name}: {then[name]} -> {now[name]}" for name in stated]


def read_recorded(mode: str, record: Any) -> Method:
    """A method from outside as its run recorded it, without its code: a fact that is missing is unstated."""
    told = record.get("facts") if isinstance(record, Mapping) else None
    facts = {name: value for name, value in told.items() if name in _RECORDED} if isinstance(told, Mapping) else {}
    if isinstance(facts.get("rows_weigh"), list):
        facts["rows_weigh"] = tuple(facts["rows_weigh"])
    if facts.get("order") not in ("parallel", "chain", "pooled"):
        facts["order"] = "parallel"
    return Method(mode, **facts)


def load_file(path: Path) -> ModuleType:
    """The module of one file, run once for each content that it has had; UsageError with the line where it fails."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file", hint="give the path of the file that holds the method")
    content = path.read_bytes()
    digest = hashlib.sha256(f"{path}\n".encode() + content).hexdigest()[:16]
    name = f"fedlora_method_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, loader=_FileLoader(path, content))
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: not a Python file", hint=_PLACE_HINT)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look a class's module up
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise _failed(str(path), error) from error
    return module


class _FileLoader(InspectLoader):
    """Runs the bytes that were hashed: no bytecode that another version of the file has left."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content = path, content

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self.content)

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.content, str(self.path))


def _from_module(where: str, attribute: str, name: str) -> Method:
    try:
        module = import_module(where)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{where}.".startswith(f"{error.name}."):
            raise UsageError(
                f"federation_mode={name!r}: no module named {error.name!r}",
                hint="install its package, or name its file: folder/file.py:name",
            ) from None
        raise _failed(where, error) from error
    row = _pick(module, attribute, name)
    place = f"{where}:{attribute}"
    for point in _entry_points():
        if point.value.replace(" ", "") == place and point.name == row.name:
            return _from_point(point, [one.name for one in _entry_points()].count(point.name) > 1)
    return _finish(row, "module", place, module)


def _load_installed(name: str) -> Method | None:
    package, _, short = name.rpartition("/")
    found = [p for p in _entry_points() if p.name == short and (not package or _package_of(p) == _normal(package))]
    if len(found) > 1:
        names = ", ".join(f"{_package_of(point)}/{short}" for point in found)
        raise UsageError(f"federation_mode={name!r} is in several packages", hint=f"name one: {names}")
    return _from_point(found[0], bool(package)) if found else None


def _from_point(point: metadata.EntryPoint, with_package: bool) -> Method:
    try:
        row = point.load()
    except Exception as error:
        raise _failed(f"{_package_of(point)}: entry point {point.name} = {point.value}", error) from error
    name = f"{_package_of(point)}/{point.name}" if with_package else point.name
    row = _pick_row(row, point.value)
    if row.name != point.name:
        raise UsageError(
            f"{_package_of(point)}: the entry point {point.name} names the method {row.name!r}",
            hint="give the entry point and the method one name",
        )
    return _finish(row, "entry point", name, sys.modules.get(point.module), point.dist, name=name)


def _finish(
    row: Method,
    kind: Kind,
    place: str,
    module: ModuleType | None = None,
    package: metadata.Distribution | None = None,
    *,
    name: str = "",
) -> Method:
    """The row with instances for halves, and with its source; UsageError for a name that cannot be a method's."""
    from fedlora.methods.table import METHODS

    if not _NAME.fullmatch(row.name) or (row.name in METHODS and not name):
        reason = "is the name of a built-in method" if row.name in METHODS else "is no name of letters, digits, _ . -"
        raise UsageError(f"{place or 'this method'}: {row.name!r} {reason}", hint="give the method another name")
    whole = replace(row, server=make_half(row.server), client=make_half(row.client), name=name or row.name)
    if kind == "session":
        return whole
    if kind == "file":
        module = load_file(Path(place.rpartition(":")[0])) if module is None else module
    files = hash_files((whole.server, whole.client), module)
    if kind == "module" and module is not None:
        package = next(iter(_packages_of(module)), None)
    named = {"distribution": package.metadata["Name"], "version": package.version} if package is not None else {}
    return replace(whole, source=Source(kind, place, files, **named))


def _pick(module: ModuleType, attribute: str, place: str) -> Method:
    if not hasattr(module, attribute):
        rows = [name for name, value in vars(module).items() if isinstance(value, Method)]
        hint = f"its methods are {', '.join(rows)}" if rows else 'it has none; write name = Method("name", server=...)'
        raise UsageError(f"federation_mode={place!r}: there is no {attribute!r}", hint=hint)
    return _pick_row(getattr(module, attribute), place)


def _pick_row(value: Any, place: str) -> Method:
    if not isinstance(value, Method):
        raise UsageError(
            f"federation_mode={place!r} is a {type(value).__name__}, not a fedlora.methods.Method",
            hint='write name = Method("name", server=..., client=..., server_sees=...) and name that',
        )
    return value


def _holders(row: Method) -> Iterator[tuple[ModuleType, str]]:
    """Modules with a source file that have this very object as an attribute; its classes' own modules first."""
    own = {type(half).__module__ for half in (row.server, row.client)}
    for module in sorted(sys.modules.copy().values(), key=lambda each: getattr(each, "__name__", "") not in own):
        spec = getattr(module, "__spec__", None)
        if getattr(module, "__name__", "__main__") == "__main__" or spec is None or spec.loader is None:
            continue
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if value is row:
                yield module, attribute


def _entry_points() -> list[metadata.EntryPoint]:
    return sorted(metadata.entry_points(group=GROUP), key=lambda point: (point.name, _package_of(point)))


def _package_of(point: metadata.EntryPoint) -> str:
    return _normal(point.dist.metadata["Name"]) if point.dist is not None else ""


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _packages_of(module: ModuleType) -> Iterator[metadata.Distribution]:
    for name in metadata.packages_distributions().get(module.__name__.partition(".")[0], []):
        yield metadata.distribution(name)


def _failed(place: str, error: BaseException) -> UsageError:
    """What went wrong in somebody's code, with the line of it that was reached last."""
    if isinstance(error, UsageError):
        return UsageError(f"{place}: {error}", hint=error.hint)
    frames = traceback.extract_tb(error.__traceback__)
    line = next((frame.lineno for frame in reversed(frames) if frame.filename == place), None)
    if isinstance(error, SyntaxError) and error.filename == place:
        line = error.lineno
    where = f"{place}:{line}" if line else place
    hint = "the file of a method must import without an error"
    if isinstance(error, ImportError):
        hint += ": a method of several files is a package, named as package.module:name"
    return UsageError(f"{where}: {type(error).__name__}: {error}", hint=hint)
