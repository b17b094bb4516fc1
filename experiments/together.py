"""Commands that run in one or several processes on this machine's CPU."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple, TextIO


class Topology(NamedTuple):
    """How many processes a command runs in, and how many devices each of them has."""

    processes: int
    devices: int

    def __str__(self) -> str:
        return f"{self.processes}x{self.devices}"


class Running(NamedTuple):
    """A command that was started."""

    processes: list[subprocess.Popen[bytes]]
    printed: TextIO
    """What all of them print, to its end where all have ended."""

    def end(self) -> tuple[list[int], str]:
        """The exit codes and all that was printed, once all have ended."""
        with self.printed:
            text = self.printed.read()
        return [process.wait() for process in self.processes], text


def start(arguments: Sequence[str], topology: Topology) -> Running:
    """Starts ``python -m <arguments>`` in all processes of a topology, which are told of each other."""
    joining: list[list[str]] = [[]]
    if topology.processes > 1:
        with socket.socket() as chosen:
            chosen.bind(("127.0.0.1", 0))
            coordinator = f"--coordinator=127.0.0.1:{chosen.getsockname()[1]}"
        all_of_them = [coordinator, f"--processes={topology.processes}"]
        joining = [[*all_of_them, f"--process={number}"] for number in range(topology.processes)]
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={topology.devices}"}
    reading, writing = os.pipe()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *arguments, *more],
            env=environment,
            stdout=writing,
            stderr=subprocess.STDOUT,
        )
        for more in joining
    ]
    os.close(writing)
    return Running(processes, os.fdopen(reading, errors="replace"))


def run(arguments: Sequence[str], topology: Topology) -> None:
    """Runs a command to its end.

    Raises:
        RuntimeError: a process failed; with what was printed last.
    """
    codes, text = start(arguments, topology).end()
    if any(codes):
        raise RuntimeError(f"{' '.join(arguments)} in {topology} ended with {codes}:\n{text[-2000:]}")
