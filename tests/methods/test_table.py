"""The rows of the table against the code that they describe, and what follows from a fact that is not stated."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from fedlora.config.train import TrainConfig
from fedlora.engines.cohorts import find_cohort_doubts
from fedlora.errors import UsageError
from fedlora.laws.federation_of_one_round import LAYERS, adapter
from fedlora.methods.choosing import OF_THE_RUN, choose_method, load_method
from fedlora.methods.combinations import (
    UNSTATED,
    check_configuration,
    why_not_client_level,
    why_not_example_level,
    why_not_reaggregated,
)
from fedlora.methods.table import METHODS, find_method
from fedlora.types import ClientMemory, ServerState


def test_every_option_is_a_field_of_a_half_with_the_same_default_and_no_field_is_without_an_option():
    for name, row in METHODS.items():
        method = load_method(name)
        own = {
            field.name: getattr(type(half)(), field.name)
            for half in (method.server, method.client)
            for field in fields(half)
            if field.name not in OF_THE_RUN
        }
        assert own == {option.name: option.default for option in row.options}, name
        assert method.hyperparameters.items() >= own.items(), name


def test_an_option_has_one_meaning_whatever_method_has_it():
    seen = {}
    for row in METHODS.values():
        for option in row.options:
            same = seen.setdefault(option.name, option)
            assert replace(option, default=same.default) == same, option.name


def test_the_facts_of_a_row_are_what_its_halves_do():
    start = adapter(0)
    for name, row in METHODS.items():
        method = load_method(name, {"num_communication_rounds": 3, "personal_rounds": 1})
        state = method.server.init(start, (0, 1, 2))
        download = method.server.broadcast(state, 0, 1)
        assert row.has_global_model == (method.server.global_adapter(ServerState({})) is not None), name
        assert row.keeps_personal_model == (method.client.own_ranks > 0), name
        assert row.ranks_may_differ == hasattr(method.server, "client_ranks"), name
        assert row.adds_to_base == (state.base is not None), name
        assert (row.server_sees == "mean and more") == bool(method.client.sends), name
        assert row.asks_everybody == any(method.server.asks_everybody(number) for number in (1, 2, 3)), name
        assert row.num_trainings == len(method.client.phases(download, ClientMemory())), name
        assert (row.server_sees == "nothing") == (download.shared is None), name
    assert LAYERS


def test_nothing_is_assumed_of_a_method_whose_row_does_not_say_it():
    bare = replace(
        METHODS["homo"],
        server_sees=None,
        rewrites_factors=None,
        trains=None,
        ranks_may_differ=None,
        asks_everybody=None,
        adds_to_base=None,
        rows_weigh=None,
    )
    assert why_not_client_level(bare) == why_not_example_level(bare) == why_not_reaggregated(bare) == UNSTATED
    flags = (
        {"max_update_norm": 1.0},
        {"max_client_weight": 0.5},
        {"optimizer_state": "keep"},
        {"client_ranks": "8,4x7", "lora_r": 8},
    )

    class Bare(TrainConfig):
        @property
        def method(self):
            return bare

    check_configuration(Bare.of())
    for given in flags:
        TrainConfig.of(**given, federation_mode="homo" if "client_ranks" not in given else "zeropad")
        with pytest.raises(UsageError):
            Bare.of(**given)


def test_a_name_that_is_no_method_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="'fedproxx' is not a method") as caught:
        find_method("fedproxx")
    assert caught.value.hint == "did you mean fedprox?"
    with pytest.raises(UsageError, match="is not a method"):
        TrainConfig.of(federation_mode="zzz")


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"federation_mode": "fedprox", "proximal_mu": -1}, "proximal_mu=-1: .*greater than or equal to 0"),
        ({"federation_mode": "fedprox", "proximal_mu": "much"}, "proximal_mu='much': .*valid number"),
        ({"federation_mode": "fedavgm", "server_momentum": 1}, "server_momentum=1: .*less than 1"),
        ({"federation_mode": "krum", "num_hostile": 1.5}, "num_hostile=1.5"),
        ({"federation_mode": "zeropad", "rank_normalisation": "some"}, "rank_normalisation='some'"),
        ({"method_options": {"speed": 1}}, "speed is not an option"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_its_name(given, what):
    with pytest.raises(UsageError, match=what):
        TrainConfig.of(**given)


def test_flat_names_and_method_options_are_the_same_configuration():
    flat = TrainConfig.of(federation_mode="fedprox", proximal_mu="0.5")
    nested = TrainConfig.of(federation_mode="fedprox", method_options={"proximal_mu": 0.5})
    assert flat == nested
    assert flat.record()["proximal_mu"] == 0.5
    assert TrainConfig.of(**flat.record()) == flat
    assert TrainConfig.of(federation_mode="fedprox", proximal_mu=None) == TrainConfig.of(federation_mode="fedprox")


def test_a_robust_run_from_before_the_smallest_cohorts_were_enforced_goes_on_as_it_began_and_says_so():
    config, clients = TrainConfig.of(federation_mode="multi_krum", client_selection_frac=1.0), range(5)
    old = choose_method(config, {"num_hostile": 1, "krum_selected": 5})
    assert old.hyperparameters == {"num_hostile": 1, "krum_selected": 5, "is_guarded": False}
    # what it records itself is read back to the same
    assert choose_method(config, old.hyperparameters).hyperparameters == old.hyperparameters
    assert ["could combine all clients" in what for what, _ in find_cohort_doubts(config, old, clients)] == [True]
    new = choose_method(config)
    assert choose_method(config, new.hyperparameters).hyperparameters["is_guarded"] is True
    assert not list(find_cohort_doubts(config, new, clients))


def test_a_run_that_is_gone_on_with_keeps_the_hyperparameters_it_was_started_with():
    config = TrainConfig.of(federation_mode="fedprox")
    assert choose_method(config, {"proximal_mu": 7.0}).hyperparameters == {"proximal_mu": 7.0}
    given = TrainConfig.of(federation_mode="fedprox", proximal_mu=0.5)
    assert choose_method(given, {"proximal_mu": 7.0}).hyperparameters == {"proximal_mu": 0.5}


def test_the_identity_of_a_run_is_what_it_was_when_options_were_fields():
    identity = TrainConfig.of().identity()
    assert identity["proximal_mu"] is None
    assert "exp_name" not in identity
    assert TrainConfig.of(federation_mode="fedprox", proximal_mu=1).identity()["proximal_mu"] == 1.0
