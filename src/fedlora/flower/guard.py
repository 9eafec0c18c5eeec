"""The guard of a node: it runs only app bundles whose SHA-256 its owner allows.

A bundle is Python that anyone who reaches the server's Control API can send to every node. This replaces Flower's
`flwr-clientapp` and refuses to install bundles that are not on the list; the check hangs on an inner name of Flower's,
which is why its release is pinned and a test calls this through Flower's own code.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import fedlora

ALLOWED_VARIABLE = "FEDLORA_BUNDLES"


class BundleRefusedError(Exception):
    """The bundle is not on this node's list."""


def bundle_folder() -> Path:
    """The folder of this release's own bundle."""
    return Path(fedlora.__file__).parent / "flower" / "bundle"


def make_bundle() -> bytes:
    """The bundle as Flower packs it; the same bytes wherever the same release is installed."""
    from flwr.cli.build import build_fab_from_disk

    return build_fab_from_disk(bundle_folder())


def own_bundle_sha256() -> str:
    """The bundle that a node of this release allows by default."""
    return hashlib.sha256(make_bundle()).hexdigest()


def guard_install(install: Callable[..., Any], allowed: frozenset[str]) -> Callable[..., Any]:
    """Flower's installation of a bundle, for bundles on the list only."""

    def install_allowed(content: Any, *arguments: Any, **options: Any) -> Any:
        digest = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else ""
        if digest not in allowed:
            raise BundleRefusedError("the app bundle is not on the list of this node")
        return install(content, *arguments, **options)

    return install_allowed


def _skip_supernode() -> None:
    """Let Flower's package of node commands be found without being run: it loads the SuperNode and its database.

    An app process needs neither, and there is one for every message.
    """
    from flwr import supernode

    name = f"{supernode.__name__}.cli"
    package = ModuleType(name)
    package.__path__ = [str(Path(place) / "cli") for place in supernode.__path__]
    sys.modules.setdefault(name, package)


def main() -> None:
    """`flwr-clientapp`, guarded."""
    _skip_supernode()
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    allowed = frozenset(os.environ.get(ALLOWED_VARIABLE, "").split(","))
    inner: Any = run_clientapp
    inner.install_from_fab = guard_install(inner.install_from_fab, allowed)
    sys.argv[0] = "flwr-clientapp"
    sys.exit(flwr_clientapp())
