"""Configuration of the `reaggregate` stage."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

from pydantic import field_validator, model_validator

from fedlora.config.method_options import MethodOptions
from fedlora.config.reading import ReadingConfig
from fedlora.config.schema import Names, flag
from fedlora.config.train_fields import Precision
from fedlora.methods.row import Method
from fedlora.methods.table import METHODS

_WEIGHT = re.compile(r"(\d{1,9}):(\d{1,12}(?:\.\d{1,6})?)")


class ReaggregateConfig(ReadingConfig, MethodOptions):
    """What another aggregation would have made of every round's stored updates, without training.

    Each round starts from where the run really stood, so every answer holds for one round: later updates were trained
    on the actual path. The adapters lie under model_dir like a run's, and `generate` answers with them.
    """

    exp_name: str = flag("fedavg-1B", "run whose stored updates are combined")
    model_dir: Path = flag(Path("./models"), "root folder of all runs")
    new_name: str = flag("", "folder under model_dir for the result", if_none="<exp_name>-what-if")
    leave_out: Names = flag((), "clients to leave out, such as 3 or 3,5", if_none="nobody")
    weights: str = flag(
        "", "weights of the clients: examples, tokens, uniform, or one each, such as 0:2,1:0.5", if_none="the run's"
    )
    federation_mode: str = flag("", "method whose server aggregates", if_none="the run's")
    val_data_path: str = flag(
        "", "file of rows on which both adapters of every round are evaluated", if_none="no evaluation"
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:<n>; used with val_data_path")
    base_dtype: Precision = flag("auto", "number type of the frozen base model; used with val_data_path")
    trust_remote_code: bool = flag(False, "run code from the model's repository; only this flag can allow it")
    overwrite: bool = flag(False, "replace an earlier result under new_name")
    allow_drift: bool = flag(False, "continue although the source of the run's method has changed")

    @field_validator("leave_out")
    @classmethod
    def _are_clients(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [name for name in value if not (name.isascii() and name.isdigit())]:
            raise ValueError(f"{wrong[0]!r} is no number of a client")
        return value

    @field_validator("weights")
    @classmethod
    def _weights_can_be_read(cls, value: str) -> str:
        if value in ("", "examples", "tokens", "uniform"):
            return value
        parts = [_WEIGHT.fullmatch(part.strip()) for part in value.split(",")]
        found = [match for match in parts if match is not None]
        if len(found) < len(parts):
            raise ValueError("give examples, tokens, uniform, or client:weight pairs as 0:2,1:0.5")
        if any(Fraction(match[2]) == 0 for match in found):
            raise ValueError("a weight is zero: name that client in leave_out instead")
        if len({int(match[1]) for match in found}) < len(found):
            raise ValueError("a client is named twice")
        return value

    @model_validator(mode="after")
    def _something_changes(self) -> ReaggregateConfig:
        if not (self.leave_out or self.weights or self.federation_mode or self.method_options):
            raise ValueError("nothing is changed: give leave_out, weights, federation_mode or a setting of the server")
        return self

    @classmethod
    def methods_with_options(cls) -> tuple[Method, ...]:
        """Those whose servers can take the updates of another method."""
        return tuple(row for row in METHODS.values() if row.is_server_side)

    @property
    def method(self) -> Method | None:
        """The row of the method whose server aggregates; None for the run's own."""
        return self.method_row or METHODS.get(self.federation_mode)

    @property
    def left_out(self) -> frozenset[int]:
        return frozenset(map(int, self.leave_out))

    @property
    def client_weights(self) -> dict[int, int] | None:
        """Client -> whole weight in the proportions that were given; None unless `weights` names clients."""
        if ":" not in self.weights:
            return None
        pairs = [part.strip().split(":") for part in self.weights.split(",")]
        given = {int(client): Fraction(weight) for client, weight in pairs}
        scale = math.lcm(*(weight.denominator for weight in given.values()))
        return {client: int(weight * scale) for client, weight in given.items()}
