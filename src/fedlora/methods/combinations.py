"""What cannot be combined with a method, from the facts of its row: refused before a model is loaded, with the reason.

No torch. Noise on the wrong sum, or steps that are not counted, would give a wrong epsilon; so everything that depends
on a fact is refused if a row does not state it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedlora.errors import UsageError
from fedlora.methods.row import Method, ServerSees
from fedlora.methods.table import METHODS
from fedlora.plain_text import counted

if TYPE_CHECKING:
    from fedlora.config.train import TrainConfig

UNSTATED = "its author has not stated what that depends on"
_HIDES: Mapping[ServerSees | None, str] = {
    None: UNSTATED,
    "nothing": "it combines nothing, so there is no sum to add noise to",
    "mean and more": "it sends two vectors, an update and a control, and one clip bounds only one of them",
    "mean of products": "it sums products of single clients' factors, and noise on the sum of factors would not hide "
    "them",
    "mean of several shapes": "it sums products or factors of several shapes, and the noise of one clip belongs to a "
    "sum of one shape",
    "single updates": "it looks at single updates, and noise on their sum would not hide them",
}


def check_configuration(config: TrainConfig) -> None:
    """UsageError for options, limits, moments, ranks and privacy that do not fit the configuration's method."""
    _check_options(config)
    _check_ranks_may_differ(config)
    _check_order(config)
    _check_limits(config)
    _check_moments(config)
    check_privacy(config)


def check_ranks(config: TrainConfig) -> None:
    """UsageError where there are not as many ranks as clients; `num_clients` is that of the data."""
    if config.client_ranks is not None and len(config.client_ranks) != config.num_clients:
        raise UsageError(
            f"client_ranks names {counted(len(config.client_ranks), 'rank')}, but there are "
            f"{counted(config.num_clients, 'client')}",
            hint="give one rank a client, in the order of their numbers; 4x3 stands for 4,4,4",
        )


def check_privacy(config: TrainConfig) -> None:
    """UsageError for privacy flags that do not fit the method, each other, or other flags."""
    is_client = config.dp_noise_multiplier is not None
    is_example = config.dp_example_noise_multiplier is not None
    _check_pairs(config)
    if is_client and is_example:
        _refuse("dp_noise_multiplier and dp_example_noise_multiplier are two guarantees", "a run accounts for one")
    if is_client:
        _refuse_method(config, "client-level privacy", why_not_client_level(config.method))
        _check_client_level(config)
    elif is_example:
        _refuse_method(config, "example-level privacy", why_not_example_level(config.method))
        if config.group_by_length:
            _refuse("group_by_length=true", "a lot is a random sample of a client's rows, whatever their length")
    elif config.max_epsilon is not None:
        _refuse("max_epsilon", "without dp_noise_multiplier or dp_example_noise_multiplier there is no epsilon")
    if config.max_epsilon is not None and 0.0 in (config.dp_noise_multiplier, config.dp_example_noise_multiplier):
        _refuse("max_epsilon with a noise multiplier of 0", "without noise no epsilon is finite")


def why_not_client_level(method: Method) -> str | None:
    """Why noise on the sum of its clients' updates does not hide a client, None where it does."""
    if method.order == "chain":
        return "it passes one client's adapter to the next, so there is no sum to add noise to"
    if method.pools_rows:
        return "it trains on the rows of all clients at once, so there is no client to hide"
    reason = None if method.server_sees == "mean" else _HIDES[method.server_sees]
    return _unless_false(method.asks_everybody, "it asks everybody in its last rounds, drawn or not") or reason


def why_not_example_level(method: Method) -> str | None:
    """Why the privacy of its clients' rows is not what is accounted for, None where it is."""
    if method.pools_rows:
        return "it trains on rows of several clients at once, and each client keeps a budget of its own"
    if method.trains != "once":
        return "it trains twice on a client's rows in a round, of which one is counted" if method.trains else UNSTATED
    return None


def why_not_reaggregated(method: Method) -> str | None:
    """Why its stored updates cannot be aggregated otherwise, None where they can."""
    if not method.combines:
        return "its clients send nothing"
    if method.order == "chain":
        return "each client starts from what the one before left, so nothing else can be made of one update"
    if method.pools_rows:
        return "one trainer has everybody's rows, and there is one update"
    reason = (
        _unless_false(method.adds_to_base, "its updates stand on what each round before added to the base")
        or _unless_false(
            method.ranks_may_differ, "its clients may send different ranks, which other servers do not take"
        )
        or _unless_false(method.asks_everybody, "in its last rounds nothing is sent")
    )
    if reason is None and method.has_global_model is not True:
        return "clients keep a part of what they train, and there is no global model"
    if reason is None and method.server_sees == "mean and more":
        return "its updates carry control variates, which another cohort or other weights would contradict"
    return reason or (None if method.server_sees in ("mean", "single updates") else UNSTATED)


def why_not_server_of(target: Method, source: Method) -> str | None:
    """Why the server of `target` cannot take the updates of a run of `source`, None where it can."""
    if target.is_server_side or (target.name == source.name and target.server_sees == "mean"):
        return None
    return why_not_reaggregated(target) or "what it changes is how clients train, and these updates are trained already"


