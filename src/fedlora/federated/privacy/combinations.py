"""Which methods can be private, and what cannot be combined with privacy, with the reason.

Both tables name what was looked at: a mode that is in neither of a kind's lists is refused, for noise on the wrong sum
or steps that nobody counts give an epsilon that is not true.
"""

from __future__ import annotations

from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError

CLIENT_LEVEL = frozenset(
    {
        *("homo", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "diloco", "fedprox"),
        *("ffa", "rolora", "fedsvd", "fedrot", "fedsa", "ditto", "feddpa"),
    }
)
"""Modes whose server looks at the clients' updates through one mean only, and whose clients send one adapter."""

_ONE_BY_ONE = "looks at single updates, and noise on their sum would not hide them"
_RANKS = "sums products or factors of several shapes, and the noise of one clip belongs to a sum of one shape"
_PRODUCTS = "sums products of single clients' factors, and noise on the sum of factors would not hide them"
NOT_CLIENT_LEVEL = {
    "seq": "passes one client's adapter to the next, so there is no sum to add noise to",
    "none": "combines nothing, so there is no sum to add noise to",
    "pooled": "trains on the rows of all clients at once, so there is no client to hide",
    "finetune": "asks everybody in its last rounds, drawn or not",
    "scaffold": "sends two vectors, an update and a control, and one clip bounds only one of them",
    **dict.fromkeys(("fedex", "flora"), _PRODUCTS),
    **dict.fromkeys(("zeropad", "hetlora", "flexlora"), _RANKS),
    **dict.fromkeys(("median", "trimmed_mean", "krum", "multi_krum", "geometric_median"), _ONE_BY_ONE),
}
_TWICE = "trains twice on a client's rows in a round, of which one is counted"
NOT_EXAMPLE_LEVEL = {
    "pooled": "trains on rows of several clients at once, and each client keeps a budget of its own",
    **dict.fromkeys(("ditto", "feddpa"), _TWICE),
}
EXAMPLE_LEVEL = (CLIENT_LEVEL | NOT_CLIENT_LEVEL.keys()) - NOT_EXAMPLE_LEVEL.keys()
"""Modes whose clients train once in a round on rows of their own."""


def check_privacy(config: TrainConfig) -> None:
    """UsageError for privacy flags that do not fit the mode, each other, or other flags."""
    is_client = config.dp_noise_multiplier is not None
    is_example = config.dp_example_noise_multiplier is not None
    _check_pairs(config)
    if is_client and is_example:
        _refuse("dp_noise_multiplier and dp_example_noise_multiplier are two guarantees", "a run accounts for one")
    if is_client:
        _check_mode(config, CLIENT_LEVEL, NOT_CLIENT_LEVEL, "client-level privacy")
        _check_client_level(config)
    elif is_example:
        _check_mode(config, EXAMPLE_LEVEL, NOT_EXAMPLE_LEVEL, "example-level privacy")
        if config.group_by_length:
            _refuse("group_by_length=true", "a lot is a random sample of a client's rows, whatever their length")
    elif config.max_epsilon is not None:
        _refuse("max_epsilon", "without dp_noise_multiplier or dp_example_noise_multiplier there is no epsilon")
    if config.max_epsilon is not None and 0.0 in (config.dp_noise_multiplier, config.dp_example_noise_multiplier):
        _refuse("max_epsilon with a noise multiplier of 0", "without noise no epsilon is finite")


def _check_pairs(config: TrainConfig) -> None:
    for noise, clip in (("dp_noise_multiplier", "dp_clip"), ("dp_example_noise_multiplier", "dp_example_clip")):
        if (getattr(config, noise) is None) != (getattr(config, clip) is None):
            given, missing = (noise, clip) if getattr(config, clip) is None else (clip, noise)
            raise UsageError(
                f"{given} without {missing}: noise means something only beside the bound that it is a multiple of",
                hint=f"give --{missing} too, or leave both out",
            )


def _check_mode(config: TrainConfig, allowed: frozenset[str], reasons: dict[str, str], what: str) -> None:
    mode = config.federation_mode
    if mode not in allowed:
        _refuse(f"{what} with federation_mode={mode}", f"it {reasons.get(mode, 'is not among the modes that can')}")


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
            "a Poisson cohort has any size, and a run that stops at small ones tells of them",
        )


def _refuse(what: str, reason: str) -> None:
    raise UsageError(f"{what} cannot be: {reason}", hint="see the section on privacy in docs/strategies.md")
