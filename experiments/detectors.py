"""What each kind of detector learns on the embedded data, and what it gains by MGD, and a GFL by LD too.

    python -m experiments.detectors --workdir=runs/detectors

Trains the teacher, the distilled student and the identical student alone, of every kind, once a seed. The flags, the
table, and how it goes on after it was stopped are those of :mod:`experiments.table`. AP is that of masks for SOLO.
"""

import functools
from collections.abc import Sequence

from absl import app
from ml_collections import ConfigDict

from experiments.table import judged_last, tabulate
from kdjax.config import load_config
from kdjax.pairs import EMBEDDED
from kdjax.run.fit import with_keys

ROWS = {**{kind: f"mgd:{variant}" for variant, kind in EMBEDDED.items()}, "gfl by ld": "ld"}
"""By name, the config of each row."""


def protocol(name: str, seed: int) -> ConfigDict:
    """A config with a seed; evaluated at the end of each stage alone."""
    return judged_last(with_keys(load_config(name), {"seed": seed, "compare": True}))


def main(_: Sequence[str]) -> None:
    """The table of all rows."""
    tabulate({row: functools.partial(protocol, name) for row, name in ROWS.items()})


if __name__ == "__main__":
    app.run(main)
