"""A configuration file as YAML: its values, and the line that an error is about."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fedlora.config.names import SHORT_NAMES
from fedlora.errors import UsageError
from fedlora.files import read_text

_HINT = "a configuration file is UTF-8 text with `field: value` lines"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping with string keys; duplicate keys and anything else are refused, with the line."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise UsageError(f"{path}:{line}: {key!r} is given twice", hint="keep one of the two")
            seen[key] = loader.construct_object(value_node, deep=True)
        return seen

    StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        # a SafeLoader subclass: plain values only, no Python objects
        content = yaml.load(read_text(path), Loader=StrictLoader)  # noqa: S506
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{path}: not a configuration ({type(error).__name__}: {str(error)[:80]})", hint=_HINT
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UsageError(f"{place}: not valid YAML", hint="check indentation and quotes") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"{path}: a configuration file holds `field: value` lines", hint="see docs for an example")
    return content


def find_place(path: Path, message: str, *, field: str = "", overridden: Collection[str] = ()) -> str:
    """`FILE:LINE: ` of what an error is about, empty where it is about nothing in the file.

    It is about `field`, or about the first field that the message names; below that, about the name or the value that
    the message quotes. Fields that flags have `overridden` do not count.
    """
    import yaml

    root = yaml.compose(read_text(path), Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return ""
    entries = [(key, value) for key, value in root.value if not _names_of(key.value) & set(overridden)]
    if field:
        entries = [(key, value) for key, value in entries if field in _names_of(key.value)]
    named = [
        (at, key, value) for key, value in entries if (at := _find_word(message, _names_of(key.value))) is not None
    ]
    if named:
        _, *entry = min(named, key=lambda one: one[0])
        entries = [tuple(entry)]
    inner = [
        (at, node)
        for _, value in entries
        for node, names in _nodes_below(value)
        if (at := _find_word(message, names)) is not None
    ]
    if not inner and not (named or (field and entries)):
        return ""
    node = min(inner, key=lambda one: one[0])[1] if inner else entries[0][0]
    return f"{path}:{node.start_mark.line + 1}: "


def _nodes_below(node: Any) -> Iterator[tuple[Any, set[str]]]:
    """Keys below a node with the names they stand for, and text values with how a message quotes them."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key, _names_of(key.value)
            yield from _nodes_below(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _nodes_below(value)
    elif node.tag.endswith(":str") and node.value:
        yield node, {repr(node.value)}


def _names_of(key: Any) -> set[str]:
    """What a key of a file may be called in a message."""
    typed = str(key).replace("-", "_")
    return {typed} | {field for field, short in SHORT_NAMES.items() if short == typed}


def _find_word(message: str, words: Collection[str]) -> int | None:
    """Where the first of these words stands in a message as a word of its own."""
    found = re.search("|".join(rf"(?<![\w.]){re.escape(word)}(?!\w)" for word in sorted(words)), message)
    return found.start() if found else None
