"""Stopping is agreed on: by all processes after the same step, soon, and without asking at every step."""

import signal

import pytest
import torch

from corinfomax.runtime import processes
from corinfomax.training import signals


@pytest.fixture
def at_a_terminal():
    """SIGHUP as at a terminal: the tests may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("at_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_alone_the_answer_is_at_once(number):
    with signals.stop_signals() as stop:
        assert not stop.agreed(1)
        signal.raise_signal(number)
        assert stop.agreed(2)


def test_nohup_is_obeyed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stop_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.agreed(1)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("a_step", "most"), [(0.001, 1.2), (0.3, 1.5), (4.0, 8.1)])
def test_processes_ask_about_once_a_second(monkeypatch, a_step, most):
    """Two processes on a made-up clock, one of which is asked to stop: both stop after the same step."""
    now, asked, questions = [0.0], [], [0]

    def largest(*here):
        questions[0] += 1
        return [max(here[0], float(bool(asked))), here[1]]

    monkeypatch.setattr(processes, "size", lambda: 2)
    monkeypatch.setattr(processes, "largest", largest)
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    stop = signals.Stop()
    for step in range(1, int(20 / a_step)):
        now[0] += a_step
        assert not stop.agreed(step)
    assert questions[0] <= 25
    asked.append(True)
    began = now[0]
    while not stop.agreed(step := step + 1):
        now[0] += a_step
    assert now[0] - began <= most


def test_each_process_has_the_gpu_of_its_own_place_and_touches_no_other(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda", "cpu"):
        assert processes.own_device(torch.device(name)) == torch.device(name)  # without torchrun
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert processes.own_device(torch.device("cuda")) == torch.device("cuda", 1)
    assert processes.own_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU of its own: there are 2"):
        processes.own_device(torch.device("cuda"))


@pytest.fixture
def interruptible():
    """Ctrl-C as at a terminal; a shell starts what it leaves in the background deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), signals.stop_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.agreed(1)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")
