"""The `methods check` stage: the laws of federated methods, tried on one method."""

from __future__ import annotations

from fedlora.config.method_check import MethodCheckConfig
from fedlora.errors import TrainingError
from fedlora.laws.method_check import MethodCheck, check_method


def run(config: MethodCheckConfig) -> MethodCheck:
    """The report; TrainingError, with the report as its result, where the method breaks a law."""
    checked = check_method(config.method, options=config.method_options, **config.given_promises)
    if checked.broken:
        names = ", ".join(law.name for law in checked.broken)
        raise TrainingError(
            f"method {checked.method} breaks {len(checked.broken)} of {len(checked.laws)} laws: {names}",
            hint="the numbers are above. Remove a fact of the row that does not hold. Where --combines holds with some "
            "options only, name them with --plain",
            result=checked,
        )
    return checked
