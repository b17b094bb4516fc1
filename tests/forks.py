"""One program started many times with other flags, each time as a copy of a process that has imported what all need."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FORKING = """
import json, os, runpy, sys, traceback
import kdjax.run.pipeline

module, folder, starts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
codes = []
for number, flags in enumerate(starts):
    if not (child := os.fork()):
        code = 1
        try:
            # Of libraries too, which write past Python or have kept the stream that they were imported with.
            os.dup2(os.open(f"{folder}/{number}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
            sys.argv = [module, *flags]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


class End(NamedTuple):
    """How a program ended."""

    code: int
    told: str
    """What standard error had."""


def ends(module: str, starts: Sequence[Sequence[str]], told: Path, cwd: Path = ROOT) -> list[End]:
    """How ``python -m module`` ends with each of several lists of flags, of which none may get far.

    Args:
        module: name of the program.
        starts: its flags, of each start.
        told: an empty folder.
        cwd: where it runs; modules there can be imported.
    """
    command = [sys.executable, "-c", FORKING, module, str(told), json.dumps([list(x) for x in starts])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(cwd)])}
    run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    codes = json.loads(run.stdout.splitlines()[-1])
    return [End(code, (told / str(number)).read_text()) for number, code in enumerate(codes)]
