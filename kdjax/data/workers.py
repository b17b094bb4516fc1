"""Who prepares batches: threads, or processes.

Threads of one process share Python's interpreter lock. Processes fill memory that is shared with them, which has no
name: nothing is left of it, however they end, and no limit of /dev/shm is met.
"""

import dataclasses
import itertools
import mmap
import multiprocessing
import os
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import cloudpickle
import numpy as np

from kdjax.data.indexed import IndexedSource
from kdjax.data.sizing import Size
from kdjax.errors import Exit, UserError
from kdjax.types import Batch

T = TypeVar("T")
Work = Callable[[], None]


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
    def most_bytes(self) -> int:
        """Of the images of a batch."""

    def __call__(self, step: int, memory: Callable[[int, Size], np.ndarray]) -> Batch:
        """The batch of a step, with its images in what ``memory`` gives for their number and shape."""


def from_processes(make: Maker, source: Any, *, first_step: int, processes: int) -> Generator[Batch, None, None]:
    """The batches of ``first_step`` and all that follow, made by processes ahead of the consumer.

    Images that cannot be decoded there are said and counted here, as if this process had met them.

    Args:
        make: of a step; it and what it refers to is pickled by cloudpickle.
        source: what it reads.
        first_step: counted from 0.
        processes: how many there are; each makes a whole batch at a time.

    Raises:
        UserError: there is no such memory, a process was ended from outside; or what ``make`` raises.
    """
    if not hasattr(os, "memfd_create"):
        raise UserError("config.data.processes needs Linux, whose memory processes share by number: set it to 0.")
    known, free = set(_undecodable(source)), deque[_Block]()
    under_way: deque[tuple[_Block, Future[tuple[Batch, list[int]]]]] = deque()
    content = cloudpickle.dumps((make, source))
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(content,))
    try:
        for step in itertools.count(first_step):
            block = free.popleft() if free else _block(make.most_bytes)
            under_way.append((block, pool.submit(_made, step, block.path)))
            if len(under_way) <= 2 * processes:
                continue
            block, future = under_way.popleft()
            batch, undecodable = _result(future)
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
    finally:
        pool.shutdown(cancel_futures=True)


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


def _result(future: Future[T]) -> T:
    try:
        return future.result()
    except BrokenProcessPool as error:
        ended = UserError(
            "A process that prepares images was ended from outside: most likely memory ran out; fewer "
            "config.data.processes need less."
        )
        ended.exit_code = Exit.AGAIN
        raise ended from error


# What follows runs in a process that prepares batches.

_GIVEN: list[Any] = []
"""What makes a batch, and its source."""
_MEMORY: dict[str, mmap.mmap] = {}
"""By path, what was written to before."""


def _begin(content: bytes) -> None:
    """Signals are for the process that trains, which ends this one when it has saved; this one ends where that dies."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()
    _GIVEN.extend(cloudpickle.loads(content))


def _made(step: int, path: str) -> tuple[Batch, list[int]]:
    """The batch of a step, with the shape of its images instead of them; and which could not be decoded so far."""
    if path not in _MEMORY:
        with open(path, "r+b") as file:
            _MEMORY[path] = mmap.mmap(file.fileno(), 0)
    memory, (make, source) = _MEMORY[path], _GIVEN

    def images(count: int, shape: Size) -> np.ndarray:
        return np.frombuffer(memory, np.uint8, count=3 * count * shape[0] * shape[1]).reshape(count, *shape, 3)

    batch = make(step, images)
    return dataclasses.replace(batch, images=cast(Any, batch.images.shape)), list(_undecodable(source))
