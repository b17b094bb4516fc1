"""Signals: what they end at once, what they let be saved, and how several processes agree on where."""

import itertools
import signal
import subprocess
import sys
import threading

import pytest

from kdjax.errors import Exit
from kdjax.stopping import Stop, stopping


class LeftError(Exception):
    """In place of the end of a process."""


def leave(code):
    raise LeftError(code)


class Shared:
    """A board between threads that stand for processes; each has a view of it."""

    def __init__(self, count):
        self.texts, self.changed, self.count = {}, threading.Condition(), count

    def of(self, process):
        shared = self

        class View:
            def put(self, key, text):
                with shared.changed:
                    shared.texts[key] = text
                    shared.changed.notify_all()

            def get(self, key):
                return shared.texts.get(key)

            def all(self, key, text):
                self.put(f"{key}/{process}", text)
                keys = [f"{key}/{other}" for other in range(shared.count)]
                with shared.changed:
                    shared.changed.wait_for(lambda: all(key in shared.texts for key in keys))
                return [shared.texts[key] for key in keys]

        return View()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_what_holds_nothing_is_left_at_once(number, code, capsys):
    with pytest.raises(LeftError) as left:
        Stop(leave=leave).ask(number)
    assert left.value.args == (code,)
    assert capsys.readouterr().err == f"kdjax: stopped by {signal.Signals(number).name}; there was nothing to save.\n"


def test_what_is_held_is_saved_and_a_second_signal_leaves_at_once(capsys):
    now = [0.0]
    stop = Stop(leave=leave, clock=lambda: now[0])
    assert not stop.due()
    with stop.holding():
        stop.ask(signal.SIGTERM)
        now[0] = 0.5
        stop.ask(signal.SIGTERM)  # Some launchers pass on what all get anyway.
        assert stop.due()
        now[0] = 2.0
        assert stop.stopped("saved").exit_code == Exit.AGAIN
        with pytest.raises(LeftError):
            stop.ask(signal.SIGTERM)
    assert "a second one ends it at once" in capsys.readouterr().err


@pytest.mark.parametrize("ticks", [(3, 3), (3, 5), (7, 2)])
def test_processes_end_at_the_same_tick_which_none_has_passed(ticks):
    shared = Shared(len(ticks))
    stops = [Stop(shared.of(process), leave=leave) for process in range(len(ticks))]
    for stop, count in zip(stops, ticks, strict=True):
        assert not any(stop.due() for _ in range(count))
    with stops[0].holding():
        stops[0].ask(signal.SIGTERM)
    assert not stops[0].due()  # It does not know yet what the others have done.
    looking = [threading.Thread(target=stop.look) for stop in stops]
    for thread in looking:
        thread.start()
    for thread in looking:
        thread.join()
    ended = [
        count + next(k for k in itertools.count(1) if stop.due()) for stop, count in zip(stops, ticks, strict=True)
    ]
    assert ended[0] + 1 == ended[1] == max(ticks[0] + 1, ticks[1]) + 1
    # The second one, of which Slurm sends one to every process, is its own first.
    with stops[1].holding():
        stops[1].ask(signal.SIGTERM)
    assert {stop.stopped().exit_code for stop in stops} == {Exit.AGAIN}


def test_handlers_are_those_from_before_once_it_is_over():
    before = signal.getsignal(signal.SIGTERM)
    with stopping() as stop, stop.holding():
        assert signal.getsignal(signal.SIGTERM) is not before
        signal.raise_signal(signal.SIGTERM)
        with stop._changed:
            stop._changed.wait_for(lambda: stop._number, timeout=60)
        assert stop.due()
    assert signal.getsignal(signal.SIGTERM) is before


BUSY = """
import hashlib
from kdjax.stopping import stopping
with stopping():
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # One call, of many minutes.
"""


def test_a_signal_ends_a_process_whose_main_thread_does_not_come_back_to_python():
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, said) == (75, "kdjax: stopped by SIGTERM; there was nothing to save.\n")
