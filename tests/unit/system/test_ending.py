"""Signals that ask a command to end."""

from __future__ import annotations

import os
import signal

import pytest

from fedmerge.system.process import Terminated, ending_as_interrupt


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_asks_to_end_interrupts_once(name: str) -> None:
    number, tidied = getattr(signal, name), []
    before = signal.signal(number, signal.SIG_DFL)  # another test may have started Ray, which sets its own
    with pytest.raises(KeyboardInterrupt, match=f"ended by {name}") as ended, ending_as_interrupt():
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), number)  # while it tidies up
            tidied.append(True)
    assert isinstance(ended.value, Terminated)
    assert (ended.value.exit_code, tidied) == (128 + number, [True])
    assert signal.signal(number, before) == signal.SIG_DFL


def test_what_is_ignored_stays_ignored() -> None:
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_as_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
