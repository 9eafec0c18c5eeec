import signal
import sys
import threading

import pytest
import safetensors.torch
import torch
from lost_signals import lose_signal

from fedlora.files import append_line, write_bytes
from fedlora.llm.adapter_files import load_adapter
from fedlora.runs import base_chain
from fedlora.runs.server_state import load_groups
from fedlora.stopping import remember_signals, stop_if_asked, stop_on_signals

pytestmark = pytest.mark.usefixtures("handlers")


def run_inside(block, *steps):
    with block():
        for step in steps:
            step()


def in_a_thread(step):
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()


def test_without_a_signal_nothing_is_raised():
    run_inside(stop_on_signals, stop_if_asked)
    stop_if_asked()


@pytest.mark.parametrize("write", [lambda path: write_bytes(path, b"new"), lambda path: append_line(path, {"new": 1})])
def test_nothing_is_written_behind_a_signal_that_was_lost(tmp_path, write):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(SystemExit) as stopped:
        run_inside(stop_on_signals, lose_signal, lambda: write(path))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize(
    "read", [load_groups, base_chain._load, lambda path: load_adapter(path, {"a.lora_A.weight": (1, 2)})]
)
def test_a_file_whose_reading_a_signal_ended_is_not_called_damaged(tmp_path, monkeypatch, read):
    path = tmp_path / "file.safetensors"
    path.write_bytes(safetensors.torch.save({"a.lora_A.weight": torch.ones(1, 2)}))
    read(path)
    monkeypatch.setattr(safetensors.torch, "load_file", lambda path: lose_signal(ValueError("no shape")))
    with pytest.raises(SystemExit) as stopped:
        run_inside(stop_on_signals, lambda: read(path))
    assert isinstance(stopped.value.__context__, ValueError)


def test_an_interrupt_is_raised_again_as_one():
    def lose():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_inside(stop_on_signals, lose, stop_if_asked)


@pytest.mark.parametrize("block", [stop_on_signals, remember_signals])
@pytest.mark.parametrize(("number", "told"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_an_error_behind_a_signal_counts_as_the_signal_s(block, number, told):
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))

    def turn():
        try:
            signal.raise_signal(number)
        except told:
            raise ValueError("the library's own way to say so") from None

    with pytest.raises(told) as stopped:
        run_inside(block, turn)
    assert isinstance(stopped.value.__context__, ValueError)


def test_a_signal_is_forgotten_with_the_command_it_ended():
    with pytest.raises(SystemExit):
        run_inside(stop_on_signals, lose_signal, stop_if_asked)
    stop_if_asked()


def test_other_threads_compute_on(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(SystemExit):
        run_inside(
            stop_on_signals,
            lose_signal,
            lambda: in_a_thread(lambda: write_bytes(path, b"what no handler disturbed")),
            stop_if_asked,
        )
    assert path.exists()


def test_what_a_framework_s_handlers_are_asked_is_remembered_and_they_are_put_back():
    heard = []

    def others(number, frame):
        heard.append(number)
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, others)
    with pytest.raises(SystemExit) as stopped:
        run_inside(remember_signals, lose_signal, stop_if_asked)
    assert heard == [signal.SIGTERM]
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is others
    stop_if_asked()


def test_handlers_that_give_way_when_they_are_asked_stay_away():
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    run_inside(remember_signals, lambda: signal.raise_signal(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("block", [stop_on_signals, remember_signals])
def test_a_thread_leaves_signals_alone(block):
    before, inside = signal.getsignal(signal.SIGTERM), []
    in_a_thread(lambda: run_inside(block, lambda: inside.append(signal.getsignal(signal.SIGTERM))))
    assert inside == [before]


@pytest.mark.parametrize("block", [stop_on_signals, remember_signals])
def test_what_is_ignored_stays_ignored(block):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_inside(block, lambda: signal.raise_signal(signal.SIGINT), stop_if_asked)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
