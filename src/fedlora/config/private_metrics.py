"""Which numbers of each client's own test rows a run asks for, and when."""

from __future__ import annotations

from pydantic import field_validator

from fedlora.config.schema import Config, Names, OptionalInt, flag

PRIVATE_METRICS = ("loss", "exact", "normalised", "f1", "rougeL", "chrf")
"""What can be asked for: the loss, and measures of answers against their references."""


def check_metrics(value: tuple[str, ...]) -> tuple[str, ...]:
    """The names, each once in the order of PRIVATE_METRICS. Raises ValueError for another name."""
    if unknown := sorted(set(value) - set(PRIVATE_METRICS)):
        raise ValueError(f"{unknown[0]!r} is no private metric: choose among {', '.join(PRIVATE_METRICS)}")
    return tuple(name for name in PRIVATE_METRICS if name in value)


class PrivateMetricFields(Config):
    """Numbers of each client's own test rows."""

    private_metrics: Names = flag(
        (),
        "numbers of each client's own test rows, under base, global and personal model: "
        f"{', '.join(PRIVATE_METRICS)}; only means and counts leave a client",
        group="data",
        if_none="no such numbers",
    )
    private_metrics_every: OptionalInt = flag(
        None, "rounds between two measurements of them", group="data", ge=1, if_none="once, after the last round"
    )
    private_metrics_rows: int = flag(100, "most test rows of a client that they are measured on", group="data", ge=2)
    private_metrics_tokens: int = flag(64, "longest answer that they are measured on, in tokens", group="data", ge=1)
    private_metrics_min: int = flag(
        10, "fewest test rows with different prompts that a number is over; of fewer none is given", group="data", ge=2
    )

    @field_validator("private_metrics")
    @classmethod
    def _known_metrics(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return check_metrics(value)

    def measures_privately(self, number: int, rounds: int) -> bool:
        """Whether private metrics are measured after round `number` of `rounds`."""
        every = self.private_metrics_every
        return bool(self.private_metrics) and (number == rounds or (every is not None and number % every == 0))
