"""Configuration of the `methods check` command."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import field_validator, model_validator
from pydantic.fields import FieldInfo

from fedlora.config.method_options import MethodOptions
from fedlora.config.schema import EMPTY_IS_NONE, Names, flag
from fedlora.methods.row import Method
from fedlora.methods.table import METHODS

Combines = Literal["products", "cut", "factors", "middle", "nothing"]


class MethodCheckConfig(MethodOptions):
    """Try the laws of federated methods on one method, in seconds and without a language model.

    Each law is held, broken (with the numbers) or not applicable (with the reason). The row and the code of the method
    say most of what it promises. --combines says where its server goes, and --plain with which options.
    """

    federation_mode: str = flag("", "method to check: a name, file.py:name or package.module:name")
    combines: Annotated[Combines | None, EMPTY_IS_NONE] = flag(
        None,
        "what a round leaves: the mean of the clients' products, that mean cut to the rank, the mean of their factors, "
        "something between the clients, or nothing",
        if_none="not promised",
    )
    plain: Names = flag((), "options with which the server goes all the way there: step=1", if_none="the method's own")
    promises: Names = flag(
        (), "other promises (fedlora.laws.promises): keeps=B,rests=false", if_none="those of the row and the code"
    )

    @classmethod
    def flat_fields(cls) -> dict[str, FieldInfo]:
        hidden = ("method_options", "method_row")
        return {name: field for name, field in cls.model_fields.items() if name not in hidden}

    @field_validator("plain", "promises")
    @classmethod
    def _are_pairs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [pair for pair in value if not all(pair.partition("="))]:
            raise ValueError(f"{wrong[0]!r} is not name=value")
        return value

    @model_validator(mode="after")
    def _names_a_method(self) -> MethodCheckConfig:
        if not self.federation_mode:
            raise ValueError("name the method to check, such as part_way.py:part_way")
        return self

    @property
    def method(self) -> Method:
        """The row of the method."""
        return self.method_row or METHODS[self.federation_mode]

    @property
    def given_promises(self) -> dict[str, object]:
        """Name -> promise, as text where the command line gave it."""
        named: dict[str, object] = dict(_split(pair) for pair in self.promises)
        named |= {"combines": self.combines} if self.combines else {}
        return named | ({"plain": dict(_split(pair) for pair in self.plain)} if self.plain else {})


def _split(pair: str) -> tuple[str, str]:
    name, _, value = pair.partition("=")
    return name.strip(), value.strip()
