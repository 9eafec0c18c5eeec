"""Addresses of a judge's endpoint that are safe to send a key to, and queries that hold none."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

_THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "::1"})
_PRIVATE_NAMES = (".local", ".lan", ".internal", ".home.arpa")
"""Endings that no public name has."""
_LIKE_A_SECRET = re.compile(r"key|token|secret|password|signature|\bsig\b", re.IGNORECASE)


def check_address(value: str, *, allow_plain_http: bool) -> str:
    """The address without a slash at its end; ValueError where the key would be shown or travel in the clear."""
    parts = urlsplit(value)
    # reading the port raises ValueError where it is none
    if not parts.hostname or parts.port == 0 or not value.isprintable():
        raise ValueError("needs a host, such as https://api.openai.com/v1")
    may_be_plain = parts.hostname in _THIS_MACHINE or (allow_plain_http and _is_private(parts.hostname))
    if parts.username or parts.password:
        raise ValueError("no user name or password in the address; the key comes from the environment")
    if parts.query or parts.fragment:
        raise ValueError("takes no query; give what stands after the ? with judge_query")
    if parts.scheme != "https" and not (parts.scheme == "http" and may_be_plain):
        raise ValueError(
            "must be https://, or http:// to this machine: the key would travel in the clear; for an address of a "
            "private network there is allow_plain_http"
        )
    return value.rstrip("/")


def check_query(names: Iterable[str]) -> None:
    """ValueError for the name of a parameter that is like a secret's."""
    for name in names:
        if _LIKE_A_SECRET.search(name):
            raise ValueError(f"{name}: addresses are logged on their way; the key comes from the environment")


def _is_private(host: str) -> bool:
    """Whether a host is in a private network: by its address, or by a name that no public one has."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(_PRIVATE_NAMES)
    return address.is_private and not address.is_unspecified and not address.is_reserved
