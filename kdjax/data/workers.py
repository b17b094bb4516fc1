"""Who prepares batches: threads, or processes.

Threads of one process share Python's interpreter lock. Processes fill memory that is shared with them, which has no
name: nothing is left of it, however they end, and no limit of /dev/shm is met. They are not forks and do not import the
program that starts them: JAX's threads and a script without a guard are none of their business.
"""

import contextlib
import dataclasses
import itertools
import mmap
import multiprocessing
import os
import pickle
import subprocess
import sys
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import cloudpickle
import numpy as np

from kdjax.data.indexed import IndexedSource
from kdjax.data.sizing import Size
from kdjax.errors import Exit, UserError
from kdjax.paths import has_client, reaching, take_client
from kdjax.types import Batch

T = TypeVar("T")
Work = Callable[[], None]

_START = """
import signal
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
import sys
from multiprocessing.connection import Connection
others = Connection(int(sys.argv[1]))
sys.path[:] = others.recv()
from kdjax.data.workers import serve
serve(others)
"""
"""What a process runs. Signals are for the one that trains, which ends the others when it has saved."""


def from_threads(
    batches: Iterable[tuple[T, Sequence[Work]]], local_size: int, num_threads: int
) -> Generator[T, None, None]:
    """Batches whose tasks are done, in order, from threads that work on some more meanwhile.

    Threads share the images of a batch, and few batches are under way, so that memory does not grow with threads.

    Args:
        batches: each with what fills it, in any order.
        local_size: images of one.
        num_threads: that fill them ahead of the consumer.
    """
    ahead = max(2, -(-2 * num_threads // local_size))
    pool = ThreadPoolExecutor(num_threads)
    under_way: deque[tuple[T, list[Future[None]]]] = deque()
    try:
        for batch, tasks in batches:
            under_way.append((batch, [pool.submit(task) for task in tasks]))
            if len(under_way) > ahead:
                yield _finished(*under_way.popleft())
        while under_way:
            yield _finished(*under_way.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(batch: T, tasks: Iterable[Future[None]]) -> T:
    """The batch, once its tasks are done; the first error of one of them is raised."""
    for task in tasks:
        task.result()
    return batch


class Maker(Protocol):
    """Makes the batch of any step."""

    @property
    def source(self) -> Any:
        """What it reads."""

    @property
    def most_bytes(self) -> int:
        """Of the images of a batch."""

    def __call__(self, step: int, memory: Callable[[int, Size], np.ndarray]) -> Batch:
        """The batch of a step, with its images in what ``memory`` gives for their number and shape."""


def from_processes(make: Maker, *, first_step: int, processes: int) -> Generator[Batch, None, None]:
    """The batches of ``first_step`` and all that follow, made by processes of this machine ahead of the consumer.

    Images that cannot be decoded there are said and counted here, as if this process had met them. The processes end
    with the generator, and where this process dies. Linux alone has such memory.

    Args:
        make: of a step; it and what it refers to is pickled by cloudpickle.
        first_step: counted from 0.
        processes: how many there are; each makes a whole batch at a time, and begins the next one meanwhile.

    Raises:
        UserError: ``make`` cannot be pickled, a process was ended from outside; or what ``make`` raises.
        RuntimeError: with its traceback, anything else that ``make`` raises.
    """
    try:
        content = cloudpickle.dumps((has_client(), make))
    except Exception as error:  # Whatever somebody's own class raises.
        raise UserError(
            f"These data cannot be passed on to other processes ({type(error).__name__}: {error}): set "
            "config.data.processes to 0."
        ) from error
    source, known, free = make.source, set(_undecodable(make.source)), deque[_Block]()
    under_way: deque[tuple[_Block, _Worker]] = deque()
    with contextlib.ExitStack() as started:
        workers = [started.enter_context(contextlib.closing(_Worker())) for _ in range(processes)]
        for worker in workers:  # All of them have begun to import meanwhile.
            worker.send(content)
        for step, worker in zip(itertools.count(first_step), itertools.cycle(workers)):
            block = free.popleft() if free else _block(make.most_bytes)
            worker.send((step, block.path))
            under_way.append((block, worker))
            if len(under_way) <= 2 * processes:
                continue
            block, oldest = under_way.popleft()
            batch, undecodable = oldest.receive()
            if new := set(undecodable) - known:
                known |= new
                for row in np.flatnonzero(np.isin(source.images.identity, list(new))).tolist():
                    source[row]
            shape = cast(Any, batch.images)
            images = np.frombuffer(block.memory, np.uint8, count=int(np.prod(shape)))
            # NumPy and JAX refer to this array from whatever they make of its memory.
            weakref.finalize(images, free.append, block).atexit = False
            yield dataclasses.replace(batch, images=cast(Any, images.reshape(shape)))
            del batch, images


class _Worker:
    """Another process, and the line to it."""

    def __init__(self) -> None:
        """Starts it; it imports what it needs while this process goes on."""
        self._line, theirs = multiprocessing.Pipe()
        with theirs:
            number = theirs.fileno()
            command = [sys.executable, "-c", _START, str(number)]
            # In a session of its own no Ctrl-C reaches it, not even before it can ignore that. Devices are not its own.
            self._process = subprocess.Popen(
                command,
                pass_fds=(number,),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )
        self.send(sys.path)

    def send(self, what: Any) -> None:
        try:
            self._line.send_bytes(pickle.dumps(what))
        except OSError as error:
            raise self._ended() from error

    def receive(self) -> tuple[Batch, list[int]]:
        """What it made of the step that it has had for longest."""
        try:
            kind, what = pickle.loads(self._line.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if kind == "made":
            return what
        if kind == "refused":
            raise what
        raise RuntimeError(f"A process that prepares images failed:\n{what}")

    def _ended(self) -> UserError:
        error = UserError(
            f"A process that prepares images was ended, with exit code {self._process.wait()}: where that is -9, "
            "memory ran out or somebody ended it; fewer config.data.processes need less memory."
        )
        error.exit_code = Exit.AGAIN
        return error

    def close(self) -> None:
        """Ends it at once: nothing of what it makes is needed any more."""
        self._process.kill()
        self._process.wait()
        self._line.close()


class _Block(NamedTuple):
    """Memory that other processes can write to."""

    memory: mmap.mmap
    path: str
    """How they find it."""


def _block(size: int) -> _Block:
    """One that lives as long as it is referred to in any process."""
    file = os.memfd_create("kdjax")
    os.truncate(file, size)
    memory = mmap.mmap(file, size)
    weakref.finalize(memory, os.close, file).atexit = False
    return _Block(memory, f"/proc/{os.getpid()}/fd/{file}")


def _undecodable(source: Any) -> list[int]:
    """Ids of images of a source that could not be decoded so far."""
    return source.undecodable if isinstance(source, IndexedSource) else []


def serve(line: Connection) -> None:
    """Makes batches in this process for the one at the other end of a line, until that has gone.

    Args:
        line: gives what :func:`from_processes` sends.
    """
    memory: dict[str, mmap.mmap] = {}
    with contextlib.suppress(EOFError, OSError):
        content = pickle.loads(line.recv_bytes())
        try:
            in_buckets, make = cast(tuple[bool, Maker], cloudpickle.loads(content))
            if in_buckets:
                take_client("gs://")
            if isinstance(make.source, IndexedSource):
                make.source.report.silent = True
        except Exception:  # Of somebody's own class: it is the answer to all that comes.
            line.send_bytes(pickle.dumps(("failed", traceback.format_exc())))
            return
        while True:
            step, path = pickle.loads(line.recv_bytes())
            if path not in memory:
                with open(path, "r+b") as file:
                    memory[path] = mmap.mmap(file.fileno(), 0)
            try:
                with reaching():
                    made = _made(make, step, memory[path])
                answer: tuple[str, Any] = "made", (made, list(_undecodable(make.source)))
            except UserError as error:
                answer = "refused", error
            except Exception:
                answer = "failed", traceback.format_exc()
            line.send_bytes(pickle.dumps(answer))


def _made(make: Maker, step: int, memory: mmap.mmap) -> Batch:
    """The batch of a step, its images in the memory, with their shape instead of them."""

    def images(count: int, shape: Size) -> np.ndarray:
        return np.frombuffer(memory, np.uint8, count=3 * count * shape[0] * shape[1]).reshape(count, *shape, 3)

    batch = make(step, images)
    return dataclasses.replace(batch, images=cast(Any, batch.images.shape))
