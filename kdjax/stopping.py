"""Stopping in good order: a signal ends a run once what it has computed is saved.

Cloud machines, Slurm and people at a keyboard ask a process to end by SIGTERM or SIGINT, and some kill it half a minute
later. All processes of a run end at the same step, whichever of them was asked.
"""

import contextlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

import jax

from kdjax.errors import Exit
from kdjax.processes import Board, are_several, board, leave, speaker

EXITS: Mapping[int, Exit] = {signal.SIGTERM: Exit.AGAIN, signal.SIGINT: Exit.INTERRUPTED}
"""The signals, and how a program ends by each."""
_NOTICE = "stop"
_POLL = 1.0
"""Seconds between two looks at whether another process was asked."""
_SAME = 1.0
"""Seconds within which two signals are one."""


class Stopped(Exception):  # noqa: N818 Nothing went wrong.
    """A run was asked to end, and has: everything is saved."""

    def __init__(self, number: int, words: str):
        """Which signal ended it, and where it stands."""
        super().__init__(words)
        self.exit_code = EXITS[number]


class Stop:
    """Whether a run was asked to end: what is looked at between two steps, and between two batches of an evaluation.

    As long as nothing is held (:meth:`holding`) there is nothing to lose, and a signal ends the process at once, even
    in the middle of a compilation; so does a second one.
    """

    def __init__(
        self,
        board: Board | None = None,
        leave: Callable[[int], object] = leave,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Knows of no signal yet.

        Args:
            board: where the processes of a run tell each other; None where there is only one.
            leave: ends the process.
            clock: seconds, only ever growing.
        """
        self._board, self._leave, self._clock = board, leave, clock
        self._changed = threading.Condition()
        self._number = 0
        """Of the signal that ends the run, whichever process got it."""
        self._asked: float | None = None
        """When this process got one."""
        self._ticks = 0
        """How often it was asked, which is the same on all processes at the same place."""
        self._last: int | None = None
        """The tick at which all end; known once all have told theirs."""
        self._agreeing = False
        self._holding = False

    def stopped(self, words: str = "stopped") -> Stopped:
        """What to raise once :meth:`due` says so, with words on where the run stands."""
        return Stopped(self._number, words)

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Inside there is something to save."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False

    def due(self) -> bool:
        """Whether to save and end here. All processes ask equally often, and get the same answer."""
        with self._changed:
            self._ticks += 1
            # Who has told its tick must not go on before the last one is known.
            self._changed.wait_for(lambda: not self._agreeing)
            return self._last is not None and self._ticks >= self._last

    def ask(self, number: int) -> None:
        """What a signal does; it is called from a thread."""
        name, now = signal.Signals(number).name, self._clock()
        if self._asked is not None and now - self._asked < _SAME:
            return  # Launchers pass on what the whole group of processes got.
        if self._asked is not None or not self._holding:
            words = "there was nothing to save" if self._asked is None else "at once, as it was asked twice"
            _tell(f"stopped by {name}; {words}.")
            self._leave(EXITS[number])
        self._asked = now
        if self._board is None:
            with self._changed:
                self._number, self._last = number, 0
                self._changed.notify_all()
        else:
            self._board.put(_NOTICE, str(number))
        _tell(f"{name}: saves and ends; a second one ends it at once.")

    def look(self) -> None:
        """Finds out whether any process was asked, and if so agrees with all on where to end; called from a thread."""
        if self._board is None or self._last is not None or (notice := self._board.get(_NOTICE)) is None:
            return
        with self._changed:
            self._agreeing, ticks = True, self._ticks
        self._number, last = int(notice), None
        try:
            last = max(map(int, self._board.all(f"{_NOTICE}_tick", str(ticks)))) + 1
        finally:  # Where some process is not there any more, the others do not wait for it here.
            with self._changed:
                self._agreeing, self._last = False, last
                self._changed.notify_all()


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Takes SIGTERM and SIGINT for as long as a run lasts.

    Python's own handlers wait for the main thread, which may be compiling for minutes; the operating system writes the
    number of a signal into a socket at once, and a thread reads it there. Outside of the main thread Python lets nobody
    handle signals: there a run goes on as before.
    """
    stop = Stop(board() if are_several() else None)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    ours.settimeout(_POLL)

    def watch() -> None:
        while True:
            try:
                received = ours.recv(1)
            except TimeoutError:
                received = b"\0"
            if not received:
                return
            number = received[0]
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # Of a board that some process has left.
                if number in EXITS:
                    stop.ask(number)
                stop.look()

    former = {number: signal.signal(number, _handled) for number in EXITS}
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None is one of C's.
        theirs.close()
        thread.join(3 * _POLL)
        ours.close()


def _tell(words: str) -> None:
    """To standard error, if anybody still reads it: ``tee`` ends by the same Ctrl-C."""
    with contextlib.suppress(OSError, ValueError):
        print(f"{speaker()}: {words}", file=sys.stderr, flush=True)


def _handled(number: int, frame: FrameType | None) -> None:
    """The thread does all that there is to do."""
