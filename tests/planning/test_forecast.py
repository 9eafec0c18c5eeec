"""A run counted before it begins: waves, steps, work, bytes."""

from __future__ import annotations

import pytest
import torch

from fedlora.config.train import TrainConfig
from fedlora.llm.abilities import Abilities
from fedlora.llm.examples import PASS_OVERHEAD_TOKENS, Example
from fedlora.llm.layout import Layout
from fedlora.methods.choosing import choose_method
from fedlora.planning.forecast import Work, count_run_units, draw_waves, forecast_run, measure_epoch

ADAPTER = {"q.lora_A.weight": torch.zeros(2, 8), "q.lora_B.weight": torch.zeros(8, 2)}


def epoch(steps: int, units: int = 0) -> Work:
    return Work(steps, 10 * steps, units, 0, 0, 0)


def test_an_epoch_is_cut_as_training_cuts_it():
    examples = [Example(list(range(length)), 2) for length in (5, 9, 9, 20, 3)]
    work = measure_epoch(examples, TrainConfig.of(local_batch_size=5), Layout(20), 0)
    assert (work.num_steps, work.num_tokens) == (1, 46)
    # 20 alone, then nothing else that is longer than 20 padded tokens
    assert (work.pass_tokens, work.pass_length, work.pass_labels) == (20, 20, 18)
    assert work.units - 46 >= 3 * PASS_OVERHEAD_TOKENS


def test_most_rows_of_a_pass_are_kept_to():
    examples = [Example(list(range(10)), 2)] * 8
    one = measure_epoch(examples, TrainConfig.of(local_micro_batch_size=1), Layout(2048), 0)
    all_at_once = measure_epoch(examples, TrainConfig.of(), Layout(2048), 0)
    assert one.units - all_at_once.units == 7 * PASS_OVERHEAD_TOKENS
    assert (one.pass_tokens, all_at_once.pass_tokens) == (10, 80)


def test_rows_share_passes_as_the_base_can():
    examples = [Example(list(range(length)), 2) for length in (10, 10, 9)]
    for can, passes in ((Abilities(), 1), (Abilities(padding=0), 2), (Abilities(padding=0, equal_rows=False), 3)):
        work = measure_epoch(examples, TrainConfig.of(), Layout(2048), 0, can)
        assert work.units == (30 if passes == 1 else 29) + passes * PASS_OVERHEAD_TOKENS


@pytest.mark.parametrize(
    ("mode", "updates", "sent", "tasks"), [("homo", 4, 4, 4), ("seq", 4, 4, 4), ("none", 4, 0, 4), ("pooled", 1, 0, 1)]
)
def test_each_mode_sends_and_keeps_its_own(mode, updates, sent, tasks):
    config = TrainConfig.of(
        federation_mode=mode, client_selection_frac=1, num_communication_rounds=3, local_num_epochs=2
    )
    rounds = draw_waves(config, choose_method(config), range(4))
    work = {rows_of: epoch(2 * len(rows_of)) for waves in rounds for wave in waves for _, rows_of in wave}
    found = forecast_run(config, choose_method(config), rounds, work, ADAPTER)
    assert (found.num_updates, found.most_updates) == (3 * updates, updates)
    assert (found.bytes_down, found.bytes_up) == (sent * 128, sent * 128)
    assert found.num_steps == 3 * 2 * 2 * 4
    assert found.num_tokens == 10 * found.num_steps
    assert sum(found.steps_of.values()) == found.num_steps
    assert found.rounds_of == dict.fromkeys(range(4), 3)


def test_who_is_never_drawn_is_missing():
    config = TrainConfig.of(client_selection_frac=0.1, num_communication_rounds=2)
    rounds = draw_waves(config, choose_method(config), range(8))
    found = forecast_run(config, choose_method(config), rounds, {(client,): epoch(1) for client in range(8)}, ADAPTER)
    drawn = {client for waves in rounds for wave in waves for client, _ in wave}
    assert set(found.rounds_of) == drawn
    assert 1 <= len(drawn) <= 2


def test_devices_share_a_wave_and_wait_for_its_longest():
    config = TrainConfig.of(client_selection_frac=1, num_communication_rounds=1, local_num_epochs=1)
    (waves,) = draw_waves(config, choose_method(config), range(3))
    work = {(0,): epoch(1, 10), (1,): epoch(1, 20), (2,): epoch(1, 90)}
    assert [count_run_units(config, waves, work, devices) for devices in (1, 2, 3)] == [120, 90, 90]


def test_kept_moments_take_twice_the_adapter_more():
    sizes = []
    for state in ("reset", "keep"):
        config = TrainConfig.of(optimizer_state=state, client_selection_frac=1, num_communication_rounds=1)
        rounds = draw_waves(config, choose_method(config), range(2))
        found = forecast_run(config, choose_method(config), rounds, {(0,): epoch(1), (1,): epoch(1)}, ADAPTER)
        sizes.append(found.disk_bytes)
    assert sizes[1] - sizes[0] >= 2 * 2 * 128
