"""Runs that end at any moment and go on: a sample of what `make crashtest` does at length."""

import random

import pytest
from crash_bench import CrashBench
from crash_damage import DAMAGED_EXIT, NOT_HASHED, damage_files, find_kinds
from crash_disk import fill_disks
from crash_kills import kill_runs
from crash_starts import lose_signals, send_signals, start_together
from fork_server import ForkServer
from tiny_run import MODES

from fedlora.cli import main


def sizes(few, many):
    """The first for the default tests, the second for the thorough ones."""
    return [few, pytest.param(many, marks=pytest.mark.thorough)]


@pytest.fixture(scope="module")
def bench(tiny_model, tmp_path_factory):
    # every try is compared with the unbroken run, so that a second one would show nothing more
    with ForkServer(tiny_model) as server:
        yield CrashBench(server, tiny_model, tmp_path_factory.mktemp("crashes"), checked=False)


def faults_of(tallies) -> list[str]:
    assert sum(tally.tries for tally in tallies)
    return [fault for tally in tallies for fault in tally.faults]


# every kind of memory resumes in the tests' own process by default, and after a kill in the thorough tests
@pytest.mark.parametrize("kills", sizes(3, 36))
def test_killed_processes_leave_what_an_unbroken_run_leaves(bench, kills):
    tallies = kill_runs(bench, kills, seed=1)
    assert not faults_of(tallies)
    assert sum(sum(tally.notes.values()) for tally in tallies) == kills


@pytest.mark.parametrize("disks", sizes(1, 4))
def test_a_full_disk_ends_with_what_is_missing_and_the_run_goes_on(bench, disks):
    assert not faults_of(fill_disks(bench, points=2 * disks, sizes=disks, seed=1))


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["homo", "none"])
def test_a_damaged_file_of_any_kind_is_named_and_not_used(bench, mode):
    # the manifest and the records are told by their own seals, the tensors by the manifest
    assert not faults_of(damage_files(bench, cuts=1, flips=1, seed=1, modes=(mode,)))


@pytest.mark.parametrize("modes", sizes(("homo", "none"), MODES))
def test_verify_names_every_file_in_which_one_bit_flipped(bench, modes, capsys):
    rng = random.Random(5)
    for mode in modes:
        folder = bench.copy_whole(mode)
        for name in sorted(set(find_kinds(folder / "run")) - {*NOT_HASHED}):
            file = folder / "run" / name
            whole = file.read_bytes()
            content = bytearray(whole)
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            # a file may be a hard link of another one
            file.unlink()
            file.write_bytes(content)
            assert main(["verify", "run", "--model_dir", str(folder)]) in (2, DAMAGED_EXIT), file
            assert str(file) in capsys.readouterr().err
            file.write_bytes(whole)
        assert main(["verify", "run", "--model_dir", str(folder)]) == 0


@pytest.mark.parametrize("tries", sizes(2, 9))
def test_a_signal_ends_a_run_at_once_and_it_goes_on(bench, tries):
    assert not faults_of(send_signals(bench, tries, seed=1))


@pytest.mark.parametrize("tries", sizes(4, 18))
def test_a_signal_whose_exception_is_lost_spoils_nothing(bench, tries):
    tallies = lose_signals(bench, tries, seed=1)
    assert not faults_of(tallies)
    assert tallies[0].notes["stopped"] > 2 * tries // 3


@pytest.mark.parametrize("starts", sizes(8, 20))
def test_of_many_starts_on_one_folder_one_trains_and_the_others_end_with_six(bench, starts):
    tallies = start_together(bench, starts)
    assert not faults_of(tallies)
    assert tallies[0].notes["refused"] == starts - 1
