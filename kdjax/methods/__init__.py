"""The distillation methods: one paper, one file, each a Flax module that returns named, unweighted loss terms.

The contract: ``method(student, teacher, targets, *, keys, step) -> {term: float32 scalar}`` with feature pyramids by
level name, ``keys`` (N,) one PRNG key per image and ``step`` an int32 scalar. The mean of a term over equal-sized devices
is its value on the whole batch. ``method.terms`` says which parameters, "student" or "method", each term may move.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from kdjax.methods.mgd import MGD
from kdjax.methods.mimic import Mimic
from kdjax.methods.none import NoDistillation

METHODS: dict[str, type[nn.Module]] = {"none": NoDistillation, "mimic": Mimic, "mgd": MGD}
"""Every method by its name in a config."""


def build_method(
    config: Mapping[str, Any], *, axis_name: str | None = None, dtype: jnp.dtype = jnp.float32
) -> nn.Module:
    """The module that ``config`` names, ``{"name": "mgd", "mask_ratio": 0.65}``.

    Raises:
        ValueError: for an unknown name or option, listing the choices.
    """
    options = {key: value for key, value in config.items() if key != "name"}
    name = config["name"]
    if name not in METHODS:
        raise ValueError(f"Unknown method {name!r}: choose one of {', '.join(METHODS)}.")
    fields = {field.name for field in dataclasses.fields(METHODS[name])} - {"parent", "name", "axis_name", "dtype"}
    if unknown := sorted(options.keys() - fields):
        raise ValueError(
            f"Method {name!r} has no option {unknown[0]!r}; its options are: {', '.join(sorted(fields)) or 'none'}."
        )
    return METHODS[name](**options, axis_name=axis_name, dtype=dtype)
