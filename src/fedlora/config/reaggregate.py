"""Configuration of the `reaggregate` stage."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

from pydantic import field_validator, model_validator

from fedlora.config.method_options import MethodOptions
from fedlora.config.reading import ReadingConfig
from fedlora.config.schema import Names, PathText, flag, place_of_base
from fedlora.config.train_fields import Precision
from fedlora.methods.row import Method
from fedlora.methods.table import METHODS

_WEIGHT = re.compile(r"([^:]{1,200}):(\d{1,12}(?:\.\d{1,6})?)")
EACH = "each"
"""The value of `leave_out` that stands for every client in turn."""


class ReaggregateConfig(ReadingConfig, MethodOptions):
    """Aggregate every round's stored updates otherwise, without training: leave clients out, weigh them otherwise, or
    take another method's server.

    Each round starts from the adapter that the run really had, so every result holds for one round: the clients of
    later rounds trained on the actual adapters. The new adapters lie under model_dir like those of a run, and
    `generate` answers with them. `--leave_out each` leaves out every client in turn and writes no adapter: it gives one
    table of how much each client moved the run.
    """

    exp_name: str = flag("fedavg-1B", "run whose stored updates are aggregated")
    model_dir: Path = flag(Path("./models"), "root folder of all runs")
    new_name: str = flag("", "folder under model_dir for the new adapters", if_none="<exp_name>-what-if")
    leave_out: Names = flag(
        (),
        "clients to leave out, by name or number, such as library or 3,5; each: every one in turn",
        if_none="no client",
    )
    weights: str = flag(
        "", "weights of the clients: examples, tokens, uniform, or one each: library:2,1:0.5", if_none="the run's"
    )
    federation_mode: str = flag("", "method whose server aggregates", if_none="the run's")
    val_data_path: PathText = flag(
        "", "file of rows on which both adapters of every round are evaluated", if_none="no evaluation"
    )
    base_model: str = place_of_base()
    device: str = flag("auto", "auto, cpu, cuda or cuda:<n>; used with val_data_path")
    base_dtype: Precision = flag("auto", "number type of the frozen base model; used with val_data_path")
    trust_remote_code: bool = flag(False, "run code from the model's repository; only this flag can allow it")
    overwrite: bool = flag(False, "replace an earlier result under new_name")
    allow_drift: bool = flag(False, "continue although the source of the run's method has changed")

    @field_validator("leave_out")
    @classmethod
    def _stands_alone(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if EACH in value and len(value) > 1:
            raise ValueError(f"{EACH} stands for every client in turn: give it alone, or give the clients")
        return value

    @field_validator("weights")
    @classmethod
    def _weights_can_be_read(cls, value: str) -> str:
        if value in ("", "examples", "tokens", "uniform"):
            return value
        parts = [_WEIGHT.fullmatch(part.strip()) for part in value.split(",")]
        found = [match for match in parts if match is not None]
        if len(found) < len(parts):
            raise ValueError("give examples, tokens, uniform, or client:weight pairs as library:2,1:0.5")
        if any(Fraction(match[2]) == 0 for match in found):
            raise ValueError("a weight is zero: name that client in leave_out instead")
        if len({match[1].strip() for match in found}) < len(found):
            raise ValueError("a client is named twice")
        return value

    @model_validator(mode="after")
    def _something_changes(self) -> ReaggregateConfig:
        if not (self.leave_out or self.weights or self.federation_mode or self.method_options):
            raise ValueError("nothing is changed: give leave_out, weights, federation_mode or a setting of the server")
        if self.leaves_out_each and (self.new_name or self.overwrite):
            raise ValueError(f"leave_out={EACH} writes no adapter: leave new_name and overwrite out")
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
    def leaves_out_each(self) -> bool:
        """Whether every client is left out in turn."""
        return self.leave_out == (EACH,)

    @property
    def client_weights(self) -> dict[str, int] | None:
        """Client as it was typed -> whole weight in the proportions that were given; None unless `weights` names
        clients."""
        if ":" not in self.weights:
            return None
        pairs = [part.strip().split(":") for part in self.weights.split(",")]
        given = {client.strip(): Fraction(weight) for client, weight in pairs}
        scale = math.lcm(*(weight.denominator for weight in given.values()))
        return {client: int(weight * scale) for client, weight in given.items()}
