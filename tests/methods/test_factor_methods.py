"""Methods that train, send or turn single factors."""

import pytest
import torch

from fedlora.federated.adapters import pick_half, zeros_like
from fedlora.laws.federation_of_one_round import LAYERS, adapter, aggregate, close, context, product, update
from fedlora.methods.fedavg import FedAvg, TrainAndSend
from fedlora.methods.fedprox import ProximalTraining
from fedlora.methods.fedrot import FedRot, RotateAndSend, align_factors
from fedlora.methods.fedsa import FedSa, KeepB
from fedlora.methods.one_factor import FedSvd, FfaLora, RoLora, split_products
from fedlora.methods.scaffold import CHANGE, CONTROL, ControlledTraining, Scaffold
from fedlora.types import ClientMemory, Download, LocalResult, ServerState

ROWS = [5, 2, 9]


def trained(start, half: str, seed: int):
    """What a client has after training one half, or both."""
    fresh = adapter(seed)
    return {**start, **pick_half(fresh, half)}


def mean_product(states, rows, layer):
    return sum(count * product(state, layer) for state, count in zip(states, rows, strict=True)) / sum(rows)


@pytest.mark.parametrize(("strategy", "halves"), [(FfaLora(), "BBB"), (RoLora(), "BAB"), (FedSvd(), "BBB")], ids=str)
def test_one_factor_at_a_time_is_exact_in_every_round(strategy, halves):
    state = ServerState(adapter(0))
    for number, half in enumerate(halves, start=1):
        download = strategy.broadcast(state, 0, number)
        assert (download.trainable, download.shared) == (half, half)
        clients = [trained(download.adapter, half, 100 * number + seed) for seed in range(3)]
        rule = TrainAndSend()
        uploads = [rule.upload([LocalResult(client)], download, ClientMemory())[0].adapter for client in clients]
        assert all(f".lora_{half}." in key for upload in uploads for key in upload)
        state = aggregate(strategy, state, uploads, ROWS, number)
        for layer in LAYERS:
            assert torch.allclose(product(state.adapter, layer), mean_product(clients, ROWS, layer), rtol=0, atol=1e-10)


def test_ffa_never_changes_a_and_rolora_leaves_the_other_factor_alone():
    start = adapter(0)
    state = aggregate(FfaLora(), ServerState(start), [pick_half(adapter(1), "B")])
    assert all(torch.equal(state.adapter[key], start[key]) for key in pick_half(start, "A"))
    state = aggregate(RoLora(), ServerState(start), [pick_half(adapter(1), "A")], round_number=2)
    assert all(torch.equal(state.adapter[key], start[key]) for key in pick_half(start, "B"))


