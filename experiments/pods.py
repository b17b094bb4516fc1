"""Every pair's step compiled for TPUs: ``python -m experiments.pods --workdir=runs/pods``.

Each method's step of each pair for 8 chips of v5e, MGD's of each pair for v5p and v6e, and for a few the largest batch
that fits; then a Markdown table of what there is. Stop it at any time: the same command goes on, and what is compiled
is not compiled again. What the compiler crashes over is said, and tried again next time; the exit code is 1 then. A
compile takes one to three minutes of both cores; ``--pairs=retinanet_x101_r50 --topologies=v5e:2x4`` does a part.
"""

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from kdjax.config import config_names, find_config, load_config
from kdjax.errors import UsageError, UserError
from kdjax.files import write_json
from kdjax.pairs import PAIRS
from kdjax.tpu import CrashedError, preflight

_TOPOLOGIES = ("v5e:2x4", "v5p:2x2x2", "v6e:2x4")
_EVERY_METHOD = "v5e:2x4"
"""The topology for which all methods are compiled; for the others one is enough."""
_BISECTED = ("retinanet_x101_r50", "faster_rcnn_r101_r50", "fcos_r101_r50", "mask_rcnn_r101_r50")
"""Pairs of which MGD's largest batch is looked for."""

_WORKDIR = flags.DEFINE_string("workdir", "runs/pods", "Folder for all reports.")
_PAIRS = flags.DEFINE_list("pairs", list(PAIRS), "Pairs to compile.")
_METHODS = flags.DEFINE_list("methods", [name for name in config_names() if name != "none"], "Methods to compile.")
_TOPOLOGY = flags.DEFINE_list("topologies", list(_TOPOLOGIES), "What to compile for.")
_PER_CHIP = flags.DEFINE_integer("per_chip", 8, "Images of one step on a chip.", 1)


def report(method: str, pair: str, topology: str, per_chip: int, folder: Path) -> dict[str, Any]:
    """What is said of one step, compiled now or earlier; "refused" where it has no room, "failed" where it crashed."""
    file = folder / f"{method}-{pair}-{topology.replace(':', '_')}-{per_chip}.json"
    if not file.exists():
        bisect = method == "mgd" and pair in _BISECTED and topology == _EVERY_METHOD
        print(f"{method}:{pair} for {topology}:", flush=True)
        try:
            said = preflight(load_config(f"{method}:{pair}"), topology, per_chip=per_chip, classes=80, bisect=bisect)
        except CrashedError as error:
            print(error, flush=True)
            return {"method": method, "pair": pair, "topology": topology, "per_chip": per_chip, "failed": str(error)}
        write_json(file, {"method": method, "pair": pair, **said})
    return json.loads(file.read_text())


def variants(methods: Sequence[str], pairs: Sequence[str]) -> list[tuple[str, str]]:
    """Each method with each pair, as far as there are configs of both.

    Raises:
        UsageError: there is no such method, or no such pair of any method.
    """
    found = []
    for pair in pairs:
        if pair not in PAIRS:
            raise UsageError(f"--pairs={pair} is none of {', '.join(PAIRS)}.")
        for method in methods:
            find_config(method)
            with contextlib.suppress(UserError):
                load_config(f"{method}:{pair}")
                found.append((method, pair))
    return found


_COLUMNS = {
    "method:pair": lambda x: f"{x['method']}:{x['pair']}",
    "topology": lambda x: x["topology"],
    "images / chip": lambda x: str(x["per_chip"]),
    "peak GB": lambda x: f"{x['peak_bytes'] / 1e9:.2f}",
    "TFLOP / image": lambda x: f"{x['flops_per_image'] / 1e12:.3f}",
    "traffic GB / image": lambda x: f"{x['traffic_bytes_per_image'] / 1e9:.2f}",
    "all-reduced (bf16)": lambda x: f"{x['all_reduce_elements']:,} ({x['all_reduce_bf16_elements']:,})",
    "trained": lambda x: f"{x['trained_parameters']:,}",
    "at most images/s (estimate)": lambda x: f"{x['images_per_second_estimate']:.0f}",
    "largest batch": lambda x: str(x.get("largest_batch", "")),
    "loops with one turn": lambda x: str(x["open_loops"]),
}


def table(reports: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, one row for each report; of a step that has no room or crashed, what was said."""

    def cells(x: dict[str, Any]) -> list[str]:
        words = f"no room: {x['refused']}; {x['largest_batch']} fit" if "refused" in x else x.get("failed")
        return [*(cell(x) for cell in list(_COLUMNS.values())[: 3 if words else None]), *([words] if words else [])]

    rows = [list(_COLUMNS), ["---"] * len(_COLUMNS), *map(cells, reports)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(_: Sequence[str]) -> int:
    """Compiles what is missing, and prints the table; returns the exit code."""
    folder = Path(_WORKDIR.value)
    try:
        wanted = [
            (method, pair, topology)
            for topology in _TOPOLOGY.value
            for method, pair in variants(_METHODS.value if topology == _EVERY_METHOD else ["mgd"], _PAIRS.value)
        ]
        folder.mkdir(parents=True, exist_ok=True)
        reports = [report(*which, _PER_CHIP.value, folder) for which in wanted]
    except UserError as error:
        print(f"kdjax: {error}", file=sys.stderr)
        return error.exit_code
    print(table(reports))
    return int(any("failed" in x for x in reports))


if __name__ == "__main__":
    app.run(main)
