"""The user's home folder: `~` in paths, and the folders that belong to a user and not to a run."""

from __future__ import annotations

import os
from pathlib import Path

from fedlora.errors import UsageError


def expand_home(text: str) -> str:
    """A path with `~` and `~user` written out, as a shell does it; UsageError where the home folder is not known."""
    expanded = os.path.expanduser(text)  # noqa: PTH111 - leaves `~name` of nobody as it is
    if expanded == "~" or expanded.startswith("~/"):
        raise UsageError(f"{text}: the home folder of this user is not known", hint="write the path out, or set HOME")
    return expanded


def path_at_home(path: str | os.PathLike[str]) -> Path:
    """A path that a caller gave, with `~` written out."""
    return Path(expand_home(os.fspath(path)))


def user_folder(own_variable: str, xdg_variable: str, below_home: str, name: str) -> Path:
    """A folder that belongs to the user: where the variable of our own says, else `name` below the folder that the XDG
    variable names, which must be absolute to count, else below the one in the home folder."""
    if chosen := os.environ.get(own_variable):
        return path_at_home(chosen).absolute()
    if Path(chosen := os.environ.get(xdg_variable, "")).is_absolute():
        return Path(chosen) / name
    try:
        return path_at_home("~") / below_home / name
    except UsageError as error:
        hint = f"set HOME, or let {own_variable} name a folder that can be written"
        raise UsageError(str(error), hint=hint) from None


def cache_folder() -> Path:
    """Where converted models and tokenised rows are kept: FEDLORA_CACHE, else the user's cache folder."""
    return user_folder("FEDLORA_CACHE", "XDG_CACHE_HOME", ".cache", "fedlora")


def tokens_folder() -> Path:
    """Where tokenised rows are kept between runs."""
    return cache_folder() / "tokens"


def checks_folder() -> Path:
    """Where self-checks of base models are kept."""
    return cache_folder() / "checks"
