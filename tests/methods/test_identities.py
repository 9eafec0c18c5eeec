"""Every mode is held to its row of method_properties.py."""

from dataclasses import replace

import pytest
import torch
from kinds_of_memory import one_of_each_kind
from method_properties import PROPERTIES
from paper_laws import check_control_of_the_absent, check_controls, check_own_models, check_pull, check_turns

from fedlora.laws import aggregation_laws, run_laws
from fedlora.laws.aggregation_laws import check_ranks
from fedlora.laws.federation_of_one_round import close
from fedlora.laws.linear_federation import Federation
from fedlora.laws.measures import near
from fedlora.methods.choosing import load_method
from fedlora.methods.fedavg import FedAvg
from fedlora.methods.table import METHODS


def test_every_mode_has_its_row():
    assert PROPERTIES.keys() == METHODS.keys()


@pytest.mark.parametrize("mode", METHODS)
def test_a_mode_keeps_its_promises_in_an_aggregation(mode, subtests):
    hold_to(mode, aggregation_laws.EVERY_AGGREGATION, aggregation_laws.WHY_NOT, subtests)


@pytest.mark.parametrize("mode", one_of_each_kind(METHODS))
def test_a_mode_keeps_its_promises_in_a_run(mode, subtests):
    hold_to(mode, run_laws.EVERY_RUN, run_laws.WHY_NOT, subtests)


def hold_to(mode, checks, why_not, subtests):
    """Every law that is about this method, one subtest each."""
    row = PROPERTIES[mode]
    made = load_method(mode).with_values(row.settings)
    for check in checks:
        if check not in why_not or not why_not[check](made, row):
            with subtests.test(check.__name__):
                check(made, row)


@pytest.mark.parametrize("mode", METHODS)
def test_a_row_says_what_the_code_says(mode):
    row, method = PROPERTIES[mode], load_method(mode)
    assert method.has_global_model == row.has_global
    assert method.server.fewest_clients == row.fewest
    if method.order == "parallel":
        assert method.weighs_rows == row.is_weighted


def test_control_variates_are_option_ii_and_their_mean():
    check_controls(load_method("scaffold"), PROPERTIES["scaffold"])
    check_control_of_the_absent(load_method("scaffold"), PROPERTIES["scaffold"])


def test_the_pull_is_the_paper_s():
    check_pull(load_method("fedprox"), PROPERTIES["fedprox"])


@pytest.mark.parametrize("mode", [name for name, row in PROPERTIES.items() if row.has_own_model])
def test_own_models_are_the_papers_and_stay_where_they_are(mode):
    check_own_models(load_method(mode), PROPERTIES[mode])


def test_fedrot_never_reflects():
    check_turns(load_method("fedrot"), PROPERTIES["fedrot"])


def test_with_equal_rows_control_variates_change_nothing():
    """Nobody drifts from anybody, so the way is FedAvg's."""
    found = Federation(load_method("scaffold"), owner=lambda _: 3).run((1, 2, 3)).state.adapter
    near(found, Federation(load_method("homo"), owner=lambda _: 3).run((1, 2, 3)).state.adapter, "equal rows")


def test_the_order_of_clients_matters_where_it_should():
    straight, turned = (
        Federation(load_method("seq"), owner=lambda k, sign=sign: 3 + sign * k).run((1,)) for sign in (1, -1)
    )
    assert not close(straight.state.adapter, turned.state.adapter, 1e-4)


class Padding(FedAvg):
    """Smaller factors filled up with zeros."""

    def aggregate(self, state, updates, context):
        def fill(key, value):
            wide = torch.zeros_like(state.adapter[key])
            wide[: value.shape[0], : value.shape[1]] = value
            return wide

        padded = [replace(one, upload={key: fill(key, v) for key, v in one.upload.items()}) for one in updates]
        return super().aggregate(state, padded, context)


def test_a_server_may_take_smaller_ranks():
    mode, row = replace(load_method("homo"), server=Padding()), replace(PROPERTIES["homo"], ranks="product")
    check_ranks(mode, row)
    with pytest.raises(AssertionError):
        check_ranks(mode, PROPERTIES["homo"])
