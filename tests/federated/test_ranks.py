"""Ranks that differ by client: cutting and padding, means of padded adapters, HetLoRA's weights and pruning."""

import math

import pytest
import torch

from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.federated.adapters import shapes_of
from fedlora.federated.ranks import (
    cut_like,
    cut_rank,
    pad_like,
    padded_mean,
    product_norm,
    rank_in,
    rank_of_adapter,
    shapes_at,
    tail_norm,
)
from fedlora.federated.validation import find_update_fault
from fedlora.laws.federation_of_one_round import LAYERS, adapter, aggregate, close, context, product, update
from fedlora.methods.choosing import choose_method
from fedlora.methods.fedavg import FedAvg
from fedlora.methods.hetlora import HetLora, PruneAndSend, TailPenalty
from fedlora.methods.local_only import NoServer
from fedlora.methods.table import METHODS
from fedlora.methods.zero_padding import ZeroPadding
from fedlora.types import ClientMemory, ClientUpdate, Download, LocalResult, ServerState, TrainTask

RANKS = (4, 3, 2, 4)
ROWS = [5, 2, 9, 1]


def clients(seed: int = 10) -> list:
    return [adapter(seed + index, rank) for index, rank in enumerate(RANKS)]


def pad_rank(state, rank: int):
    """The same update with a larger rank: rows of zeros in A, columns of zeros in B."""
    shapes = shapes_at(shapes_of(state), rank)
    return pad_like(state, {key: value.new_empty(shapes[key]) for key, value in state.items()})


def pads(states, rank: int = 4) -> list:
    return [pad_rank(state, rank) for state in states]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_cutting_what_was_padded_gives_it_back_and_padding_keeps_the_product(rank):
    state = adapter(1, rank)
    padded = pad_rank(state, 5)
    assert shapes_of(padded) == shapes_at(shapes_of(state), 5)
    assert close(cut_rank(padded, rank), state, 0.0)
    for layer in LAYERS:
        assert torch.equal(product(padded, layer), product(state, layer))
    assert cut_rank(state, rank) is state
    assert close(cut_like(padded, state), state, 0.0)


def test_an_adapter_has_one_rank_even_where_a_layer_is_as_thin():
    assert rank_of_adapter(adapter(0, 2)) == 2
    mixed = {**shapes_of(adapter(0, 2)), "thin.lora_A.weight": (3, 2)}
    with pytest.raises(ValueError, match="one rank"):
        rank_in(mixed)


def test_rows_that_fewer_clients_have_are_diluted_unless_their_participants_divide():
    """Rows of mean 3 that 4, 3 and 2 of 4 clients have, by the methods page: 2.97, 2.18, 1.44 of clients' 2.97, 2.91,
    2.88."""
    values = [[2.97, 2.9066666666666667, 2.88], [2.97, 2.9066666666666667, 2.88], [2.97, 2.9066666666666667], [2.97]]
    states = [
        {
            "l.lora_A.weight": torch.tensor(rows, dtype=torch.float64)[:, None],
            "l.lora_B.weight": torch.tensor(rows, dtype=torch.float64)[None],
        }
        for rows in values
    ]
    like = pad_rank(states[-1], 3)
    diluted = padded_mean([(state, 1.0) for state in states], like, participants=False)
    whole = padded_mean([(state, 1.0) for state in states], like, participants=True)
    for found, expected in ((diluted, [2.97, 2.18, 1.44]), (whole, [2.97, 2.9066666666666667, 2.88])):
        assert found["l.lora_A.weight"][:, 0].tolist() == pytest.approx(expected, abs=1e-12)
        assert found["l.lora_B.weight"][0].tolist() == pytest.approx(expected, abs=1e-12)


def test_zero_padding_is_the_mean_of_padded_adapters_weighted_by_rows():
    found = aggregate(ZeroPadding(RANKS), ServerState(adapter(0, 4)), clients(), ROWS).adapter
    expected = aggregate(FedAvg(), ServerState(adapter(0, 4)), pads(clients()), ROWS).adapter
    assert close(found, expected, 1e-12)


@pytest.mark.parametrize("normalisation", ["all", "participants"])
def test_with_equal_ranks_zero_padding_is_fedavg_to_the_bit(normalisation):
    sent = [adapter(seed, 2, dtype=torch.float32) for seed in range(4)]
    state = ServerState(adapter(9, 2, dtype=torch.float32))
    found = aggregate(ZeroPadding(rank_normalisation=normalisation), state, sent, ROWS).adapter
    assert close(found, aggregate(FedAvg(), state, sent, ROWS).adapter, 0.0)


def test_participants_divide_by_the_rows_of_those_who_have_a_direction():
    sent, state = clients(), ServerState(adapter(0, 4))
    found = aggregate(ZeroPadding(RANKS, rank_normalisation="participants"), state, sent, ROWS).adapter
    key = "wide.lora_A.weight"
    for row in range(4):
        having = [(one[key][row], rows) for one, rows in zip(sent, ROWS, strict=True) if len(one[key]) > row]
        expected = sum(value * rows for value, rows in having) / sum(rows for _, rows in having)
        assert torch.allclose(found[key][row], expected, atol=1e-12)


