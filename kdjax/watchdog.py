"""Ends a process in which nothing happens any more, and says what each of its threads was doing."""

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from kdjax.errors import Exit
from kdjax.paths import Path
from kdjax.processes import are_several, is_main, speaker
from kdjax.report import duration

LIMITS: Mapping[str, float] = {"step": 600.0, "compilation": 7200.0, "evaluation": 7200.0, "checkpoint": 1800.0}
"""Seconds by what is going on: until the next step or batch is done, or all of it."""

_TICK = 1.0
_TELLING = 10.0
"""Seconds for writing a report, perhaps to what hangs."""
_OTHERS = 2.0
"""Seconds for the reports of the other processes, which JAX ends as soon as the main one is gone."""


class Watchdog:
    """A thread that ends the process, with exit code 75, where nothing is done within a limit.

    It counts seconds in which it runs itself: a process that is stopped, or a machine that sleeps, does not hang. A
    context manager, which starts and ends the thread::

        with Watchdog(workdir / "hang_report.txt") as watchdog, watchdog.doing("step"):
            for batch in batches:
                ...
                watchdog.fed()
    """

    def __init__(
        self,
        report: Path,
        patience: float = 1.0,
        *,
        limits: Mapping[str, float] = LIMITS,
        end: Callable[[int], object] = os._exit,
    ):
        """Watches nothing yet.

        Args:
            report: the file for what every thread was doing.
            patience: factor on all limits; 0 for none.
            limits: seconds by what is going on.
            end: of the process, called with the exit code.
        """
        self._report, self._end, self._speaker = report, end, speaker()
        self._limits = {what: patience * seconds for what, seconds in limits.items()}
        self._doing = "", 0.0
        self._fed = False
        self._silent = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Holds what happens inside to the limit of ``what``, and no longer to that of what it is a part of."""
        outer = self._doing
        self.fed()
        self._doing = what, self._limits[what]
        try:
            yield
        finally:
            self.fed()
            self._doing = outer

    def fed(self) -> None:
        """Something was done: the limit counts anew."""
        self._fed = True

    def passed(self, seconds: float) -> None:
        """Counts time that has passed, and ends the process where it was too long."""
        # In this order: the other thread tells of what was done before it goes on to what has a shorter limit.
        what, limit = self._doing
        self._silent = seconds + (0.0 if self._fed else self._silent)
        self._fed = False
        if 0 < limit < self._silent:
            try:
                self._tell(what, limit)
                if are_several() and is_main():
                    time.sleep(_OTHERS)
            finally:
                self._end(Exit.AGAIN)

    def _watch(self) -> None:
        while not self._closed.wait(_TICK):
            self.passed(_TICK)

    def _tell(self, what: str, limit: float) -> None:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            stacks = file.read()
        sentence = (
            f"{self._speaker}: it hangs: nothing was done for {duration(limit)}, while its {what} was under way. "
            f"What every thread was doing is in {self._report}. The same command goes on from the last checkpoint, and "
            "config.patience says how long is too long."
        )
        text = f"{stacks}\n{sentence}\n"

        def write() -> None:
            with contextlib.suppress(OSError):
                self._report.write_text(text)

        for tell in (lambda: print(text, file=sys.stderr, flush=True), write):
            # In a thread: a full pipe or a file system that hangs must not keep the process.
            thread = threading.Thread(target=tell, daemon=True)
            thread.start()
            thread.join(_TELLING)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
