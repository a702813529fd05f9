"""Signals only ask; a second one insists."""

import os
import signal
import threading

import pytest

from veneer.train.interrupt import interruptible


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_asks_and_the_second_stops_at_once(number: int) -> None:
    finished = []
    with pytest.raises(KeyboardInterrupt), interruptible() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), number)
        finished.append("the step went on")
        assert interrupted()
        os.kill(os.getpid(), number)
        finished.append("never")
    assert finished == ["the step went on"]


def test_handlers_are_as_before() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with interruptible():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(ValueError, match="stop"), interruptible():
        raise ValueError("stop")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_handler_set_outside_python_becomes_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    put = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: put.append(handler))  # returns None, as then
    with interruptible():
        pass
    assert put[2:] == [signal.SIG_DFL, signal.SIG_DFL]


def test_outside_the_main_thread_nobody_asks() -> None:
    seen = []

    def run() -> None:
        with interruptible() as interrupted:
            seen.append(interrupted())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]
