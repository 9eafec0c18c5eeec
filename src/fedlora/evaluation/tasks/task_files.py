"""Tasks by name, by file and by folder, as lm-evaluation-harness loads them.

A task's rows may lie beside its file: `data_files` count from the file's folder, not from where the command is called.
A `!function` in a task file is Python code, which loading the task runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group  # pyright: ignore[reportMissingImports]
from lm_eval.api.task import Task  # pyright: ignore[reportMissingImports]
from lm_eval.evaluator_utils import get_sample_size  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from lm_eval.tasks._factory import TaskFactory  # pyright: ignore[reportMissingImports]
from lm_eval.tasks._index import Entry, TaskIndex  # pyright: ignore[reportMissingImports]
from lm_eval.tasks._yaml_loader import load_yaml  # pyright: ignore[reportMissingImports]
from lm_eval.utils import handle_non_serializable  # pyright: ignore[reportMissingImports]

from fedlora.errors import DataError, FedloraError, UsageError
from fedlora.nearest import suggest
from fedlora.plain_text import one_line

ENDINGS = (".yaml", ".yml")
_PLACES = ("config_source", "data_files", "data_dir", "download_config")
"""Parts of a task's configuration that say where its rows lie; the rows themselves count."""


@dataclass(frozen=True)
class TaskItem:
    """One task, or one group with its tasks: what has a result of its own."""

    name: str
    tasks: Mapping[str, Task]
    groups: Mapping[str, Group]

    @property
    def loaded(self) -> dict[str, Any]:
        """As the library's evaluation takes it."""
        return {"tasks": dict(self.tasks), "groups": dict(self.groups)}

    def num_answers(self, limit: float | None) -> int:
        """Most prompts that one of the tasks has answered; 0 where all choose by likelihood."""
        counts = [len(task.eval_docs) for task in self.tasks.values() if task.OUTPUT_TYPE == "generate_until"]
        most = max(counts, default=0)
        return most if limit is None else min(most, max(1, int(limit * most if limit < 1 else limit)))

    def fingerprint(self, limit: float | None) -> str:
        """SHA-256 of settings and rows: two equal ones mean the same questions and the same way to score."""
        digest = hashlib.sha256()
        for name, task in sorted(self.tasks.items()):
            for part in _parts(name, task, limit):
                digest.update(json.dumps(part, sort_keys=True, default=handle_non_serializable).encode())
        for name, group in sorted(self.groups.items()):
            digest.update(json.dumps([name, group.to_dict()], sort_keys=True, default=str).encode())
        return digest.hexdigest()


def load_tasks(names: Sequence[str], *, num_fewshot: int | None) -> list[TaskItem]:
    """Every task that `names` mean, with its rows, in their order and each once.

    A name is one of the library's, of a task, a group or a tag; a YAML file; or a folder of them. Raises UsageError
    for a name that is not known, a file that cannot be read and rows that cannot be had.
    """
    manager = _make_manager(names)
    items: dict[str, TaskItem] = {}
    for name in names:
        for spec in _specs(name, manager):
            for item in _load(manager, spec):
                if item.name in items and spec != name:
                    raise UsageError(f"{spec}: a task named {item.name} is asked for twice", hint="give each a name")
                items[item.name] = item
    for item in items.values():
        for task in item.tasks.values():
            _set_fewshot(task, num_fewshot)
    return list(items.values())


class _LocalManager(TaskManager):
    """The library's manager, for which the rows of a task file may lie beside it."""

    def __init__(self, folders: Sequence[Path], *, library: bool) -> None:
        super().__init__(include_path=list(folders) or None, include_defaults=library)
        self._factory = _LocalFactory()


class _LocalFactory(TaskFactory):
    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        found = super()._load_full_config(entry, overrides)
        given = found.get("dataset_kwargs")
        if entry.yaml_path is None or not isinstance(given, dict):
            return found
        beside = {name: _beside(entry.yaml_path.parent, given[name]) for name in _PLACES if name in given}
        return {**found, "dataset_kwargs": {**given, **beside}}


def _beside(folder: Path, value: Any) -> Any:
    """The files that a value names, in `folder` where they lie there."""
    if isinstance(value, str):
        is_relative = bool(value) and "://" not in value and not Path(value).is_absolute()
        return str(folder / value) if is_relative and any(folder.glob(value)) else value
    if isinstance(value, Mapping):
        return {name: _beside(folder, one) for name, one in value.items()}
    return [_beside(folder, one) for one in value] if isinstance(value, list) else value


def _make_manager(names: Sequence[str]) -> _LocalManager:
    """A manager that knows what the names need: the library's thousands of tasks take seconds to list."""
    folders = [path for name in names if (path := Path(name).expanduser()).is_dir()]
    groups = [path.parent for name in names if (path := Path(name).expanduser()).is_file() and "group" in _read(path)]
    by_name = [name for name in names if not _is_place(name)]
    return _LocalManager([*folders, *groups], library=bool(by_name or groups))


