"""What each kind of detector learns on the embedded data, and what it gains by MGD.

    python -m experiments.detectors --workdir=runs/detectors

Trains the teacher, the student by MGD and the identical student alone, of every kind, once a seed. The flags, the
table, and how it goes on after it was stopped are those of :mod:`experiments.table`. AP is that of masks for SOLO.
"""

import functools
from collections.abc import Sequence

from absl import app
from ml_collections import ConfigDict

from experiments.table import tabulate
from kdjax.config import load_config
from kdjax.pairs import EMBEDDED
from kdjax.run.fit import with_keys


def protocol(variant: str, seed: int) -> ConfigDict:
    """The config of a kind with a seed; evaluated at the end of each stage alone."""
    config = load_config(f"mgd:{variant}")
    return with_keys(config, {"seed": seed, "compare": True, **{f"{stage}.eval_every": 0 for stage in config.stages}})


def main(_: Sequence[str]) -> None:
    """The table of all kinds."""
    tabulate({kind: functools.partial(protocol, variant) for variant, kind in EMBEDDED.items()})


if __name__ == "__main__":
    app.run(main)