@pytest.mark.parametrize("normalisation", ["all", "participants"])
@pytest.mark.parametrize("strategy", [ZeroPadding, HetLora])
def test_a_direction_that_nobody_of_a_round_has_stays_and_does_not_die(strategy, normalisation):
    server = strategy(RANKS, rank_normalisation=normalisation)
    state = server.init(adapter(0, 4), range(4))
    found = server.aggregate(state, [update(2, adapter(1, 2))], context()).adapter
    assert torch.equal(found["wide.lora_A.weight"][2:], state.adapter["wide.lora_A.weight"][2:])
    assert torch.equal(found["wide.lora_B.weight"][:, 2:], state.adapter["wide.lora_B.weight"][:, 2:])
    assert torch.allclose(found["wide.lora_A.weight"][:2], adapter(1, 2)["wide.lora_A.weight"], atol=1e-15)


@pytest.mark.parametrize("strategy", [ZeroPadding(RANKS), HetLora(RANKS), NoServer(RANKS)], ids=str)
def test_a_client_gets_the_first_directions_and_the_server_s_stay(strategy):
    start = adapter(0, 4)
    state = strategy.init(start, range(4))
    for client, rank in enumerate(RANKS):
        assert close(strategy.broadcast(state, client, 1).adapter, cut_rank(start, rank), 0.0)
    assert rank_of_adapter(state.adapter) == 4


def test_what_does_not_fit_is_not_averaged():
    like = adapter(0, 2)
    for wrong in (adapter(1, 3), {key: value.T for key, value in adapter(1, 2).items()}):
        with pytest.raises(ValueError, match=r"fit|rank"):
            padded_mean([(wrong, 1.0)], like, participants=False)
    with pytest.raises(ValueError, match="keys"):
        padded_mean([({"other": torch.zeros(2, 2)}, 1.0)], like, participants=False)
    with pytest.raises(ValueError, match="weight"):
        padded_mean([(like, -1.0)], like, participants=False)


def test_norms_from_factors_are_those_of_the_dense_products():
    for rank in (1, 2, 5):
        state = adapter(rank, rank)
        dense = math.sqrt(sum(float(product(state, layer).square().sum()) for layer in LAYERS))
        assert product_norm(state) == pytest.approx(dense, rel=1e-12)
    state = adapter(3, 4)
    tails = [
        float(state[f"{layer}.lora_A.weight"][3:].norm() * state[f"{layer}.lora_B.weight"][:, 3:].norm())
        for layer in LAYERS
    ]
    assert tail_norm(state, 3) == pytest.approx(sum(tails), rel=1e-12)


def test_hetlora_weighs_by_the_norm_of_the_product_not_by_rows():
    sent, start = clients(), adapter(0, 4)
    server = HetLora(RANKS)
    found = aggregate(server, server.init(start, range(4)), sent, ROWS).adapter
    norms = [product_norm(state) for state in sent]
    padded = pads(sent)
    for key in start:
        expected = sum(norm * state[key] for norm, state in zip(norms, padded, strict=True)) / sum(norms)
        assert torch.allclose(found[key], expected, atol=1e-12)


def test_where_every_product_is_zero_hetlora_weighs_all_the_same_and_a_zero_one_not_at_all():
    zero = {key: value * (".lora_A." in key) for key, value in adapter(1, 4).items()}
    other = {key: value * (".lora_A." in key) for key, value in adapter(2, 4).items()}
    server = HetLora()
    state = server.init(adapter(0, 4), range(2))
    assert close(
        aggregate(server, state, [zero, other]).adapter, padded_mean([(zero, 1), (other, 1)], zero, participants=False)
    )
    assert close(aggregate(server, state, [zero, adapter(3, 4)]).adapter, adapter(3, 4), 1e-12)


def trained_from(start, tail: float, rank: int):
    """The adapter with its last directions, from `rank` on, times `tail`."""
    return {
        key: torch.cat([value[:rank], tail * value[rank:]])
        if ".lora_A." in key
        else torch.cat([value[:, :rank], tail * value[:, rank:]], dim=1)
        for key, value in start.items()
    }


@pytest.mark.parametrize(("tail", "rank"), [(0.9, 3), (1.0, 4), (1.1, 4)])
def test_a_tail_that_shrank_is_given_up(tail, rank):
    rule, start = PruneAndSend(), adapter(0, 4)
    (phase,) = rule.phases(Download(start), ClientMemory())
    assert phase.terms == (TailPenalty(1e-3, 3),)
    kept = ClientMemory(optimizer={"x": torch.zeros(1)})
    upload, memory = rule.upload([LocalResult(trained_from(start, tail, 3))], Download(start), kept)
    assert rank_of_adapter(upload.adapter) == rank
    assert (memory.optimizer is None) == (rank == 3)


