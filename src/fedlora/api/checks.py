"""`fedlora.check_method`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedlora.api.entrance import entered
from fedlora.config.method_check import MethodCheckConfig
from fedlora.methods.row import Method

if TYPE_CHECKING:
    from fedlora.laws.method_check import MethodCheck


def check_method(method: Method | str, *, options: Mapping[str, Any] | None = None, **promises: Any) -> MethodCheck:
    """Try the laws of federated methods on one method, in seconds and without a language model.

    `method` is a `fedlora.methods.Method`, a name, or a place such as `part_way.py:part_way`; `options` are values of
    its options. Each law is held, broken (with the numbers) or not applicable (with the reason).

    The row and the code of the method say most of what it promises. Keywords say more: with `combines="factors"` a
    round leaves the mean of the clients' factors, and `plain={"step": 1.0}` names the options with which it does. The
    promises are the fields of `fedlora.laws.promises.Promises`.

    Raises UsageError for a method that cannot be loaded, and for a promise or an option that does not exist. A broken
    law raises nothing: see `is_sound` and `broken` of the result.

    >>> checked = fl.check_method("fedavgm", combines="factors", plain={"server_momentum": 0.0})
    >>> checked.is_sound
    True
    """
    from fedlora.laws import method_check

    with entered("check_method", MethodCheckConfig, promises, progress=True):
        return method_check.check_method(method, options=options, **promises)