def test_fedsvd_leaves_orthonormal_rows_in_a_and_skips_what_is_zero():
    state = split_products(adapter(3))
    for layer in LAYERS:
        a = state[f"{layer}.lora_A.weight"]
        assert torch.allclose(a @ a.T, torch.eye(2, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(product(state, layer), product(adapter(3), layer), atol=1e-12)
    fresh = {key: value * (".lora_A." in key) for key, value in adapter(4).items()}
    assert close(split_products(fresh), fresh, 0.0)


def test_a_rank_above_the_layer_s_own_keeps_shapes_and_product():
    state = {
        "l.lora_A.weight": torch.randn(5, 3, dtype=torch.float64),
        "l.lora_B.weight": torch.randn(4, 5, dtype=torch.float64),
    }
    split = split_products(state)
    assert {key: value.shape for key, value in split.items()} == {key: value.shape for key, value in state.items()}
    assert torch.allclose(product(split, "l"), product(state, "l"), atol=1e-12)


def test_fedsa_shares_a_and_keeps_every_client_s_own_b():
    strategy, rule = FedSa(), KeepB()
    state = ServerState(adapter(0))
    assert strategy.global_adapter(state) is None
    download = strategy.broadcast(state, 0, 1)
    uploads, memories = [], []
    for seed in (1, 2, 3):
        upload, memory = rule.upload([LocalResult(adapter(seed))], download, ClientMemory())
        assert upload is not None
        assert all(".lora_A." in key for key in upload.adapter)
        uploads.append(upload.adapter)
        memories.append(memory)
    state = aggregate(strategy, state, uploads, ROWS)
    assert all(torch.equal(state.adapter[key], value) for key, value in pick_half(adapter(0), "B").items())
    for seed, memory in zip((1, 2, 3), memories, strict=True):
        (phase,) = rule.phases(strategy.broadcast(state, 0, 2), memory)
        assert close(pick_half(phase.start, "B"), pick_half(adapter(seed), "B"), 0.0)
        assert close(pick_half(phase.start, "A"), pick_half(state.adapter, "A"), 0.0)


@pytest.mark.parametrize("by_a", [True, False])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_turning_keeps_the_product_and_comes_no_further_from_the_reference(by_a, strength):
    state, reference = adapter(1), adapter(2)
    turned = align_factors(state, reference, by_a=by_a, strength=strength)
    half = "A" if by_a else "B"

    def distance(one, layer):
        key = f"{layer}.lora_{half}.weight"
        return float((one[key] - reference[key]).norm())

    for layer in LAYERS:
        assert torch.allclose(product(turned, layer), product(state, layer), atol=1e-12)
        if strength == 1.0:
            assert distance(turned, layer) <= distance(state, layer) + 1e-12
    if strength == 0.0:
        assert close(turned, state, 1e-12)


def test_clients_that_differ_by_a_rotation_alone_are_averaged_exactly():
    """The same update in two gauges: the mean of factors is wrong, the mean of turned factors is not."""
    start = adapter(1)
    angle = torch.tensor(1.2, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    other = {key: (turn.T @ value if ".lora_A." in key else value @ turn) for key, value in start.items()}
    strategy, rule = FedRot(), RotateAndSend(rotation_strength=1.0)
    for number in (1, 2):
        download = strategy.broadcast(ServerState(start), 0, number)
        uploads = [rule.upload([LocalResult(one)], download, ClientMemory())[0].adapter for one in (start, other)]
        found = aggregate(strategy, ServerState(start), uploads).adapter
        plain = aggregate(FedAvg(), ServerState(start), [start, other]).adapter
        for layer in LAYERS:
            assert torch.allclose(product(found, layer), product(start, layer), atol=1e-10)
            assert not torch.allclose(product(plain, layer), product(start, layer), atol=1e-2)


def test_fedprox_names_the_global_adapter_as_its_anchor():
    start = adapter(0)
    (phase,) = ProximalTraining(0.3).phases(Download(start), ClientMemory())
    assert phase.proximal_mu == 0.3
    assert phase.anchor is start
    assert phase.start is start


def run_scaffold(rounds: int, cohorts, gradient, *, clients: int = 4, steps: int = 1, rate: float = 0.1):
    """SCAFFOLD with SGD on `gradient(client, x)`; returns the server's state and the clients' memories."""
    strategy, rule = Scaffold(), ControlledTraining()
    state = strategy.init({"l.lora_B.weight": torch.ones(2, 1, dtype=torch.float64)}, range(clients))
    memories = [ClientMemory() for _ in range(clients)]
    for number in range(1, rounds + 1):
        updates = []
        for client in cohorts(number):
            download = strategy.broadcast(state, client, number)
            (phase,) = rule.phases(download, memories[client])
            place, seen = phase.start["l.lora_B.weight"].clone(), []
            for _ in range(steps):
                seen.append(gradient(client, place))
                place = place - rate * (seen[-1] + phase.correction["l.lora_B.weight"])
            mean = {"l.lora_B.weight": torch.stack(seen).mean(dim=0)}
            result = LocalResult({"l.lora_B.weight": place}, mean)
            # option II as the paper writes it
            own = memories[client].slots.get(CONTROL, zeros_like(mean))["l.lora_B.weight"]
            paper = (
                own
                - download.extra[CONTROL]["l.lora_B.weight"]
                + (phase.start["l.lora_B.weight"] - place) / (steps * rate)
            )
            assert torch.allclose(mean["l.lora_B.weight"], paper, atol=1e-12)
            upload, memories[client] = rule.upload([result], download, memories[client])
            updates.append(update(client, upload.adapter, extra=upload.extra))
        state = strategy.aggregate(state, updates, context(number, clients))
    return state, memories


def quadratic(client: int, place: torch.Tensor) -> torch.Tensor:
    return (client + 1) * (place - client)


@pytest.mark.parametrize("steps", [1, 5])
def test_the_server_s_control_is_the_mean_of_all_clients_controls(steps):
    state, memories = run_scaffold(6, lambda number: [(number + k) % 4 for k in range(2)], quadratic, steps=steps)
    zero = torch.zeros(2, 1, dtype=torch.float64)
    controls = [memory.slots.get(CONTROL, {"l.lora_B.weight": zero})["l.lora_B.weight"] for memory in memories]
    assert torch.allclose(state.slots[CONTROL]["l.lora_B.weight"], torch.stack(controls).mean(dim=0), atol=1e-12)


def test_with_one_step_everybody_s_move_is_the_mean_gradient():
    state, _ = run_scaffold(1, lambda number: range(4), quadratic)
    start = torch.ones(2, 1, dtype=torch.float64)
    mean = torch.stack([quadratic(client, start) for client in range(4)]).mean(dim=0)
    assert torch.allclose(state.adapter["l.lora_B.weight"], start - 0.1 * mean, atol=1e-12)


def test_it_comes_to_the_common_optimum_where_fedavg_does_not():
    """Quadratics with different curvature: drift moves FedAvg's fixed point, control variates remove it."""
    best = sum((k + 1) * k for k in range(4)) / sum(k + 1 for k in range(4))
    state, _ = run_scaffold(300, lambda number: range(4), quadratic, steps=5)
    assert float(state.adapter["l.lora_B.weight"][0, 0]) == pytest.approx(best, abs=1e-6)
    place = torch.ones(1, dtype=torch.float64)
    for _ in range(300):
        ends = []
        for client in range(4):
            x = place.clone()
            for _ in range(5):
                x = x - 0.1 * quadratic(client, x)
            ends.append(x)
        place = torch.stack(ends).mean(dim=0)
    assert abs(float(place) - best) > 0.05


def test_the_control_change_is_sent_and_the_control_stays():
    rule = ControlledTraining()
    zero = zeros_like(adapter(0))
    upload, memory = rule.upload(
        [LocalResult(adapter(1), adapter(2))], Download(adapter(0), extra={CONTROL: zero}), ClientMemory()
    )
    assert set(upload.extra) == set(rule.sends) == {CHANGE}
    assert close(upload.extra[CHANGE], adapter(2), 0.0)
    assert close(memory.slots[CONTROL], adapter(2), 0.0)