def _is_place(name: str) -> bool:
    return name.endswith(ENDINGS) or Path(name).expanduser().is_dir()


def _read(path: Path) -> dict[str, Any]:
    """A task file, of which no function is loaded; UsageError where it is none."""
    try:
        return load_yaml(path, resolve_func=False)
    except Exception as error:
        raise UsageError(f"{path}: not a task file: {_first_line(error)}", hint="see lm-eval's task guide") from error


def _specs(name: str, manager: TaskManager) -> list[str]:
    """What the library is asked for: a name or a file."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _tasks_in(path)
    if name.endswith(ENDINGS):
        if not path.is_file():
            raise UsageError(f"{name}: no such task file", hint="give a YAML file, a folder of them, or a task's name")
        read = _read(path)
        if not {"task", "group"} & read.keys():
            raise UsageError(f"{name}: names no task", hint="a task file has a line `task: NAME`")
        return [_spec(path, read)]
    if name not in manager.task_index:
        hint = suggest(name, manager.all_tasks) or "lm-eval's own list has the names: `lm-eval ls tasks`"
        raise UsageError(f"{name!r} is not a task, a group or a tag of lm-eval, and no file", hint=hint)
    return [name]


def _spec(path: Path, read: Mapping[str, Any]) -> str:
    """A file, or the name of its group: the library takes the tasks of a group's file for its name."""
    return str(read.get("group", path))


def _tasks_in(folder: Path) -> list[str]:
    """The files of a folder that are a task or a group, without the tasks that one of its groups has."""
    read = {path: _read(path) for path in sorted(folder.iterdir()) if path.suffix in ENDINGS}
    members = {str(one["task"] if isinstance(one, Mapping) else one) for cfg in read.values() for one in _members(cfg)}
    found = [
        _spec(path, cfg)
        for path, cfg in read.items()
        if "group" in cfg or ("task" in cfg and cfg["task"] not in members)
    ]
    if not found:
        raise UsageError(f"{folder}: no task file", hint="a task is a YAML file with a line `task: NAME`")
    return found


def _members(config: Mapping[str, Any]) -> Iterable[Any]:
    listed = config.get("task")
    return [one for one in listed if not isinstance(one, Mapping) or "task" in one] if isinstance(listed, list) else ()


def _load(manager: TaskManager, spec: str) -> list[TaskItem]:
    """The tasks of one name or file; a tag has several."""
    try:
        loaded = manager.load(spec)
    except FedloraError:
        raise
    except Exception as error:  # whatever a data set's library, a network or a task's own code raises
        raise _explain(manager, spec, error) from error
    tasks, groups = loaded["tasks"], loaded.get("groups", {})
    inside = {name for group in groups.values() for name in group.child_names}
    tops = [group for name, group in groups.items() if name not in inside]
    items = [
        TaskItem(
            group.name,
            {task.task_name: task for task in group.get_all_tasks()},
            {one.name: one for one in [group, *group.get_all_groups()]},
        )
        for group in tops
    ]
    grouped = {name for item in items for name in item.tasks}
    return [*items, *(TaskItem(name, {name: task}, {}) for name, task in tasks.items() if name not in grouped)]


def _explain(manager: TaskManager, spec: str, error: Exception) -> FedloraError:
    """What a task could not be loaded for, and what to do."""
    reason = f"task {spec}: {type(error).__name__}: {_first_line(error)}"
    if isinstance(error, ImportError):
        return UsageError(reason, hint="install the package that the task's own code asks for")
    if not isinstance(error, OSError):
        return DataError(reason, hint="the task's own file or code fails")
    entry = manager.task_index.get(spec) or (TaskIndex.entry_from_path(Path(spec)) if _is_place(spec) else None)
    source = (_read(entry.yaml_path) if entry and entry.yaml_path else {}).get("dataset_path", "a data set")
    return UsageError(
        f"task {spec}: its rows ({source}) are neither here nor to be had from the hub: {_first_line(error)}",
        hint="run it once where there is a network, which keeps the rows under HF_HOME, and copy that folder here; or "
        "write a task file with data_files beside it",
    )


def _set_fewshot(task: Task, asked: int | None) -> None:
    """The number of examples before each question: a task that says 0 keeps it."""
    own = task.get_config("num_fewshot")
    if asked is not None and own != 0:
        task.set_config(key="num_fewshot", value=asked)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


def _parts(name: str, task: Task, limit: float | None) -> Iterator[Any]:
    yield name, _without_places(task.dump_config()), str(task.VERSION)
    yield from islice(task.eval_docs, get_sample_size(task, limit))
    if task.get_config("num_fewshot"):
        yield from task.fewshot_docs() or ()


def _without_places(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _without_places(one) for name, one in value.items() if name not in _PLACES}
    return [_without_places(one) for one in value] if isinstance(value, list | tuple) else value


def _first_line(error: Exception) -> str:
    return one_line(str(error).strip().splitlines()[0] if str(error).strip() else "no reason given")
