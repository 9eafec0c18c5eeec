"""Runs that end at any moment and go on: a sample of what `make crashtest` does at length."""

import random

import pytest
from crash_bench import CrashBench
from crash_damage import DAMAGED_EXIT, damage_files, find_kinds
from crash_disk import fill_disks
from crash_kills import kill_runs
from crash_starts import lose_signals, send_signals, start_together
from fork_server import ForkServer
from tiny_run import MODES


@pytest.fixture(scope="module")
def bench(tiny_model, tmp_path_factory):
    with ForkServer(tiny_model) as server:
        yield CrashBench(server, tiny_model, tmp_path_factory.mktemp("crashes"))


def faults_of(tallies) -> list[str]:
    assert sum(tally.tries for tally in tallies)
    return [fault for tally in tallies for fault in tally.faults]


def test_twenty_killed_processes_leave_what_an_unbroken_run_leaves(bench):
    tallies = kill_runs(bench, 20, seed=1)
    assert not faults_of(tallies)
    assert sum(sum(tally.notes.values()) for tally in tallies) == 20


def test_a_full_disk_ends_with_what_is_missing_and_the_run_goes_on(bench):
    tallies = fill_disks(bench, points=4, sizes=2, seed=1)
    assert not faults_of(tallies)


@pytest.mark.parametrize("mode", ["homo", "none"])
def test_a_damaged_file_of_any_kind_is_named_and_not_used(bench, mode):
    # the manifest and the records are told by their own seals, the tensors by the manifest
    assert not faults_of(damage_files(bench, cuts=1, flips=0, seed=1, modes=(mode,)))


def test_verify_names_every_file_in_which_one_bit_flipped(bench):
    rng = random.Random(5)
    for mode in MODES:
        for name in find_kinds(bench.whole(mode).root):
            folder = bench.copy_whole(mode)
            file = folder / "run" / name
            content = bytearray(file.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.unlink()
            file.write_bytes(bytes(content))
            ending = bench.start(mode, folder, command="verify")
            assert ending.code in (2, DAMAGED_EXIT), ending.said
            assert str(file) in ending.said
            bench.drop(folder, None)


def test_a_signal_ends_a_run_at_once_and_it_goes_on(bench):
    assert not faults_of(send_signals(bench, 4, seed=1))


def test_a_signal_whose_exception_is_lost_spoils_nothing(bench):
    tallies = lose_signals(bench, 18, seed=1)
    assert not faults_of(tallies)
    assert tallies[0].notes["stopped"] > 12


def test_of_twenty_starts_on_one_folder_one_trains_and_the_others_end_with_six(bench):
    tallies = start_together(bench, 20)
    assert not faults_of(tallies)
    assert tallies[0].notes["refused"] == 19
