"""All processes of a run do the same, or none begins."""

import contextlib
import json
import platform
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from kdjax.config.schema import Data
from kdjax.data.folders import NoSplitError
from kdjax.errors import StorageError, UserError, quoted, reason
from kdjax.paths import Path, in_bucket, look_up
from kdjax.processes import MAIN, are_several, everywhere, gather, is_main, on_main
from kdjax.run.data import is_own, open_split
from kdjax.run.record import differences, environment
from kdjax.types import Task

T = TypeVar("T")


def check_agreement(run: Mapping[str, Any]) -> None:
    """Refuses to go on where processes would run something else than the main one.

    Args:
        run: what determines this process's run, as JSON can hold it.

    Raises:
        UserError: on all processes, with a process that differs, and the first keys in which it does.
    """
    if jax.process_count() == 1:
        return
    here = environment()
    # Hosts of a pod often differ in Python's last number, which changes nothing of what is computed.
    here["python"] = here["python"].rpartition(".")[0]
    known = {**run, "environment": here, "devices of a process": jax.local_device_count()}
    everyone = gather((platform.node(), json.loads(json.dumps(known))))
    host, main = everyone[MAIN]
    for process, (other, theirs) in enumerate(everyone):
        if changed := differences(main, theirs):
            error = UserError(
                f"Process {process} on {other} would not run what process {MAIN} on {host} runs "
                f"({'; '.join(changed[:5])}): give all the same command, data, packages and number of devices."
            )
            error.everywhere = True
            raise error


def open_alike(content: Mapping[str, Any], data: Data, task: Task, work: Callable[[], T]) -> T:
    """What ``work`` returns, which opens the data of a config; all processes do so at once.

    Args:
        content: what of the config decides what is opened, as JSON can hold it.
        data: its section.
        task: what is learnt from them.
        work: as :func:`kdjax.processes.everywhere` takes it.

    Raises:
        UserError: on all processes: another config somewhere, with which they would not open the same data together;
            or the data cannot be used.
    """
    check_agreement({"config": content})

    def make() -> None:
        with contextlib.suppress(NoSplitError):  # Perhaps images are held out instead.
            open_split(data, task, training=False)

    # What is downloaded or generated first one process makes, all splits at once.
    if are_several() and (data.download or not is_own(data)):
        on_main(make)
    return everywhere(work)


def check_workdir(workdir: Path) -> None:
    """Makes the workdir, or says why it cannot be used: it can be written, and every process finds it.

    Raises:
        StorageError: it cannot be written; on all processes.
        UserError: it is another folder on some host; on all processes.
    """
    probe = workdir / ".writable"

    def write() -> str:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if in_bucket(workdir):
                look_up(workdir)
            text = uuid.uuid4().hex
            probe.write_text(text)
        except OSError as error:
            raise StorageError(
                f"--workdir={workdir} cannot be used ({reason(error)}); name a folder that can be written, "
                "or a new one."
            ) from error
        return text

    def find() -> None:
        own = workdir / f".writable_{jax.process_index()}"
        if not probe.exists() or probe.read_text() != written:
            raise UserError(
                f"--workdir={workdir} on {platform.node()} is another folder than that of process {MAIN}: name one "
                "that all hosts share."
            )
        try:
            if not is_main():
                own.write_text("")
                own.unlink()
        except OSError as error:
            raise StorageError(
                f"--workdir={workdir} cannot be written on {platform.node()} ({quoted(error)})."
            ) from error

    def remove() -> None:
        try:
            probe.unlink()
        except OSError as error:
            raise StorageError(
                f"Nothing can be removed from --workdir={workdir} ({reason(error)}), as a run does with old "
                "checkpoints; name a folder where files can be."
            ) from error

    written = on_main(write)
    everywhere(find)
    on_main(remove)
