"""Configuration of the `methods` command."""

from __future__ import annotations

from fedlora.config.schema import Config, flag


class MethodsConfig(Config):
    """List the federated methods by family, or describe one: paper, what it sends, its flags, what it combines with."""

    federation_mode: str = flag("", "method to describe", if_none="a list of all")
