"""lm-evaluation-harness is an extra, of one supported release: its inner names change from one to the next."""

from importlib import metadata

from fedlora.errors import UsageError

LIBRARY_VERSION = "0.4.13"
"""The release that the tests run against; pyproject.toml says the same, and a test holds both equal."""


def check_library() -> None:
    """UsageError unless the supported release of lm-evaluation-harness is installed."""
    hint = "pip install 'fedlora[tasks]'"
    try:
        found = metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise UsageError("standard tasks need lm-evaluation-harness, which is not installed", hint=hint) from None
    if found != LIBRARY_VERSION:
        raise UsageError(f"lm-eval {found} is installed, and fedlora works with {LIBRARY_VERSION}", hint=hint)
