"""The way from a call in Python to a stage, and of an error back.

Keywords go through the configuration of the command, as its flags do. Messages use the names that the caller used.
"""

from __future__ import annotations

import contextlib
import numbers
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from fedlora.config.names import as_fields, note_spelling, spell, spelling
from fedlora.config.schema import Config
from fedlora.console import collect_lines
from fedlora.errors import FedloraError, UsageError, refusal_of
from fedlora.stopping import remember_signals

Made = TypeVar("Made")
AnyConfig = TypeVar("AnyConfig", bound=Config)
PathLike = str | os.PathLike[str]
_FLAG = re.compile(r"(?<![\w-])--(\w+)")


@contextlib.contextmanager
def entered(function: str, config: type[Config], keywords: Mapping[str, Any], *, progress: bool) -> Iterator[None]:
    """Inside, messages and errors name keywords as the caller did, and without `progress` nothing is shown.

    An interrupt is noted, so that no result computed after it is kept.
    """
    with spelling(), contextlib.nullcontext() if progress else collect_lines(), remember_signals():
        note_spelling(keywords)
        try:
            yield
        except FedloraError as error:
            raise _respelled(error, function, config).with_traceback(error.__traceback__) from error.__cause__
        except Exception as error:
            if (named := refusal_of(error)) is None:
                raise
            raise _respelled(named, function, config) from error


def call(
    function: str,
    config: type[Config],
    run: Callable[[Any], Made],
    file: PathLike | None,
    keywords: Mapping[str, Any],
    *,
    progress: bool,
) -> Made:
    """What a stage's `run` makes of the configuration that `file` and `keywords` give."""
    with entered(function, config, keywords, progress=progress):
        return run(make_config(config, file, keywords))


def make_config(config: type[AnyConfig], file: PathLike | None, keywords: Mapping[str, Any]) -> AnyConfig:
    """The configuration of a call; UsageError for a keyword that does not exist, and for a wrong type or value.

    Keywords win over the file; None stands for the default.
    """
    if file is not None and not isinstance(file, str | os.PathLike):
        raise UsageError(f"config={file!r} is not a path", hint="give the path of a YAML file")
    fields = config.flat_fields()
    values = as_fields(keywords, fields)
    for name, value in values.items():
        if isinstance(value, bool) and name in fields and fields[name].annotation is not bool:
            raise UsageError(f"{name}={value} is not a value of this field", hint="see --help for what it takes")
    plain = {name: _plain(value, _holds_texts(fields, name)) for name, value in values.items()}
    return config.make(plain, file=Path(file) if file is not None else None)


def _plain(value: Any, holds_texts: bool) -> Any:
    """A value as a configuration takes it: paths as text, numbers of other libraries as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, numbers.Integral):
        return str(int(value)) if holds_texts else int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, list | tuple | set | frozenset | range):
        return [_plain(each, holds_texts) for each in value]
    return value


def _holds_texts(fields: Mapping[str, Any], name: str) -> bool:
    """Whether a field is a list of names, of which some may be given as numbers."""
    annotation = fields[name].annotation if name in fields else None
    return any(get_origin(kind) is tuple and str in get_args(kind) for kind in (annotation, *get_args(annotation)))


def _respelled(error: FedloraError, function: str, config: type[Config]) -> FedloraError:
    """The same error in the caller's names: flags as keywords, and the hint as a note of the traceback."""
    message, hint = (_as_keywords(spell(text), function, config) for text in (str(error), error.hint))
    made = type(error)(message, hint=hint, result=error.result)
    if hint:
        made.add_note(f"hint: {hint}")
    return made


def _as_keywords(text: str, function: str, config: type[Config]) -> str:
    """`give --overwrite` as `give overwrite=True`; commands in backticks stay as they are typed in a shell."""

    def keyword(found: re.Match[str]) -> str:
        if found[1] == "help":
            return f"help(fedlora.{function})"
        field = config.flat_fields().get(found[1])
        return f"{found[1]}=True" if field is not None and field.annotation is bool else found[1]

    parts = text.split("`")
    return "`".join(part if index % 2 else _FLAG.sub(keyword, part) for index, part in enumerate(parts))
