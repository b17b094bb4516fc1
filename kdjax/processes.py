"""The processes of a run, one or a few on each host: how they find each other, and what they tell each other.

Every process does the same, in the same order, on its own part of each batch. The main one, number 0, alone prints and
writes. What passes between them is bytes: through JAX's arrays, int64 would become int32 and float64 float32.
"""

import contextlib
import itertools
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib import util
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from kdjax.devices import AXIS, parallel
from kdjax.errors import Exit, UnreachedError, UsageError, UserError, quoted, reason
from kdjax.paths import reaching

T = TypeVar("T")
E = TypeVar("E", bound=Exception)

MAIN = 0
"""Number of the process that prints and writes."""
_TOLD = "told"
"""Attribute of an exception of which every process knows."""
_PATIENCE = 300.0
"""Seconds that a process waits for process 0, as JAX does."""
_SILENCE = 30
"""Seconds without a sign of life after which JAX takes a process for dead, and ends the others."""
_TASKS = {"SLURM_STEP_NODELIST": "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_SIZE"}
"""Variables that tell of a launcher, and those with the number of processes that it started: of Slurm's step, which is
of one in the shell that `salloc` opens for many."""


def connect(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Lets the processes of a run find each other; without several of them it does nothing.

    Call it before anything asks JAX for devices. On Cloud TPU, under Slurm and under Open MPI everything is found out;
    elsewhere it is said, or stands in ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``.

    Args:
        coordinator: ``HOST:PORT``, where process 0 listens; all others reach it there.
        processes: how many there are.
        process: the number of this one, from 0.

    Raises:
        UsageError: only some of the three are said, or they contradict each other.
        UnreachedError: the others are not there.
    """
    processes = _number("JAX_NUM_PROCESSES") if processes is None else processes
    process = _number("JAX_PROCESS_ID") if process is None else process
    # Where a launcher tells the rest, JAX takes the variable of the coordinator by itself.
    alone = (coordinator, processes, process) == (None, None, None) and _launcher()
    coordinator = coordinator or (None if alone else os.environ.get("JAX_COORDINATOR_ADDRESS"))
    if (coordinator, processes, process) != (None, None, None):
        _check(coordinator, processes, process)
        if process:
            _reach(str(coordinator))
        _initialize(coordinator, processes, process)
    # Of a launcher's one process alone JAX would take one of the machine's GPUs.
    elif (count := _launcher()) > 1 or (not count and util.find_spec("libtpu")):
        try:
            _initialize()
        except ValueError as error:
            # JAX found nothing around it, as on a machine that only compiles for TPUs.
            if "coordinator_address should be defined" not in str(error):
                raise
            if count:
                how = f"--coordinator=HOST:PORT, --processes={count} and --process=I"
                raise UsageError(f"JAX does not find out where these {count} processes meet: say {how}.") from error
            return
    if jax.process_count() > 1:
        # All devices connect now. Later some process compiles longer than the others wait for a first connection.
        parallel(_mean, in_axes=(0,), replicated=True)(np.ones(jax.local_device_count(), np.float32))


def _mean(x: jax.Array) -> jax.Array:
    return jax.lax.pmean(x, AXIS)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdecimal():
        raise UsageError(f"The environment variable {variable} is {text!r}; it must be a whole number.")
    return int(text)


def _check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Raises UsageError where the three do not make sense together."""
    if coordinator is None or processes is None or process is None:
        raise UsageError(
            "--coordinator=HOST:PORT, --processes=N and --process=I belong together, one command for each I from 0 to "
            "N - 1; on Cloud TPU, Slurm and Open MPI none of them is needed."
        )
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise UsageError(
            f"--coordinator={coordinator} is no HOST:PORT; it must be where process 0 listens, such as 10.0.0.1:8476."
        )
    if processes < 1:
        raise UsageError(f"--processes={processes}; it must be 1 or more.")
    if not 0 <= process < processes:
        raise UsageError(f"--process={process} of --processes={processes}; it must be from 0 to {processes - 1}.")


def _reach(coordinator: str) -> None:
    """Waits until process 0 listens; JAX would end this process without a word to its user.

    Raises:
        UnreachedError: nobody listens.
    """
    host, _, port = coordinator.rpartition(":")
    begun = time.monotonic()
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() - begun > _PATIENCE:
                raise UnreachedError(
                    f"--coordinator={coordinator} cannot be reached ({reason(error)}): start process 0 "
                    "there, within five minutes of the others, and let them through to that port."
                ) from error
        time.sleep(1)


def _launcher() -> int:
    """How many processes a launcher says that it started; 0 where there is none."""
    return max((_number(count) or 1 for sign, count in _TASKS.items() if sign in os.environ), default=0)


def _initialize(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    # JAX aborts where another process has died. absl would have it print all stacks first, which can crash while
    # threads still run: that is another exit code, which asks for no new start.
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    # It would take SIGTERM, and wait with it for steps, of which there may be none for a long time.
    with contextlib.suppress(AttributeError):  # Older versions have no such option, and leave it to who comes last.
        jax.config.update("jax_enable_preemption_service", False)
    where = f" at {coordinator}" if coordinator else ""
    lost = (
        f"The processes of this run do not find each other{where}{{}}: start one for each number, all within five "
        "minutes, where all reach the coordinator."
    )

    def give_up() -> None:
        print(f"kdjax: {lost.format('')}", file=sys.stderr)
        leave(Exit.AGAIN)

    # After its own time JAX aborts, with a stack of its own and no word to a user: this is over first.
    patience = threading.Timer(_PATIENCE, give_up)
    patience.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=int(2 * _PATIENCE),
            heartbeat_timeout_seconds=_SILENCE,
        )
    except (RuntimeError, OSError) as error:  # The latter where Cloud's metadata cannot be had.
        raise UnreachedError(lost.format(f" ({quoted(error)})")) from error
    finally:
        patience.cancel()


class Board(NamedTuple):
    """Short texts that the processes of a run leave for each other; unlike :func:`gather` it needs no other at once."""

    client: Any
    """JAX's own, of the service by which its processes find each other."""
    prefix: str

    def put(self, key: str, text: str) -> None:
        """Leaves a text, which replaces an earlier one."""
        self.client.key_value_set(f"{self.prefix}/{key}", text, allow_overwrite=True)

    def get(self, key: str) -> str | None:
        """What somebody left, None so far."""
        try:
            return self.client.key_value_try_get(f"{self.prefix}/{key}")
        except jax.errors.JaxRuntimeError:
            return None

    def all(self, key: str, text: str) -> list[str]:
        """The texts of all processes, in their order; waits for them."""
        self.put(f"{key}/{jax.process_index()}", text)
        patience = int(1000 * _PATIENCE)
        return [
            self.client.blocking_key_value_get(f"{self.prefix}/{key}/{process}", patience)
            for process in range(jax.process_count())
        ]


_BOARDS = itertools.count()


def board() -> Board:
    """A new one, which is the same on all processes of several: each makes as many."""
    return Board(distributed.global_state.client, f"kdjax/{next(_BOARDS)}")


def is_main() -> bool:
    """Whether this process prints and writes."""
    return jax.process_index() == MAIN


def speaker() -> str:
    """What this process calls itself in messages.

    >>> speaker()
    'kdjax'
    """
    return f"kdjax (process {jax.process_index()} of {jax.process_count()})" if are_several() else "kdjax"


def are_several() -> bool:
    """Whether this is one of several processes; it may be asked before anything asks JAX for devices."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


_GONE = ("Gloo ", "remote process exited")
"""What Gloo, which connects CPUs, and NCCL say where another process is not there any more."""


def is_of_others(error: Exception) -> bool:
    """Whether an error says that another process is gone, and not that something is wrong in this one.

    >>> is_of_others(jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"))
    True
    >>> is_of_others(ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"))
    True
    """
    # JAX raises the latter where it finds out while it calls a compiled function, and not afterwards.
    kinds = jax.errors.JaxRuntimeError | ValueError
    return isinstance(error, kinds) and any(words in str(error) for words in _GONE)


def leave(code: int) -> NoReturn:
    """Ends this process of several at once, so that the others, which wait for its part, do not go on waiting.

    The regular end of a process waits for theirs.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # Nobody may read it any more.
            stream.flush()
    os._exit(code)


def gather(value: T) -> list[T]:
    """What every process gives, in the order of the processes, on every process.

    Args:
        value: anything that can be pickled, NumPy arrays of any length and dtype among it.
    """
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(data)], np.int32)).ravel()
    # Each length is compiled once more: of powers of two there are few.
    padded = np.zeros(1 << int(lengths.max() - 1).bit_length(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def everywhere(work: Callable[[], T]) -> T:
    """What ``work`` returns on this process, once all have done theirs; where it fails on one, it fails on all.

    Inside it processes may talk to each other by this function and by :func:`divided` alone: one that has failed before
    gives its failure there, and nothing afterwards. What these raise must leave ``work``.

    Raises:
        UserError: of this process, or one that names the process whose it is and ends as that does.
    """
    if jax.process_count() == 1:
        return work()
    try:
        with reaching():
            result = work()
    except Exception as error:
        if not vars(error).get(_TOLD):
            gather((str(error), error.exit_code) if isinstance(error, UserError) else (repr(error), None))
            _told(error)
        raise
    for process, failure in enumerate(gather(None)):
        if failure is not None:
            words, code = failure
            error = UserError(f"Process {process} cannot go on: {words}")
            error.exit_code = code or Exit.BUG
            # One that a bug ends is not there any more where processes end together.
            raise _told(error, everywhere=code is not None)
    return result


def _told(error: E, everywhere: bool = True) -> E:
    """Marks an error as one of which every process knows, and of a user's whether each of them raises one."""
    vars(error)[_TOLD] = True
    if isinstance(error, UserError):
        error.everywhere = everywhere
    return error


def divided(work: Callable[[range], Sequence[T]], count: int) -> list[T]:
    """``work(range(count))``, of which each process does an equal part; all have all of it.

    Args:
        work: from some of the numbers below ``count`` to a result for each, which can be pickled.
        count: the same on every process.

    Raises:
        UserError: ``count`` is another one somewhere; or as :func:`everywhere`, inside which it may stand.
    """
    processes = jax.process_count()
    mine = range(jax.process_index(), count, processes)
    everyone = gather((count, everywhere(lambda: work(mine))))
    if len({theirs for theirs, _ in everyone}) > 1:
        words = (
            f"The processes do not find the same data ({', '.join(str(theirs) for theirs, _ in everyone)} of what they "
            "read together): start again when nobody changes them any more."
        )
        raise _told(UserError(words))
    found: list[T] = [everyone[MAIN][1][0]] * count if count else []
    for process, (_, part) in enumerate(everyone):
        found[process::processes] = part
    return found


def on_main(work: Callable[[], T]) -> T:
    """What ``work`` returns on the main process, which alone does it while the others wait; where it fails, all do.

    Raises:
        UserError: of the main process.
    """
    return gather(everywhere(work if is_main() else _nothing))[MAIN]


def _nothing() -> Any:
    return None
