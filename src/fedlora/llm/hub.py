"""Whether a model hub can be asked: directly, or by the proxy that the environment names."""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

HUB_PATIENCE = 5.0
"""Seconds a hub, or the proxy on the way to it, has to accept a connection before the local cache is all there is."""
_PORTS, SOCKS_PORT = {"http": 80, "https": 443}, 1080


def is_offline() -> bool:
    """Whether to look into the local cache only: because the user says so, or because no hub answers.

    The hub's own client retries for most of a minute before it says the same.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return True
    try:
        hop = _first_hop()
        if hop.scheme.startswith("socks") and find_spec("socksio") is None:
            return False  # the hub's client says which package is missing
        port = hop.port or _PORTS.get(hop.scheme, SOCKS_PORT)
        socket.create_connection((hop.hostname or "", port), timeout=HUB_PATIENCE).close()
    except (OSError, ValueError):  # also an address of a proxy that is none
        return True
    return False


def _first_hop() -> SplitResult:
    """The address of the hub, or of the proxy in front of it."""
    from huggingface_hub.constants import ENDPOINT

    hub, proxies = urlsplit(ENDPOINT), getproxies()
    proxy = proxies.get(hub.scheme) or proxies.get("all") or ""
    if not proxy or proxy_bypass(hub.hostname or ""):
        return hub
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}")