def _check_options(config: TrainConfig) -> None:
    method, given = config.method, config.method_options
    name = f"federation_mode={method.name}"
    known = {option.name for option in method.options}
    if foreign := sorted(given.keys() - known):
        hint = f"its own are {', '.join(sorted(known))}" if known else "it has none of its own"
        raise UsageError(f"{name} has no {', '.join(foreign)}", hint=hint)
    values = method.values(given)
    for option in method.options:
        value = values[option.name]
        if option.below and value >= (most := getattr(config, option.below)):
            raise UsageError(
                f"{name}: {option.name}={value} is not below {option.below}={most}",
                hint=f"lower --{option.name} or raise --{option.below}",
            )
        if option.at_least and value < (least := getattr(config, option.at_least)):
            raise UsageError(
                f"{option.name}={value} is below {option.at_least}={least}: not even the clients' rank would fit",
                hint=f"raise --{option.name}",
            )


def _check_ranks_may_differ(config: TrainConfig) -> None:
    if config.client_ranks is not None and not config.method.ranks_may_differ:
        able = ", ".join(row.name for row in METHODS.values() if row.ranks_may_differ)
        raise UsageError(
            f"federation_mode={config.federation_mode} combines factors of one shape, so all clients have one rank",
            hint=f"leave --client_ranks out, or take a method for different ranks: {able}",
        )


def _check_order(config: TrainConfig) -> None:
    if config.seq_order != "by_id" and config.method.order != "chain":
        chains = " and ".join(row.name for row in METHODS.values() if row.order == "chain")
        raise UsageError(f"seq_order applies to federation_mode={chains} only", hint="leave --seq_order out")


def _check_limits(config: TrainConfig) -> None:
    method = config.method
    name = f"federation_mode={method.name}"
    if not config.limits_clients:
        return
    if not method.combines:
        raise UsageError(f"{name} combines nothing", hint="leave max_update_norm and max_client_weight out")
    if method.order != "parallel" and (config.max_update_norm_ratio or config.max_client_weight < 1):
        raise UsageError(
            f"{name} takes one update after another, so there is no median norm and no share of weights",
            hint="use max_update_norm",
        )
    if config.max_client_weight < 1 and not method.counts_rows(config.method_options):
        raise UsageError(
            f"{name} gives every client the same weight, or one that rows do not decide",
            hint="leave --max_client_weight out",
        )
    if method.server_sees == "mean and more":
        raise UsageError(
            f"{name} sends more than an adapter, and a limit on the adapter alone would not hold",
            hint="leave max_update_norm, max_update_norm_ratio and max_client_weight out",
        )
    if method.server_sees is None:
        raise UsageError(f"limits on clients are not supported with {name}: {UNSTATED}", hint="leave them out")


def _check_moments(config: TrainConfig) -> None:
    method = config.method
    if config.optimizer_state != "keep":
        return
    twice = None if method.trains is None else method.trains == "twice"
    reason = _unless_false(
        method.rewrites_factors, "it hands out other factors than a client left, so kept moments would mean nothing"
    ) or _unless_false(twice, "it trains two adapters of a client, and one's moments are not the other's")
    if reason is not None:
        raise UsageError(
            f"optimizer_state=keep is not supported with federation_mode={method.name}: {reason}",
            hint="leave --optimizer_state at reset",
        )


def _check_pairs(config: TrainConfig) -> None:
    for noise, clip in (("dp_noise_multiplier", "dp_clip"), ("dp_example_noise_multiplier", "dp_example_clip")):
        if (getattr(config, noise) is None) != (getattr(config, clip) is None):
            given, missing = (noise, clip) if getattr(config, clip) is None else (clip, noise)
            raise UsageError(
                f"{given} without {missing}: noise means something only beside the bound that it is a multiple of",
                hint=f"give --{missing} too, or leave both out",
            )


def _check_client_level(config: TrainConfig) -> None:
    if config.client_selection_strategy != "random":
        _refuse(
            f"client_selection_strategy={config.client_selection_strategy} with client-level privacy",
            "every client is drawn with probability client_selection_frac, in secret; 1 takes all",
        )
    if config.limits_clients:
        _refuse(
            "max_update_norm, max_update_norm_ratio or max_client_weight with client-level privacy",
            "dp_clip already bounds every update, all weigh the same, and a bound that depends on the cohort leaks it",
        )
    if config.min_clients > 1:
        _refuse(
            f"min_clients={config.min_clients} with client-level privacy",
            "a Poisson cohort has any size, and a run that stops at small ones reveals them",
        )


def _refuse_method(config: TrainConfig, what: str, reason: str | None) -> None:
    if reason is not None:
        _refuse(f"{what} with federation_mode={config.federation_mode}", reason)


def _refuse(what: str, reason: str) -> None:
    raise UsageError(f"{what} is not supported: {reason}", hint="see docs/privacy.md")


def _unless_false(fact: bool | None, reason: str) -> str | None:
    """None where a fact is stated to be false, else why it refuses."""
    return None if fact is False else reason if fact else UNSTATED
