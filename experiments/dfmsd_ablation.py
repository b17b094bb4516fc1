"""What each part of DFMSD is worth on the embedded data.

    python -m experiments.dfmsd_ablation --workdir=runs/dfmsd_ablation

Trains the two teachers once a seed, then the student without their features, with all parts of DFMSD, and with each
part left out. The flags, the table, and how it goes on after it was stopped are those of :mod:`experiments.table`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app
from ml_collections import ConfigDict

from experiments.table import judged_last, tabulate
from kdjax.config import load_config
from kdjax.run.fit import with_keys

_STUDENTS = ("first_student", "student")


def _both(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The same keys in both stages of the student."""
    return {f"{stage}.{key}": value for stage in _STUDENTS for key, value in keys.items()}


VARIANTS: dict[str, dict[str, Any]] = {
    "none": _both({"methods": {}, "loss_weights": {}}),
    "full": {},
    "no-adaptation": _both({"methods.dfmsd.adapt": False}),
    "no-objects": _both({"methods.dfmsd.eta": 0.0}),
    "no-growth": _both({"methods.dfmsd.stage": 1}),
    # A sum over raw features is left, whose weight says nothing: it starts as the norm's term on P3 to P5 would.
    "no-alignment": {
        **_both({"methods.dfmsd.alignment": "separate", "loss_weights.dfmsd_alignment": 0.0}),
        "first_student.method_share": 1.6,
        "student.method_share": 2.8,
    },
    "one-stage": {
        "stages": ("teacher", "student"),
        "student.init": "",
        "student.inherit": ("neck", "head"),
        "student.steps": 700,
        "compare": True,
    },
}
"""By name, the keys in which each run differs from ``configs/dfmsd.py``."""


def variant(name: str, seed: int) -> ConfigDict:
    """The config of a variant with a seed; evaluated at the end of each stage alone."""
    return judged_last(with_keys(load_config("dfmsd"), {"seed": seed, **VARIANTS[name]}))


def main(_: Sequence[str]) -> None:
    """The table of all variants."""
    tabulate({name: functools.partial(variant, name) for name in VARIANTS})


if __name__ == "__main__":
    app.run(main)
