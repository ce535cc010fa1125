"""Ctrl-C ends a command as such, wherever it arrives."""

import os
import signal
import subprocess
import sys
import time

import pytest

from gigatok_ds import InputError
from gigatok_ds.cli.main import main
from gigatok_ds.resilience.preemption import REQUEUE
from gigatok_ds.signals import handled, interrupts_noted, signals_wait


class Dying:
    """Is interrupted in its destructor, where Python ignores exceptions."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def test_what_a_destructor_swallows_is_raised_again(capfd):
    with pytest.raises(KeyboardInterrupt), interrupts_noted() as interrupted:
        Dying()
        time.sleep(10)
    assert interrupted() and capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("error", [InputError, RuntimeError, OSError])
def test_what_a_library_makes_of_it_is_an_interrupt_still(error, monkeypatch, capsys):
    def run(args):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise error("the file is damaged") from None

    monkeypatch.setattr("gigatok_ds.cli.training.recipes.run", run)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert main(["recipes"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert said.startswith("interrupted; ") and "damaged" not in said


def test_errors_without_an_interrupt_are_what_they_were(monkeypatch, capsys):
    def run(args):
        raise InputError("the file is damaged")

    monkeypatch.setattr("gigatok_ds.cli.training.recipes.run", run)
    assert main(["recipes"]) == 2 and "error: the file is damaged" in capsys.readouterr().err


def test_it_waits_where_nothing_may_be_half_done():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_noted(), signals_wait():
        signal.raise_signal(signal.SIGINT)
        done.append("all")
    assert done


def test_handlers_go_with_what_they_are_for():
    """Also where it does not begin, as a page whose port is taken; what is ignored stays so."""
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match="in use"), handled(print, signal.SIGTERM, signal.SIGHUP):
            assert signal.getsignal(signal.SIGTERM) is print and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            raise OSError("in use")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, hangup)


def leave(closed):
    """A process that is asked to stop while a library has lent its standard error to a file of its own."""
    script = """
import os, signal
from gigatok_ds.resilience.preemption import leaving_at_once
with leaving_at_once(lambda name: None):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.raise_signal(signal.SIGTERM)
"""
    start = (lambda: os.close(2)) if closed else None
    return subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, check=False,
                          preexec_fn=start)


def test_a_stop_is_told_although_standard_error_is_lent():
    ended = leave(closed=False)
    assert ended.returncode == REQUEUE and ended.stderr.startswith("stopped by SIGTERM")


def test_a_stop_without_standard_error_ends_as_any():
    assert leave(closed=True).returncode == REQUEUE
