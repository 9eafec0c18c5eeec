"""Flower is an extra, of one supported release: the command line asks for it before a command that needs it."""

from importlib import metadata

from fedlora.errors import UsageError

FLOWER_VERSION = "1.41.0"
"""The release that the tests run against; pyproject.toml says the same, and a test holds both equal."""


def check_flower() -> None:
    """UsageError unless the supported release of Flower is installed."""
    hint = "pip install 'fedlora[flower]'"
    try:
        found = metadata.version("flwr")
    except metadata.PackageNotFoundError:
        raise UsageError("a federation across machines needs Flower, which is not installed", hint=hint) from None
    if found != FLOWER_VERSION:
        raise UsageError(f"Flower {found} is installed, and fedlora speaks that of {FLOWER_VERSION}", hint=hint)