@pytest.mark.parametrize(
    ("share", "rank", "kept"), [(0.99, 8, 7), (0.5, 8, 4), (0.99, 1, 1), (0.9, 10, 9), (1.0, 8, 8), (0.01, 4, 1)]
)
def test_pruning_leaves_whole_directions_and_at_least_one(share, rank, kept):
    assert PruneAndSend(prune_to=share).kept_rank(rank) == kept


def test_a_pruned_rank_stays_and_never_grows():
    server, rule = HetLora(RANKS), PruneAndSend()
    state = server.init(adapter(0, 4), range(4))
    seen = []
    for number in range(1, 5):
        updates = []
        for client in (0, 1):
            download = server.broadcast(state, client, number)
            rank = rank_of_adapter(download.adapter)
            result = trained_from(download.adapter, 0.5 if client == 0 else 2.0, rule.kept_rank(rank))
            upload, _ = rule.upload([LocalResult(result)], download, ClientMemory())
            updates.append(update(client, upload.adapter))
        state = server.aggregate(state, updates, context(number, 4))
        seen.append(state.slots["ranks"]["clients"].tolist())
    # rank 1 has no tail; who was not asked, or has grown, keeps what it had
    assert seen == [[3, 3, 2, 4], [2, 3, 2, 4], [1, 3, 2, 4], [1, 3, 2, 4]]
    assert state.notes == {"mean_client_rank": 2.5}
    state = server.aggregate(state, [update(0, adapter(5, 4))], context(5, 4))
    assert state.slots["ranks"]["clients"].tolist() == [1, 3, 2, 4]


METRICS = {"loss": 1.0, "num_response_tokens": 5, "update_norm": 1.0}


def fault_of(sent, own_rank: int, *, may_be_smaller: bool = False) -> str | None:
    own = {key: value.float() for key, value in adapter(0, own_rank).items()}
    task = TrainTask("t", 1, 0, 0, (0,), Download(own))
    sent = {key: value.float() for key, value in sent.items()}
    answer = ClientUpdate("t", 1, 0, sent, ClientMemory(), 5, 5, 5, "", METRICS)
    return find_update_fault(answer, task, shapes_of(adapter(0, 4)), may_be_smaller=may_be_smaller)


def test_an_update_has_the_rank_that_its_client_was_given():
    assert fault_of(adapter(1, 2), 2) is None
    for rank in (1, 3, 4):
        assert "has shape" in fault_of(adapter(1, rank), 2)
    assert "has shape" in fault_of({key: value.T for key, value in adapter(1, 2).items()}, 2)


def test_where_a_client_may_prune_its_update_may_be_smaller_in_all_layers_alike():
    for rank in (1, 2, 3):
        assert fault_of(adapter(1, rank), 3, may_be_smaller=True) is None
    assert "has shape" in fault_of(adapter(1, 4), 3, may_be_smaller=True)
    mixed = {**adapter(1, 2), **{key: value for key, value in adapter(1, 3).items() if "wide" in key}}
    assert "has shape" in fault_of(mixed, 3, may_be_smaller=True)
    empty = {key: value.narrow(1 if ".lora_B." in key else 0, 0, 0) for key, value in adapter(1, 3).items()}
    assert "has shape" in fault_of(empty, 3, may_be_smaller=True)


ABLE = {"none", "zeropad", "hetlora", "flexlora", "flora"}


def test_ranks_are_taken_where_they_can_be_and_refused_with_the_reason_elsewhere(subtests):
    for mode in METHODS:
        with subtests.test(mode):
            given = {"federation_mode": mode, "lora_r": 8, "num_clients": 4, "client_ranks": "8,4x2,1"}
            if mode in ABLE:
                assert choose_method(TrainConfig.of(**given)).server.client_ranks == (8, 4, 4, 1)
                continue
            with pytest.raises(UsageError, match="one rank") as caught:
                TrainConfig.of(**given)
            assert all(name in caught.value.hint for name in ABLE)


@pytest.mark.parametrize(
    ("given", "ranks"),
    [("8,4,2", (8, 4, 2)), ("8x2,1", (8, 8, 1)), ([8, "4x2"], (8, 4, 4)), (3, (3,)), ("", None), (None, None)],
)
def test_ranks_have_a_short_form(given, ranks):
    assert TrainConfig.of(federation_mode="zeropad", client_ranks=given, lora_r=8).client_ranks == ranks


@pytest.mark.parametrize("given", ["8,0", "9", "4x0", "4xmany", "x3", "4.5", "-1", "2x99999999"])
def test_what_is_no_rank_of_this_adapter_is_refused(given):
    with pytest.raises(UsageError, match="client_ranks"):
        TrainConfig.of(federation_mode="zeropad", client_ranks=given, lora_r=8)


def test_every_client_needs_its_rank():
    with pytest.raises(UsageError, match="names 3 ranks, but there are 4 clients"):
        choose_method(TrainConfig.of(federation_mode="zeropad", num_clients=4, client_ranks="4,2,1"))


def test_ranks_are_part_of_what_a_run_is():
    plain, ranked = (TrainConfig.of(federation_mode="zeropad", client_ranks=ranks) for ranks in (None, "4x8"))
    assert plain.identity() != ranked.identity()
